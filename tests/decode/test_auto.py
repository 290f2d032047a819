"""`plan="auto"` under a clock that talks nonsense: speed is all it can change, and nothing is left behind."""

import math
import random
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from torch import Tensor, nn

from orthrus.decode.drafters import ViewDrafter
from orthrus.decode.engine import Engine
from orthrus.decode.learned import begin_anew
from orthrus.decode.options import Options, Sampling
from orthrus.decode.passes import Passes, Proposal
from orthrus.decode.rows import Row
from orthrus.policy import steps
from orthrus.policy.acceptance import RowOutcome, RowState
from orthrus.policy.policy import Policy
from orthrus.policy.steps import Step
from tests import reference
from tests.decode.drive import BLOCK, dual
from tests.families import tiny

LONGEST = 10
STEMS = [[5, 6, 7, 8, 5, 6, 7, 8, 5], [5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 40], [60, 61], [8]]
MODEL, PLAIN = dual(num_hidden_layers=1), tiny("qwen3", num_hidden_layers=1)
PLAN = steps.parse("auto")
CAPACITY = Engine.room(max(map(len, STEMS)) + LONGEST, LONGEST, PLAN.scratch(BLOCK))


@cache
def plain_text(prompt: tuple[int, ...], penalty: float) -> list[int]:
    return reference.greedy_text(PLAIN, prompt, LONGEST, Sampling(repetition_penalty=penalty))


class Nonsense:
    """A clock that stands still, crawls, leaps by ages, and now and then runs backwards or past the end of time."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.now = 0.0

    def __call__(self) -> float:
        self.now += self.chance.choice([0.0, 0.0, 1e-12, 1e-3, 1.0, 1e9, 1e200, -5.0])
        if self.chance.random() < 0.01:
            return math.inf
        return self.now


class Life:
    """A few hundred completions that come, go and are given up at random, in one engine."""

    def __init__(self, seed: int, rows: int) -> None:
        self.chance = random.Random(seed)
        begin_anew(MODEL)  # what other tests' engines have learned
        self.engine = Engine(MODEL, rows=rows, capacity=CAPACITY, plan=PLAN, clock=Nonsense(self.chance))
        self.expected: dict[int, list[int]] = {}
        self.rows: dict[int, Row] = {}
        self.aborted: set[int] = set()
        self.kinds: set[str] = set()
        choose = self.engine.policy.choose

        def chosen(rows: list[RowState]) -> Step:
            self.kinds.add((step := choose(rows)).kind)
            return step

        self.engine.policy.choose = chosen  # type: ignore[method-assign,assignment]

    def add(self) -> None:
        prompt = self.chance.choice(STEMS)
        if self.chance.random() < 0.3:
            prompt = prompt + plain_text(tuple(prompt), 1.0)[: self.chance.randint(1, LONGEST)]
        penalty = self.chance.choice([1.0, 1.0, 1.4])
        count = self.chance.randint(1, LONGEST)
        sampling = Sampling(repetition_penalty=penalty)
        id = self.engine.add(prompt, Options(max_new_tokens=count, sampling=sampling))
        self.expected[id] = plain_text(tuple(prompt), penalty)[:count]

    def abort(self) -> None:
        alive = [row.id for row in (*self.engine.live, *self.engine.waiting)]
        if alive:
            self.aborted.add(id := self.chance.choice(alive))
            assert self.engine.abort(id)

    def step(self) -> None:
        for progress in self.engine.step():
            self.rows[progress.row.id] = progress.row

    def run(self, admissions: int) -> None:
        while len(self.expected) < admissions:
            self.chance.choices([self.add, self.step, self.abort], weights=[4, 5, 1])[0]()
        while self.engine.busy:
            self.step()


@pytest.mark.parametrize(("rows", "admissions", "seed"), [(1, 70, 1), (3, 200, 2)])
def test_nonsense_costs_change_no_text_and_leave_nothing_behind(rows: int, admissions: int, seed: int) -> None:
    """Texts equal the plain loop's; afterwards no row is live or waiting, nothing is ready, the cache has not grown.

    Plain steps, drafts and copies were taken on the way, so none of this is for want of trying.
    """
    life = Life(seed=seed, rows=rows)
    life.run(1)
    engine = life.engine
    buffers = [buffer.data_ptr() for buffer in engine.cache.keys + engine.cache.values]
    life.run(admissions)
    for id, text in life.expected.items():
        written = life.rows[id].token_ids if id in life.rows else []
        assert written == (text[: len(written)] if id in life.aborted else text)
    assert life.kinds >= {"plain", "tree", "lookup"}
    assert len(life.aborted) > admissions / 20
    assert (engine.live, engine.rows.reading, list(engine.waiting)) == ([], [], [])
    assert [buffer.data_ptr() for buffer in engine.cache.keys + engine.cache.values] == buffers
    assert engine.cache.lengths == engine.cache.length_R.tolist()
    assert all(known <= n for known, n in zip(engine.rows._prefixes.lengths, engine.cache.lengths, strict=True))


def test_what_a_row_leaves_behind_is_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a whole life of trees, chains and copies, keys that are kept are as good as freshly read ones.

    Each text is asked for twice in a row: the second time its prompt has keys already (if the row is the same), and
    says the same.
    """
    life = Life(seed=7, rows=1)
    life.run(20)
    engine, read = life.engine, []
    real = engine.passes.prefill

    def spy(rows: slice, pending: list[list[int]], **how: Any) -> Tensor | None:
        read.append(sum(map(len, pending)))
        return real(rows, pending, **how)

    monkeypatch.setattr(engine.passes, "prefill", spy)
    for prompt in STEMS:
        text = plain_text(tuple(prompt), 1.0)
        longer = prompt + text[:5]
        for asked, expected in ((prompt, text), (longer, text[5:])):
            id = engine.add(asked, Options(max_new_tokens=len(expected)))
            while engine.busy:
                life.step()
            assert life.rows[id].token_ids == expected
    assert sum(read) < sum(len(p) for p in STEMS) + 4


