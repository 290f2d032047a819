"""Our DFlash and DSpark against the `speculators` library, where that is installed: losses on equal weights are equal.

It is no dependency: `pip install --no-deps speculators==0.9.0 loguru pydantic-settings aiohttp sniffio distro openai`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orthrus.model.head import output_head
from orthrus.peers import dflash_files
from orthrus.train import anchors, frozen, scoring
from orthrus.train.anchors import Blocks
from orthrus.train.dflash import filled
from orthrus.train.sections import BlockObjective
from tests import reference
from tests.families import tiny
from tests.peers.test_dflash import VARIANTS, backbone, drafter

pytest.importorskip("speculators", reason="the library speculators is not installed")

OBJECTIVES: dict[str, tuple[dict[str, Any], str]] = {
    "dflash": ({"loss": "cross_entropy", "slot_decay": 7.0}, "ce"),
    "dspark": ({"loss": "tv", "slot_decay": 4.0}, "tv"),
}


@pytest.mark.parametrize("variant", OBJECTIVES)
def test_losses_on_equal_weights_are_equal(variant: str, tmp_path: Path) -> None:
    """Over one greedy text, blocks wherever a whole one has room, to 1e-5; from the file that we wrote."""
    from speculators.losses import resolve_loss_config
    from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig
    from speculators.models.dspark import DSparkDraftModel, DSparkSpeculatorConfig

    model = backbone()
    own = drafter(model, taps=(0, 1), **VARIANTS[variant])
    dflash_files.save(own, tmp_path)
    text = [5, 6, 7, *reference.greedy_text(tiny("qwen3"), [5, 6, 7], 30)]
    token_BT = torch.tensor([text])
    document_BT, position_BT = torch.zeros_like(token_BT), torch.arange(len(text))[None]
    answer_BT, K = position_BT >= 2, own.config.block_size
    read = frozen.read(model, token_BT, document_BT, position_BT, own.config.taps)

    layers = own.config.shape.to_dict() | {"model_type": "qwen3"}
    given = {"transformer_layer_config": layers, "draft_vocab_size": 96, "block_size": K, "mask_token_id": 95}
    given |= {"aux_hidden_state_layer_ids": [1, 2]}
    if variant == "dspark":
        config = DSparkSpeculatorConfig(**given, markov_rank=3, enable_confidence_head=False)
    else:
        config = DFlashSpeculatorConfig(**given)
    config.transformer_layer_config._attn_implementation = "eager"
    theirs = (DSparkDraftModel if variant == "dspark" else DFlashDraftModel)(config)
    missing, unexpected = theirs.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert unexpected == []
    assert all(name.startswith(("embed_tokens.", "lm_head.", "verifier_")) for name in missing)
    goal, name = OBJECTIVES[variant]
    anchor_BN = torch.arange(2, len(text) - K)[None]
    with torch.no_grad():
        theirs.embed_tokens.weight.copy_(model.get_input_embeddings().weight)
        theirs.lm_head.weight.copy_(model.lm_head.weight)
        theirs.verifier_lm_head.weight.copy_(model.lm_head.weight)
        theirs.verifier_norm.forward = lambda hidden: hidden  # ours are normed already
        _, loss, _ = theirs(
            hidden_states=torch.cat(read.tapped, -1),
            input_ids=token_BT,
            loss_mask=answer_BT,
            verifier_last_hidden_states=read.hidden_BTC,
            document_ids=document_BT,
            position_ids=position_BT,
            loss_config=resolve_loss_config(name, "eager"),
            gamma=goal["slot_decay"],
            max_anchors=anchor_BN.shape[1],
            **({"tv_loss_fn": resolve_loss_config("tv", "eager")["tv"][0]} if variant == "dspark" else {}),
        )
        target_BNJ, scored_BNJ = anchors.targets(document_BT, answer_BT, anchor_BN, slots=own.config.proposals)
        nothing_BN = torch.zeros_like(anchor_BN)
        blocks = Blocks(anchor_BN, nothing_BN == 0, target_BNJ, scored_BNJ, nothing_BN > 0, nothing_BN)
        student = filled(own, model, torch.cat(read.tapped, -1), token_BT, document_BT, position_BT, blocks)
        found = scoring.score(
            BlockObjective(**goal, blocks_per_row=1),
            student[:, :, K - own.config.proposals :],
            read.hidden_BTC,
            token_BT,
            blocks,
            head=output_head(model),
            markov=own.markov,
        )
    assert bool(scored_BNJ.all())
    assert float(found.total) / scored_BNJ.sum() == pytest.approx(float(loss), rel=1e-5)
