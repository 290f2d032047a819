"""Completions that come, go and are given up at random: every one of them still says what the plain loop says."""

import gc
import random
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, rule, run_state_machine_as_test
from transformers import PreTrainedModel

from orthrus.decode import noise
from orthrus.decode.engine import Engine
from orthrus.decode.learned import begin_anew
from orthrus.decode.options import Options, Sampling
from orthrus.decode.rows import Row
from orthrus.model.graphs import compile_passes
from orthrus.policy import steps
from tests import reference
from tests.decode.drive import BLOCK, dual, held
from tests.families import FAMILIES, VOCAB, tiny

KINDS = ["ar", "full", "tree:6", "onepass:2", "lookup", "auto"]
PLANS = [*KINDS, "onepass:2:6", "fixed:2", "fixed:5", "tree:20", "onepass", "lookup:2"]
REJECTING = ["full", "fixed:2", "fixed:5"]
LONGEST = 10
SEED = 3
STORIES: list[tuple[tuple[int, ...], Sampling]] = [
    ((5, 6, 7, 8, 9, 10, 11), Sampling()),
    ((5, 6, 7, 40), Sampling()),
    ((60, 61, 60, 61, 60), Sampling(repetition_penalty=1.4)),
    ((8,), Sampling(do_sample=True, temperature=0.8, top_k=20)),
    ((5, 6, 7, 8, 9, 50), Sampling(do_sample=True, repetition_penalty=1.3)),
]


@cache
def plain_text(family: str, story: int) -> list[int]:
    """What the plain loop says after a story's beginning, with the noise of its seed where it is sampled."""
    (prompt, sampling), plain = STORIES[story], tiny(family)
    if not sampling.do_sample:
        return reference.greedy_text(plain, prompt, 2 * LONGEST, sampling)
    stream = torch.tensor([noise.stream_of(SEED, 0)])

    def drawn(position: int) -> np.ndarray:
        return noise.gumbel(stream, torch.tensor([[position]]), noise.TARGET, VOCAB)[0, 0].double().numpy()

    return reference.coupled_text(plain, prompt, 2 * LONGEST, sampling, drawn)


class Life(RuleBasedStateMachine):
    """An engine for each plan; all are asked for the same completions, and are stepped and interrupted alike.

    A step's cost is drawn at random and the engines of a model learn costs together, so that `auto` tries everything.
    Rejection sampling has no plain loop to equal (`test_distribution`): where a plan uses it, sampled rows are there
    for the company.
    """

    family: str
    model: PreTrainedModel
    plans: Sequence[str]
    compared: set[str]

    asked: Bundle[int] = Bundle("asked")

    @initialize(
        rows=st.integers(1, 3), chunk=st.sampled_from([1, 3, 512]), free=st.integers(1, 2), seed=st.integers(0, 99)
    )
    def begin(self, rows: int, chunk: int, free: int, seed: int) -> None:
        begin_anew(self.model)
        self.chance, self.now = random.Random(seed), 0.0
        longest = max(len(prompt) for prompt, _ in STORIES) + LONGEST
        self.engines: dict[str, Engine] = {}
        for name in self.plans:
            chosen = steps.parse(name)
            room = Engine.room(longest, LONGEST, chosen.scratch(BLOCK))
            self.engines[name] = Engine(
                self.model,
                rows=rows,
                capacity=room,
                plan=chosen,
                prefill_chunk=chunk,
                admit_free=free,
                clock=self.tick,
            )
        self.written: dict[str, dict[int, Row]] = {name: {} for name in self.plans}
        self.expected: dict[int, list[int]] = {}
        self.aborted: dict[str, set[int]] = {name: set() for name in self.plans}

    def tick(self) -> float:
        self.now += self.chance.random()
        return self.now

    @rule(
        target=asked,
        story=st.integers(0, len(STORIES) - 1),
        told=st.integers(0, LONGEST),
        count=st.integers(1, LONGEST),
        ending=st.none() | st.integers(0, LONGEST - 1),
    )
    def add(self, story: int, told: int, count: int, ending: int | None) -> int:
        """Ask for a story from its beginning or, as in a conversation, from somewhere in its middle."""
        (prompt, sampling), whole = STORIES[story], plain_text(self.family, story)
        text = whole[told : told + count]
        eos = () if ending is None else (text[ending % count],)
        options = Options(max_new_tokens=count, eos_token_id=eos, sampling=sampling, seed=SEED)
        ids = {engine.add([*prompt, *whole[:told]], options) for engine in self.engines.values()}
        assert ids == {len(self.expected)}
        self.expected[ids.pop()] = text[: text.index(eos[0]) + 1] if eos else text
        return len(self.expected) - 1

    @rule(times=st.integers(1, 3))
    def step(self, times: int) -> None:
        for name, engine in self.engines.items():
            for _ in range(times):
                for progress in engine.step():
                    row = self.written[name][progress.row.id] = progress.row
                    assert row.token_ids[-len(progress.token_ids) :] == progress.token_ids
                    assert 0 <= progress.accepted <= len(progress.token_ids)

    @rule(id=consumes(asked))
    def abort(self, id: int) -> None:
        for name, engine in self.engines.items():
            if engine.abort(id):
                self.aborted[name].add(id)
            else:
                assert self.written[name][id].finish_reason in ("stop", "length")

    def teardown(self) -> None:
        while any(engine.busy for engine in self.engines.values()):
            self.step(1)
        for name, engine in self.engines.items():
            assert engine.live == []
            for id, text in self.expected.items():
                row = self.written[name].get(id)
                written = [] if row is None else row.token_ids
                if row is not None and row.options.sampling.do_sample and name in REJECTING:
                    continue
                self.compared.add(name)
                if id in self.aborted[name]:
                    assert written == text[: len(written)], name
                else:
                    assert row is not None
                    assert written == text, name
                    assert row.stats.emitted == len(text)


