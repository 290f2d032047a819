"""Masked tokens are learned in the very state that decoding meets them in; a run makes a model that decodes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from orthrus.errors import ConfigError
from orthrus.kernels import masks
from orthrus.peers import blocks
from orthrus.train.blocks import BlocksTask, begins, draw
from orthrus.train.config import recipe_from_mapping
from orthrus.train.peer_sections import BlocksRecipe
from orthrus.train.plan import plan
from orthrus.train.run import run
from tests.train.tiny import saved_backbone, tiny_tokenizer, view_recipe


def blocks_recipe(folder: Path, **sections: dict[str, Any]) -> BlocksRecipe:
    tables = view_recipe(folder / "backbone", folder / "run").model_dump(mode="json")
    tables |= {"kind": "blocks", "model": {"backbone": str(folder / "backbone"), "block_size": 4}, "objective": {}}
    for name, keys in sections.items():
        tables[name] = {**tables[name], **keys}
    recipe = recipe_from_mapping(tables)
    assert isinstance(recipe, BlocksRecipe)
    return recipe


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_the_doubled_mask_equals_its_rule_written_out() -> None:
    """Noisy tokens see their block's and the clean blocks before it; clean ones see clean blocks up to their own."""
    document, block = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1]]), torch.tensor([[0, 0, 1, 1, 0, 0, 1, 0]])
    found = masks.doubled(document, block)[0]
    T = document.shape[1]
    for q in range(2 * T):
        for k in range(2 * T):
            i, j = q % T, k % T
            same = document[0, i] == document[0, j] and document[0, i] >= 0
            if q < T:
                sees = block[0, i] == block[0, j] if k < T else block[0, j] < block[0, i]
            else:
                sees = k >= T and block[0, j] <= block[0, i]
            assert bool(found[q, k]) == (bool(same and sees) or q == k)


def test_groups_begin_where_documents_and_blocks_do() -> None:
    document, block = torch.tensor([[0, 0, 0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 0, 0, 1]])
    assert begins(document).tolist() == [[0, 0, 0, 3, 3, 3]]
    assert begins(document, block).tolist() == [[0, 0, 2, 3, 3, 5]]


def test_masked_shares_are_their_groups_and_complements_fill_up() -> None:
    """Of 64,000 tokens each group's masked share is its own, within five standard deviations; prompts stay clean."""
    group = torch.arange(16).repeat_interleave(4000)[None] * 4000
    answer = torch.ones_like(group, dtype=torch.bool)
    answer[:, :100] = False
    noise = draw(group, answer, least=0.001, complement=True, generators=generators(1))
    assert not noise.masked_BT[:, :100].any()
    assert torch.equal(noise.masked_BT[0] ^ noise.masked_BT[1], answer[0])
    for part in range(1, 16):
        own = slice(4000 * part, 4000 * part + 4000)
        share = float(noise.share_BT[0, 4000 * part])
        deviation = (share * (1 - share) / 4000) ** 0.5
        assert abs(float(noise.masked_BT[0, own].float().mean()) - share) < 5 * deviation + 1e-6


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("size", [4, None])
@pytest.mark.parametrize("weight", ["equal", "inverse"])
def test_the_loss_is_that_of_decoding_s_own_passes(tmp_path: Path, weight: str, size: int | None, shift: bool) -> None:
    """Each masked token's loss, from a pass over clean blocks before and its noisy one, as the decoder makes it."""
    saved_backbone(tmp_path / "backbone", tiny_tokenizer(), "qwen3")
    noised = {"noise": "document" if size is None else "block", "weight": weight}
    task = BlocksTask(blocks_recipe(tmp_path, model={"block_size": size, "shift": shift}, objective=noised))
    rows, index = task._data.rows, np.arange(1)
    kept: list[Any] = []
    original = draw

    def spy(*args: Any, **more: Any) -> Any:
        kept.append(original(*args, **more))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orthrus.train.blocks.draw", spy)
        loss = task.loss(index, 3)
    (noise,) = kept
    total = 0.0
    for document in range(int(rows.document[0].max()) + 1):
        own = rows.document[0] == document
        text = rows.token_ids[0][own].tolist()
        masked, share = noise.masked_BT[0][torch.from_numpy(own)], noise.share_BT[0][torch.from_numpy(own)]
        K = size or len(text)
        for start in range(0, len(text), K):
            stop = min(start + K, len(text))
            seen = text[:start] + [task._config.mask if masked[i] else text[i] for i in range(start, stop)]
            block = torch.arange(stop) // K
            allowed = (block[:, None] >= block[None])[None, None]
            with torch.no_grad():
                logits = task.model(
                    input_ids=torch.tensor([seen]),
                    position_ids=torch.arange(stop)[None],
                    attention_mask=masks.additive(allowed, torch.float32),
                ).logits[0]
            for i in range(start, stop):
                if masked[i]:
                    own_loss = float(F.cross_entropy(logits[i - 1 if shift else i][None], torch.tensor([text[i]])))
                    total += own_loss / (float(share[i]) if weight == "inverse" else 1.0)
    assert float(loss.total.detach()) == pytest.approx(total, rel=1e-4)
    counted = noise.masked_BT.sum() if weight == "equal" else rows.answer[:1].sum()
    assert int(loss.weight) == int(counted)


def test_a_run_makes_a_model_that_decodes(tmp_path: Path) -> None:
    """Six steps with complements; the head that is the embedding stays so; what it took is written beside it."""
    saved_backbone(tmp_path / "backbone", tiny_tokenizer(), "qwen3", tie_word_embeddings=True)
    recipe = blocks_recipe(tmp_path, objective={"complement": True})
    result = run(recipe)
    assert result.finished
    assert result.model is not None
    assert "heldout/json/tokens_per_forward" in result.metrics
    model, config = blocks.load(result.model, dtype=torch.float32, device=torch.device("cpu"))
    assert (config.block_size, config.shift) == (4, True)
    written = blocks.write(model, config, blocks.Unmasking(), [5, 6, 7], max_new_tokens=9)
    assert len(written.token_ids) == 9
    assert plan(recipe).shapes.trainable == sum(p.numel() for p in model.parameters())


def test_whole_texts_have_no_blocks_to_noise(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"objective\.noise must be 'document'"):
        blocks_recipe(tmp_path, model={"block_size": None})
