"""Reading a long prompt never keeps rows that decode waiting for more than a slice of it; no text depends on it."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from orthrus.decode.engine import Engine
from orthrus.decode.options import Options, Sampling
from orthrus.decode.prompts import SLICE
from orthrus.policy import steps
from tests import reference
from tests.decode.drive import dual
from tests.families import tiny

MODEL, PLAIN = dual(), tiny("qwen3")
RUNNING = [5, 6, 7]
LONG = [[3 + (11 * i + 7 * j) % 90 for j in range(n)] for i, n in enumerate((61, 20, 9, 100))]


@cache
def plain_text(prompt: tuple[int, ...], count: int, penalty: float = 1.0) -> list[int]:
    return reference.greedy_text(PLAIN, prompt, count, Sampling(repetition_penalty=penalty))


def watched(engine: Engine) -> list[tuple[int, int]]:
    """Note each prefill pass: its rows and its positions per row."""
    passes: list[tuple[int, int]] = []

    def note(_: object, __: object, given: dict[str, Any]) -> None:
        if engine_reads:
            ids: Tensor = given["input_ids"]
            passes.append((ids.shape[0], ids.shape[1]))

    engine_reads: list[bool] = []
    real = engine.passes.prefill

    def prefill(*args: Any, **how: Any) -> Any:
        engine_reads.append(True)
        try:
            return real(*args, **how)
        finally:
            engine_reads.clear()

    engine.passes.prefill = prefill  # type: ignore[method-assign]
    engine.passes.model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    return passes


@pytest.mark.parametrize(
    ("plan", "most", "chunk"),
    [
        ("ar", 16, 5),
        ("fixed:4", 16, 512),
        ("onepass:2", 16, 5),
        ("auto", 16, 512),
        ("ar", 1, 512),
        ("onepass:2", 1, 512),
    ],
)
def test_no_more_than_a_slice_is_read_between_two_tokens_of_a_running_row(plan: str, most: int, chunk: int) -> None:
    """Passes and positions counted at every step of a row that decodes; the texts are the plain loop's.

    Prompts that wait are all read in the end, each in as few steps as its length asks for.
    """
    model = dual()
    engine = Engine(
        model, rows=4, capacity=240, plan=steps.parse(plan), prefill_slice=most, prefill_chunk=chunk, admit_free=1
    )
    passes = watched(engine)
    running = engine.add(RUNNING, Options(max_new_tokens=180))
    engine.step()
    passes.clear()
    ids = [engine.add(prompt, Options(max_new_tokens=6)) for prompt in LONG]
    done, wrote = {}, True
    while engine.busy:
        alive = any(row.id == running for row in engine.live)
        wrote = False
        for progress in engine.step():
            done[progress.row.id] = progress.row
            wrote |= progress.row.id == running
        assert wrote is alive
        if alive:
            ends = 4 * (1 if plan == "ar" else 8)  # of prompts: their last tokens, and drafts behind them
            assert sum(rows * width for rows, width in passes) <= most + ends
            assert len(passes) <= -(-most // min(chunk, most))
        passes.clear()
    assert done[running].token_ids == plain_text(tuple(RUNNING), 180)
    assert [done[id].token_ids for id in ids] == [plain_text(tuple(prompt), 6) for prompt in LONG]


def test_an_idle_engine_reads_whole_prompts_at_once() -> None:
    """There is nobody to keep waiting: a pass over all rows that start level, and the first tokens follow."""
    engine = Engine(dual(), rows=4, capacity=240, plan=steps.parse("ar"), prefill_slice=4)
    passes = watched(engine)
    for prompt in LONG:
        engine.add(prompt, Options(max_new_tokens=6))
    assert len(engine.step()) == 4
    assert passes == [(4, 100)]


def test_rows_that_end_while_others_are_read_leave_them_whole() -> None:
    """Completions end, are aborted and join at every stage of a long prompt: each text is the plain loop's."""
    for seed in range(6):
        chance = torch.Generator().manual_seed(seed)

        def draw(n: int, chance: torch.Generator = chance) -> int:
            return int(torch.randint(n, (), generator=chance))

        engine = Engine(MODEL, rows=3, capacity=240, plan=steps.parse("fixed:4"), prefill_slice=1 + draw(9))
        asked: dict[int, tuple[list[int], int, float]] = {}
        done = {}
        aborted = set()
        for _ in range(40):
            if draw(3) == 0:
                prompt, count = [*LONG, RUNNING][draw(5)], 1 + draw(12)
                penalty = 1.0 + 0.3 * draw(2)
                sampling = Sampling(repetition_penalty=penalty)
                id = engine.add(prompt, Options(max_new_tokens=count, sampling=sampling))
                asked[id] = prompt, count, penalty
            if asked and draw(8) == 0:
                id = list(asked)[draw(len(asked))]
                if engine.abort(id):
                    aborted.add(id)
            done.update((progress.row.id, progress.row) for progress in engine.step())
        done.update((progress.row.id, progress.row) for progress in engine.run())
        for id, (prompt, count, penalty) in asked.items():
            if id not in aborted:
                assert done[id].token_ids == plain_text(tuple(prompt), 12, penalty)[:count]


def test_a_waiting_prompt_that_is_aborted_while_it_is_read_is_gone() -> None:
    """Its place is free again, and the next one's text is whole."""
    engine = Engine(MODEL, rows=2, capacity=240, plan=steps.parse("ar"), prefill_slice=8)
    engine.add(RUNNING, Options(max_new_tokens=40))
    engine.step()
    id = engine.add(LONG[3], Options(max_new_tokens=6))
    engine.step()
    assert [row.id for row in engine.rows.reading] == [id]
    assert engine.abort(id)
    assert engine.rows.reading == []
    other = engine.add(LONG[3], Options(max_new_tokens=6))
    rows = {progress.row.id: progress.row for progress in engine.run()}
    assert rows[other].token_ids == reference.greedy_text(PLAIN, LONG[3], 6)


def test_slices_are_bounded_unless_asked_otherwise() -> None:
    engine = Engine(MODEL, rows=1, capacity=64, plan=steps.parse("ar"))
    assert engine.reader.most == SLICE["cpu"] == 128
