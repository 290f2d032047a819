"""Completions that come, go and are given up at random: every one of them still says what the plain loop says."""

import gc
import random
from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from orthrus.decode import plan
from orthrus.decode.engine import Engine, Row
from orthrus.decode.options import Options, Sampling
from tests import reference
from tests.decode.drive import BLOCK, dual
from tests.families import FAMILIES, tiny

LONGEST = 14
STEMS = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 40], [60, 61, 60, 61, 60], [8]]
PLANS = ["ar", "fixed:2", "fixed:5", "full", "tree:6", "onepass:2", "onepass", "lookup", "auto"]
PENALTIES = [1.0, 1.0, 1.4]

EVERY = list(FAMILIES)


@cache
def model_of(family: str) -> PreTrainedModel:
    return dual(family)


@cache
def plain_text(family: str, prompt: tuple[int, ...], penalty: float) -> list[int]:
    plain = tiny(family)
    return reference.greedy_text(plain, prompt, 2 * LONGEST, Sampling(repetition_penalty=penalty))


class Schedule:
    """One random life of an engine."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.now = 0.0
        self.family = self.chance.choice(EVERY)
        self.engine = self.random_engine()
        self.rows: dict[int, Row] = {}
        self.expected: dict[int, list[int]] = {}
        self.aborted: set[int] = set()

    def random_engine(self) -> Engine:
        chosen = plan.parse(self.chance.choice(PLANS))
        scratch = max(step.scratch for step in chosen.steps(BLOCK))
        return Engine(
            model_of(self.family),
            rows=self.chance.randint(1, 3),
            capacity=Engine.room(max(map(len, STEMS)) + LONGEST, LONGEST, scratch),
            plan=chosen,
            prefill_chunk=self.chance.choice([1, 3, 512]),
            admit_free=self.chance.randint(1, 2),
            clock=self.tick,
        )

    def tick(self) -> float:
        """A clock by which steps cost anything, so that `auto` tries everything."""
        self.now += self.chance.random()
        return self.now

    def add(self) -> None:
        """Ask for a completion of a known prompt, sometimes of an earlier text, as a conversation does."""
        prompt, penalty, start = list(self.chance.choice(STEMS)), self.chance.choice(PENALTIES), 0
        text = plain_text(self.family, tuple(prompt), penalty)
        if penalty == 1.0 and self.chance.random() < 0.5:
            start = self.chance.randint(1, LONGEST)
            prompt += text[:start]
        text = text[start : start + self.chance.randint(1, LONGEST)]
        eos = (self.chance.choice(text),) if self.chance.random() < 0.4 else ()
        options = Options(max_new_tokens=len(text), eos_token_id=eos, sampling=Sampling(repetition_penalty=penalty))
        id = self.engine.add(prompt, options)
        self.expected[id] = text[: text.index(eos[0]) + 1] if eos else text

    def step(self) -> None:
        for progress in self.engine.step():
            row = self.rows[progress.row.id] = progress.row
            assert row.token_ids[-len(progress.token_ids) :] == progress.token_ids
            assert 0 <= progress.accepted <= len(progress.token_ids)

    def abort(self) -> None:
        alive = [row.id for row in (*self.engine.live, *self.engine.waiting)]
        if alive:
            id = self.chance.choice(alive)
            assert self.engine.abort(id)
            self.aborted.add(id)

    def run(self, events: int) -> None:
        for _ in range(events):
            self.chance.choices([self.add, self.step, self.abort], weights=[4, 6, 1])[0]()
        while self.engine.busy:
            self.step()

    def check(self) -> None:
        assert self.engine.live == []
        for id, text in self.expected.items():
            written = self.rows[id].token_ids if id in self.rows else []
            if id in self.aborted:
                assert written == text[: len(written)]
            else:
                assert written == text
                assert self.rows[id].stats.emitted == len(text)


@settings(max_examples=24)
@given(st.integers(0, 2**32 - 1))
def test_random_schedules_equal_the_plain_loop(seed: int) -> None:
    """Families, rows, plans, chunks, prompts, options, arrivals and abortions drawn at random."""
    schedule = Schedule(seed)
    schedule.run(18)
    schedule.check()


def test_ten_thousand_completions_leave_nothing_behind() -> None:
    """Asked for, admitted, given up before or after: no row, key, length or object stays, and no buffer grows."""
    chance = random.Random(0)
    engine = Engine(model_of("qwen3"), rows=4, capacity=40, plan=plan.parse("full"))
    options = Options(max_new_tokens=2)

    def live_through(completions: int) -> int:
        for _ in range(completions // 20):
            asked = [engine.add(chance.choice(STEMS), options) for _ in range(20)]
            chance.shuffle(asked)
            for id in asked[:15]:
                assert engine.abort(id)
            engine.step()
            while len(engine.waiting) > 4:
                engine.step()
        while engine.busy:
            engine.step()
        gc.collect()
        return len(gc.get_objects())

    before, held = live_through(500), engine.cache.nbytes
    after = live_through(10_000)
    assert after <= before + 50
    assert engine.cache.nbytes == held
    assert (engine.live, list(engine.waiting), engine._ready) == ([], [], [None] * 4)
    assert all(len(ids) <= engine.capacity for ids in engine._cached_ids)
