"""Rows of one pass come by their drafts each in its own way: drafted anew, or made by the pass before."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from orthrus.decode.batching import batch_of
from orthrus.decode.drafters import ViewDrafter
from orthrus.decode.engine import Engine
from orthrus.decode.options import Options, Sampling
from orthrus.decode.passes import Passes, Proposal
from orthrus.policy import steps
from orthrus.policy.steps import Step
from tests import reference
from tests.decode.drive import BLOCK, decode, dual, scripted
from tests.families import tiny

LONGEST = 24
MODEL, PLAIN = dual(num_hidden_layers=1), tiny("qwen3", num_hidden_layers=1)
PROMPTS = [[5, 6, 7, 8, 5, 6, 7, 8, 5], [60, 61], [9, 9, 9, 9], [5, 6, 7, 40], [12, 13, 12, 13, 12]]
STEPS = [Step(), Step(BLOCK - 1), Step(3), Step(3, lookup=True), Step(BLOCK - 1, nodes=9), Step(BLOCK - 1, stops=2)]


def watched(rows: int) -> tuple[Engine, list[slice]]:
    """An engine, and the rows of each draft pass that it will run."""
    drawn: list[slice] = []

    class Noting(ViewDrafter):
        ahead = False

        def propose(
            self, passes: Passes, rows: slice, anchor_B: Tensor, drafts: int, states: Sequence[Any]
        ) -> Tensor | Proposal:
            assert len(anchor_B) == len(states) == rows.stop - rows.start > 0
            drawn.append(rows)
            return super().propose(passes, rows, anchor_B, drafts, states)

    return Engine(MODEL, rows=rows, capacity=200, plan=steps.parse("auto"), drafter=Noting()), drawn


def plain_texts(sampling: Sampling) -> list[list[int]]:
    return [reference.greedy_text(PLAIN, prompt, LONGEST, sampling) for prompt in PROMPTS]


@pytest.mark.parametrize("seed", range(6))
def test_texts_are_the_plain_ones_whatever_is_chosen(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps drawn at random, rows joining as others end."""
    chance = random.Random(seed)

    def choose(*_: object) -> Step:
        return chance.choice(STEPS)

    sampling = Sampling(repetition_penalty=chance.choice([1.0, 1.3]))
    engine, drawn = watched(4)
    scripted(engine, choose)
    done = decode(engine, PROMPTS, Options(max_new_tokens=LONGEST, sampling=sampling))
    assert [row.token_ids for row in done] == plain_texts(sampling)
    assert drawn


def test_rows_with_drafts_made_ahead_need_no_draft_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a fused pass the rows it drafted for use what it made, exactly; the others draft."""
    engine, drawn = watched(3)
    steps = [Step(3, stops=4), Step(3)]
    scripted(engine, lambda *_: steps.pop(0))
    for prompt in PROMPTS[:3]:
        engine.add(prompt, Options(max_new_tokens=LONGEST))
    engine.step()  # first tokens
    engine.step()
    assert all(row.ready is not None for row in engine.live)
    engine.live[0].ready = None  # as if acceptance had stopped elsewhere
    for row in engine.live:
        row.observe(copies=False)
    batch = batch_of(engine.live, engine.cache, Step(3), coupled=True, whole=False)
    assert batch.drawing == slice(0, 1)
    for place in (1, 2):
        ready, given = engine.live[place].ready, batch.ready[place]
        assert ready is not None
        assert given is not None
        assert torch.equal(given, ready.logits_MV[:3])
    engine.step()
    assert drawn == [slice(0, 3), slice(0, 1)]
