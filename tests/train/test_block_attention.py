"""Training with causal blocks: the block pass is the decoder's draft pass, and what is saved says so."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from orthrus.checkpoints import files
from orthrus.model.attach import config_of
from orthrus.model.head import output_head
from orthrus.train import anchors, frozen
from orthrus.train.loop import train
from orthrus.train.view import TeacherKeys, ViewTask
from tests.train.tiny import drafted, one_row, saved_backbone, view_recipe

CAUSAL = {"block_attention": "causal"}


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_the_training_pass_is_the_decoders_draft_pass(
    family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Both mask the block the same way: equal logits for drawn blocks, anchors known and blind."""
    task = ViewTask(view_recipe(saved_backbone(tmp_path / "b", tokenizer, family), tmp_path / "run", model=CAUSAL))
    document, position, token, answer = one_row(task, 48)
    blocks = anchors.sample(
        document, answer, blocks=6, block_length=6, blind_share=0.5, generators=[torch.Generator().manual_seed(0)]
    )
    keys = TeacherKeys(document)
    with torch.no_grad():
        frozen.read(task.model, token, document, position, keys=keys)
        logits = output_head(task.model)(task._student(keys, token, document, position, blocks, 6))
    mask = config_of(task.model).mask
    for n, anchor in enumerate(blocks.anchor_BN[0].tolist()):
        first = torch.where(blocks.blind_BN[:, n], mask, token[:, anchor])
        expected = drafted(task.model, token[0, :anchor].tolist(), first)
        torch.testing.assert_close(logits[0, n, :-1], expected, rtol=1e-4, atol=1e-4)


def test_a_saved_view_says_that_its_blocks_are_causal(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Training on from it, the recipe decides again."""
    backbone = saved_backbone(tmp_path / "b", tokenizer, "qwen3")
    recipe = view_recipe(backbone, tmp_path / "run", model=CAUSAL, schedule={"steps": 2})
    assert train(ViewTask(recipe), recipe).finished
    saved = tmp_path / "run" / "model"
    assert files.read_config(saved).block_attention == "causal"
    for wanted in ("causal", "bidirectional"):
        model = {"start_from": str(saved), "block_attention": wanted}
        task = ViewTask(view_recipe(backbone, tmp_path / "more", model=model))
        assert config_of(task.model).block_attention == wanted