def live(family: str, model: PreTrainedModel, plans: Sequence[str], *, lives: int, events: int) -> set[str]:
    """Run random lives of one model, whose family is part of the schedules' seed.

    Every life ends in a comparison of all texts (`Life.teardown`); returns the plans that had any to compare.
    """
    compared: set[str] = set()
    machine = type(f"{family}Life", (Life,), {"family": family, "model": model, "plans": plans, "compared": compared})
    run_state_machine_as_test(machine, settings=settings(max_examples=lives, stateful_step_count=events))
    return compared


@pytest.mark.parametrize("family", FAMILIES)
def test_random_schedules_equal_the_plain_loop(family: str) -> None:
    """Greedy, penalised and (where the noise is shared) sampled texts are the plain loop's in float32, for each kind of
    plan and every family.
    """
    assert live(family, dual(family), KINDS, lives=3, events=15) == set(KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_long_random_schedules_equal_the_plain_loop(family: str) -> None:
    """The same for more plans and longer lives."""
    assert live(family, dual(family), PLANS, lives=8, events=30) == set(PLANS)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_random_schedules_of_compiled_passes_equal_the_plain_loop(family: str) -> None:
    """The same for passes that torch.compile traced, run as traced: `orthrus bench` looks at what inductor makes."""
    torch._dynamo.reset()
    model = dual(family)
    compile_passes(model, backend="eager")
    assert live(family, model, KINDS, lives=2, events=15) == set(KINDS)


# ---------------------------------------------------------------- nothing stays behind


def test_thousands_of_admissions_leave_nothing_behind() -> None:
    """Of 3,000 rows admitted most are aborted, and hundreds of others while they wait; no row, key, length or object
    stays, and no buffer grows: less than one entry more is held for every five rows, measured costs among them.
    """
    chance = random.Random(0)
    model = dual(num_hidden_layers=1)
    chosen, stories = steps.parse("auto"), [(list(prompt), sampling) for prompt, sampling in STORIES[:3]]
    room = Engine.room(max(len(prompt) for prompt, _ in stories), 5, chosen.scratch(BLOCK))
    engine = Engine(model, rows=16, capacity=room, plan=chosen, clock=lambda: chance.random())
    options = {sampling: Options(max_new_tokens=5, sampling=sampling) for _, sampling in stories}
    aborted = {"live": 0, "waiting": 0}

    def live_through(admissions: int) -> tuple[int, int]:
        admitted: set[int] = set()
        while len(admitted) < admissions:
            for prompt, sampling in chance.choices(stories, k=16 + 2 - len(engine.live)):
                engine.add(prompt, options[sampling])
            admitted |= {progress.row.id for progress in engine.step()}
            for state, rows in (("live", list(engine.live)), ("waiting", list(engine.waiting))):
                for row in rows:
                    aborted[state] += chance.random() < 0.8 and engine.abort(row.id)
        while engine.busy:
            engine.step()
        del admitted
        gc.collect()
        return sum(1 for _ in held(engine)), len(gc.get_objects())

    before, objects = live_through(1000)
    nbytes = engine.cache.nbytes
    after, objects_after = live_through(3000)
    assert (aborted["live"] > 1500, aborted["waiting"] > 300) == (True, True)
    assert after < before + 600
    assert objects_after <= objects + 100
    assert engine.cache.nbytes == nbytes
    assert (engine.live, engine.rows.reading, list(engine.waiting)) == ([], [], [])
    assert max(engine.rows._prefixes.lengths) <= engine.capacity
