"""Causal blocks: a slot's draft does not know how long the block is, fused passes draft the same, texts are AR's."""

import dataclasses

import pytest
import torch
from transformers import PreTrainedModel

from orthrus.decode.engine import Engine
from orthrus.decode.options import Options
from orthrus.decode.passes import Passes
from orthrus.model.attachment import attachment_of, config_of
from orthrus.model.cache import ScratchCache
from orthrus.policy import steps
from tests import reference
from tests.decode.drive import decode, dual
from tests.families import FAMILIES, tiny

TEXTS = [[5, 6, 7, 8, 9, 10, 11], [8, 3, 2], [30, 31, 32, 33, 34, 35, 36, 37, 38]]
ROWS = slice(0, 3)


def causal(family: str = "qwen3") -> PreTrainedModel:
    model = dual(family, **FAMILIES[family])
    attachment_of(model).config = dataclasses.replace(config_of(model), block_attention="causal")
    return model


def prefilled(model: PreTrainedModel, *, room: int) -> Passes:
    passes = Passes(model, ScratchCache(rows=3, capacity=16 + room))
    passes.prefill(ROWS, TEXTS, chunk=512)
    return passes


@torch.inference_mode()
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gpt_oss"])
def test_a_slot_s_draft_does_not_depend_on_those_behind_it(family: str) -> None:
    """The first slots of a long block are a short one; where blocks see both ways they are not."""
    anchor = torch.tensor([4, 5, 6])
    for model, same in ((causal(family), True), (dual(family, **FAMILIES[family]), False)):
        passes = prefilled(model, room=8)
        long, short = passes.draft(ROWS, anchor, 6).logits_BMV[:, :2], passes.draft(ROWS, anchor, 2).logits_BMV
        assert torch.allclose(long, short, rtol=1e-5, atol=1e-5) is same


@pytest.mark.parametrize("name", ["full", "fixed:3", "tree:12", "onepass:2", "auto"])
def test_texts_are_the_backbone_s(name: str) -> None:
    """Greedy, ragged rows that join and leave."""
    model, chosen = causal(), steps.parse(name)
    capacity = 32 + chosen.scratch(8)
    rows = decode(Engine(model, rows=2, capacity=capacity, plan=chosen), TEXTS, Options(max_new_tokens=20))
    assert [row.token_ids for row in rows] == [reference.greedy_text(tiny("qwen3"), text, 20) for text in TEXTS]