# ---------------------------------------------------------------- what it decides by


def test_a_recorded_trace_gives_the_same_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a policy was told in an engine's life, told again to a fresh one, gives the same steps; nobody reads a
    clock but the engine's own.
    """
    for name in ("perf_counter", "monotonic", "process_time", "time"):
        monkeypatch.setattr(time, name, lambda: pytest.fail("a clock was read"))
    life = Life(seed=5, rows=3)
    policy, fresh = life.engine.policy, Policy(PLAN, block=BLOCK)
    choose, learn, states, kinds = policy.choose, policy.learn, dict[int, tuple[RowState, RowState]](), set[str]()

    def twin_of(state: RowState) -> RowState:
        """Replace a row's state, known by its identity, by one of the fresh policy's own."""
        twin = states.setdefault(id(state), (state, fresh.new_row()))[1]
        twin.match, twin.ready, twin.blind = state.match, state.ready, state.blind
        return twin

    def chosen(rows: list[RowState]) -> Step:
        step = choose(rows)
        assert fresh.choose([twin_of(row) for row in rows]) == step
        kinds.add(step.kind)
        return step

    def learned(step: Step, outcomes: list[RowOutcome], seconds: float) -> None:
        learn(step, outcomes, seconds)
        fresh.learn(step, outcomes, seconds)

    monkeypatch.setattr(policy, "choose", chosen)
    monkeypatch.setattr(policy, "learn", learned)
    life.run(80)
    assert len(kinds) >= 3


@pytest.mark.parametrize(("rows", "wide"), [(1, 1.2), (4, 2.0)])
def test_a_drafter_that_is_always_wrong_costs_three_percent_more_passes_at_most(rows: int, wide: float) -> None:
    """Passes of an engine whose view drafts what it thinks least likely, counted from the 100th token on.

    Plain decoding takes one pass a token. Of the clock a pass over a block takes `wide` times what one token does; the
    texts are drawn at random, so that there is hardly anything to copy either.
    """
    seconds, passes = 0.0, 0

    def take(_: nn.Module, __: tuple[object, ...], given: dict[str, Tensor]) -> None:
        nonlocal seconds, passes
        seconds += 1 + (wide - 1) * (given["input_ids"].shape[1] - 1) / (BLOCK - 1)
        passes += 1

    model = dual(num_hidden_layers=1, max_position_embeddings=1024)
    model.register_forward_pre_hook(take, with_kwargs=True)
    room = Engine.room(3, 600, PLAN.scratch(BLOCK))
    engine = Engine(model, rows=rows, capacity=room, plan=PLAN, drafter=Wrong(), clock=lambda: seconds)
    for index in range(rows):
        sampled = Options(max_new_tokens=600, sampling=Sampling(do_sample=True))
        engine.add([5, 6, 7], sampled, index=index)
    accepted = steps = tokens = 0
    while engine.busy:
        if steps == 100:
            passes = tokens = 0
        steps += 1
        progress = engine.step()
        accepted += sum(one.accepted for one in progress)
        tokens += max(len(one.token_ids) for one in progress)
    assert accepted <= 5
    assert passes <= 1.03 * tokens


class Wrong(ViewDrafter):
    ahead = False

    def propose(self, passes: Passes, rows: slice, anchor_B: Tensor, drafts: int, states: Sequence[Any]) -> Proposal:
        made = passes.draft(rows, anchor_B, drafts - 1)
        return Proposal(-100 * made.logits_BMV, made.first_B1V)
