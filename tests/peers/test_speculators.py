"""Our EAGLE-3 against the `speculators` library, where that is installed: its file loads there, and losses are equal.

It is no dependency: `pip install --no-deps speculators==0.9.0 loguru pydantic-settings aiohttp sniffio distro openai`.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orthrus.peers import eagle3_model
from orthrus.train import frozen
from orthrus.train.eagle3 import unrolled
from tests.peers.test_eagle3 import backbone, untrained

pytest.importorskip("speculators", reason="the library speculators is not installed")


@pytest.mark.parametrize("norm_before_residual", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_losses_on_equal_weights_are_equal(family: str, norm_before_residual: bool, tmp_path: Path) -> None:
    """Four steps over one text, mean KL of each decayed by 0.8, to 1e-5; from the files that we wrote."""
    from speculators.losses import resolve_loss_config
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

    model, steps, T = backbone(family), 4, 20
    drafter = untrained(model, norm_before_residual=norm_before_residual)
    eagle3_model.save(drafter, model, tmp_path)
    token_BT = torch.randint(3, 90, (1, T), generator=torch.Generator().manual_seed(1))
    document_BT, position_BT = torch.zeros_like(token_BT), torch.arange(T)[None]
    read = frozen.read(model, token_BT, document_BT, position_BT, drafter.config.taps)

    values = json.loads((tmp_path / "config.json").read_text())
    config = Eagle3SpeculatorConfig(**values)
    config.transformer_layer_config._attn_implementation = "eager"
    theirs = Eagle3DraftModel(config)
    missing, unexpected = theirs.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert unexpected == []
    assert set(missing) <= {"verifier_norm.weight", "verifier_lm_head.weight"}
    head = model.get_output_embeddings()
    with torch.no_grad():
        theirs.verifier_norm.weight.fill_(1.0)
        theirs.verifier_lm_head.weight.copy_(head.weight)
        theirs.verifier_norm.forward = lambda hidden: hidden  # ours are normed already
        mask = torch.ones(1, T - 1, dtype=torch.bool)
        mask[:, -1] = False  # the last token's entry drafts a token that there is not
        _, loss, _ = theirs(
            hidden_states=torch.cat(read.tapped, -1)[:, :-1],
            input_ids=token_BT[:, 1:],
            document_ids=document_BT[:, 1:],
            loss_mask=mask,
            position_ids=position_BT[:, 1:],
            verifier_last_hidden_states=read.hidden_BTC[:, 1:],
            ttt_steps=steps,
            ttt_step_loss_decay=0.8,
            loss_config=resolve_loss_config("kl_div", "eager"),
        )
        embedded = model.get_input_embeddings()(token_BT)
        said = unrolled(drafter, embedded, drafter.fuse(read.tapped), document_BT, steps)
        expected = torch.zeros(())
        for own in said:
            last = T - 1 - own.shift
            student = head(drafter.norm(own.output_BTH[0, 1:last])).log_softmax(-1)
            teacher = head(read.hidden_BTC[0, 1 + own.shift : T - 1]).log_softmax(-1)
            expected += 0.8**own.shift * (teacher.exp() * (teacher - student)).sum(-1).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
