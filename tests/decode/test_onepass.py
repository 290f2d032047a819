"""One pass that verifies and drafts: it equals the separate passes, and whatever it drafts ahead, the text is AR's."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from orthrus.decode import cycle as cycles
from orthrus.decode import tree
from orthrus.decode.cycle import likely_stops
from orthrus.decode.engine import Engine
from orthrus.decode.frames import Reading
from orthrus.decode.options import Options, Sampling
from orthrus.decode.passes import Logits, Passes
from orthrus.decode.rows import Row
from orthrus.decode.tree import Tree, likely_ends
from orthrus.errors import CacheFull
from orthrus.model.cache import ScratchCache
from orthrus.policy import steps
from orthrus.policy.acceptance import RowState
from orthrus.policy.steps import Step
from tests import families, reference
from tests.decode.drive import BLOCK, Double, decode, dual, finish, scripted
from tests.families import VOCAB, tiny

FAMILIES: dict[str, dict[str, object]] = {
    **{family: {} for family in families.FAMILIES},
    **families.WINDOWED,
    "gemma3_text": {"sliding_window": 3},
}
"""Windows, where a family knows any, are shorter than the texts, one of them than a block."""

LENGTHS = [11, 3, 17]
"""Positions of each row with keys."""

ROWS = slice(0, 3)


@cache
def model_of(family: str) -> PreTrainedModel:
    return dual(family, **FAMILIES[family])


def random_tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def prefilled(model: PreTrainedModel, texts: list[list[int]], *, room: int) -> Passes:
    cache = ScratchCache(rows=len(texts), capacity=max(map(len, texts)) + room)
    passes = Passes(model, cache)
    passes.prefill(slice(0, len(texts)), texts, chunk=512)
    return passes


# ---------------------------------------------------------------- fused equals unfused


@torch.inference_mode()
def test_stops_do_not_see_one_another() -> None:
    """A block drafted for one stop alone, or beside others, or for two rows in one order and another: the same."""
    model, drafts = model_of("gemma3_text"), 3
    texts = [random_tokens(row, length).tolist() for row, length in enumerate(LENGTHS)]
    token_BQ = random_tokens(9, 3, drafts + 1)
    passes = prefilled(model, texts, room=Step(drafts, stops=4).scratch)
    reading = Reading(token_BQ=token_BQ, stop_BS=torch.arange(4).expand(3, 4), drafts=drafts)
    all_four = passes.run(ROWS, reading).ahead_BSMV
    for stop in range(4):
        alone = passes.run(ROWS, replace(reading, stop_BS=torch.full((3, 1), stop))).ahead_BSMV
        torch.testing.assert_close(alone[:, 0], all_four[:, stop], rtol=1e-5, atol=1e-5)


def test_likely_stops_are_those_of_a_chain_of_independent_drafts() -> None:
    """The chance to stop after a drafts is that of a good ones and then a bad one; the bonus follows a whole block."""
    sure, doubtful = [0.9, 0.9, 0.9], [0.2, 0.9, 0.5]
    confidence = torch.tensor([sure, doubtful])
    # 0.1, 0.09, 0.081, 0.729 and 0.8, 0.02, 0.09, 0.09 (the last two a tie)
    assert likely_stops(confidence, 2).tolist()[0] == [3, 0]
    assert likely_stops(confidence, 1).tolist()[1] == [0]
    assert sorted(likely_stops(confidence, 9)[0].tolist()) == [0, 1, 2, 3]


# ---------------------------------------------------------------- texts and counts

PROMPTS = [[5, 6, 7], [8], [30, 31, 32, 33, 34, 35], [9, 10, 11, 12, 13]]
COUNTS = [23, 7, 16, 1]
MODEL = dual()
TEXTS = {tuple(p): reference.greedy_text(tiny("qwen3"), p, 24) for p in PROMPTS}

Right = Callable[[Row, int], bool]
Stops = Callable[[Tensor, int], Tensor]


class Ahead(Double):
    """A double that also says what fused passes draft ahead, and notes which stops they were asked for.

    After a node off the text it knows nothing.
    """

    asked: list[list[list[int]]]

    def serve(self, engine: Engine) -> Engine:
        self.engine, self.asked = engine, []
        real = engine.passes.run

        def run(rows: slice, reading: Reading) -> Logits:
            logits = real(rows, reading)
            if reading.stop_BS is None:
                return logits
            self.asked.append(reading.stop_BS.tolist())
            for b, row in enumerate(engine.live[rows]):
                start = len(row.token_ids)
                for s, stop in enumerate(reading.stop_BS[b].tolist()):
                    ahead_MV = logits.ahead_BSMV[b, s]
                    if reading.ancestor_BQQ is None:
                        ahead_MV[:] = self.beliefs(row, start + stop + 1, reading.drafts)
                        continue
                    path = reading.token_BQ[b, reading.ancestor_BQQ[b, stop]].tolist()[1:]
                    known = self.texts[tuple(row.prompt_ids)][start : start + len(path)] == path
                    ahead_MV[:] = self.beliefs(row, start + len(path) + 1, reading.drafts) if known else 0.0
            return logits

        engine.passes.run = run  # type: ignore[method-assign]
        return engine

    def beliefs(self, row: Row, start: int, drafts: int) -> Tensor:
        text = self.texts[tuple(row.prompt_ids)]
        logits = torch.zeros(drafts, VOCAB)
        for j, place in enumerate(range(start, start + drafts)):
            token = text[place] if place < len(text) else 0
            logits[j, token if self.right(row, place) else (token + 1) % VOCAB] = 1.0
        return logits


class SecondBest(Ahead):
    """Takes another token to be a little likelier than the right one, so that only trees hold the text."""

    def propose(self, passes: Passes, rows: slice, anchor_B: Tensor, drafts: int, states: Sequence[Any]) -> Tensor:
        assert self.engine is not None
        return torch.stack([self.beliefs(row, len(row.token_ids), drafts) for row in self.engine.live[rows]])

    def beliefs(self, row: Row, start: int, drafts: int) -> Tensor:
        right = super().beliefs(row, start, drafts)
        return 7.0 * right + 7.5 * right.roll(1, dims=1)


def coin(row: Row, place: int) -> bool:
    """Fall heads two times in three, always the same way for the same row and place."""
    return hash((row.prompt_ids[0], place)) % 3 != 0


DOUBLES: dict[str, Right] = {
    "always right": lambda *_: True,
    "never right": lambda *_: False,
    "right by a coin": coin,
}


def at_random(confidence_BM: Tensor, stops: int) -> Tensor:
    """Any stops, one of them twice even."""
    B, M = confidence_BM.shape
    return torch.randint(M + 1, (B, min(stops, M + 1)))


def the_unlikeliest(confidence_BM: Tensor, stops: int) -> Tensor:
    """Where everything is in doubt, or nothing is, these are all wrong."""
    M = confidence_BM.shape[1]
    return likely_stops(confidence_BM, M + 1)[:, M + 1 - min(stops, M + 1) :]


STOPS: dict[str, Stops] = {"likeliest": likely_stops, "random": at_random, "unlikeliest": the_unlikeliest}


def nodes_at_random(grown: Tree, stops: int) -> Tensor:
    """Any nodes, one of them twice even."""
    return at_random(grown.likely_BN, stops)


def the_unlikeliest_nodes(grown: Tree, stops: int) -> Tensor:
    """Where the backbone leaves the tree least often."""
    return likely_ends(grown, 1 << 20)[:, -stops:]


NODES = {"likeliest": likely_ends, "random": nodes_at_random, "unlikeliest": the_unlikeliest_nodes}


def choose_by(patch: pytest.MonkeyPatch, choice: str) -> None:
    """Draft ahead for other places than the likeliest."""
    places, nodes = STOPS[choice], NODES[choice]
    patch.setattr(cycles, "likely_stops", places)
    patch.setattr(tree, "likely_ends", nodes)


@pytest.mark.parametrize("choice", STOPS)
@pytest.mark.parametrize("double", DOUBLES)
def test_stops_and_drafts_never_show_in_the_text(double: str, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four prompts over three rows, which join and leave: AR's text for one, two and all stops, of chains and trees."""
    torch.manual_seed(0)
    choose_by(monkeypatch, choice)
    for name in ("onepass:1", "onepass:2", "onepass", "onepass:3:12", "onepass:all:5"):
        ahead = Ahead(TEXTS, DOUBLES[double])
        engine = ahead.serve(Engine(MODEL, rows=3, capacity=110, plan=steps.parse(name), drafter=ahead))
        for row in decode(engine, PROMPTS, [Options(max_new_tokens=count) for count in COUNTS]):
            assert row.token_ids == TEXTS[tuple(row.prompt_ids)][: row.options.max_new_tokens]
            assert row.stats.emitted == row.options.max_new_tokens
            cycles = row.stats.cycles  # none behind a prompt's own token
            assert min(cycles, 1) + cycles < row.stats.forwards <= 1 + 2 * cycles


@pytest.mark.parametrize("choice", STOPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_view_s_own_drafts_never_show_in_the_text(
    family: str, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real draft logits from real fused passes, ragged rows, windows shorter than the texts."""
    torch.manual_seed(0)
    choose_by(monkeypatch, choice)
    for name in ("onepass:1", "onepass", "onepass:2:12"):
        engine = Engine(model_of(family), rows=2, capacity=110, plan=steps.parse(name))
        rows = decode(engine, PROMPTS[:3], Options(max_new_tokens=12))
        assert [row.token_ids for row in rows] == greedy_texts(family)


@cache
def greedy_texts(family: str) -> list[list[int]]:
    return [reference.greedy_text(tiny(family, **FAMILIES[family]), p, 12) for p in PROMPTS[:3]]


def expected_forwards(length: int, right: Callable[[int], bool], hit: Callable[[int], bool]) -> int:
    """Count by hand: a prefill, which gives a token; a pass each cycle, and one more where none before has drafted."""
    forwards, done, ready = 1, 1, False
    while done < length:
        forwards += 1 if ready else 2
        accepted = 0
        while accepted < BLOCK - 1 and right(done + accepted):
            accepted += 1
        done, ready = done + accepted + 1, hit(accepted)
    return forwards


@pytest.mark.parametrize(
    ("double", "name", "hit"),
    [
        ("always right", "onepass", lambda accepted: True),
        ("never right", "onepass", lambda accepted: True),
        ("right by a coin", "onepass", lambda accepted: True),
        # Beliefs of a double are faint (1.0 against 95 zeros), so the likeliest stops are the first ones.
        ("always right", "onepass:1", lambda accepted: accepted == 0),
        ("never right", "onepass:1", lambda accepted: accepted == 0),
        ("right by a coin", "onepass:2", lambda accepted: accepted <= 1),
        ("right by a coin", "onepass:7", lambda accepted: accepted <= 6),
        # So faint that nothing of a tree goes deeper than one token (all there are of each slot are as likely), and
        # the one believed in comes first.
        ("never right", "onepass:all:7", lambda accepted: True),
    ],
)
def test_forwards_are_counted(double: str, name: str, hit: Callable[[int], bool]) -> None:
    """One pass where the pass before has drafted for the very stop, two elsewhere; all else as for chains."""
    right = DOUBLES[double]
    for prompt in PROMPTS[:3]:
        ahead = Ahead(TEXTS, right)
        engine = ahead.serve(Engine(MODEL, rows=1, capacity=110, plan=steps.parse(name), drafter=ahead))
        row = decode(engine, [prompt], Options(max_new_tokens=23))[0]
        at = lambda place, row=row: right(row, place)  # noqa: E731
        trace = reference.trace(22, BLOCK - 1, lambda place, at=at: at(place + 1))
        assert row.stats.forwards == expected_forwards(23, at, hit)
        assert (row.stats.cycles, row.stats.accepted, row.stats.emitted) == (trace.cycles, trace.accepted, 23)
        assert row.stats.accepted_at_position == trace.accepted_at
        assert row.stats.plain_steps == 0


def test_a_tree_goes_on_from_the_node_it_stopped_at() -> None:
    """A double whose second best is right: as many drafts kept as by trees that draft anew in every cycle.

    Siblings have places of their own, so a block of another node at the same depth would not do.
    """
    stats = []
    for name in ("tree:12", "onepass:all:12"):
        double = SecondBest(TEXTS, DOUBLES["always right"])
        engine = double.serve(Engine(MODEL, rows=1, capacity=160, plan=steps.parse(name), drafter=double))
        row = decode(engine, PROMPTS[:1], Options(max_new_tokens=24))[0]
        assert row.token_ids == TEXTS[tuple(PROMPTS[0])][:24]
        stats.append(row.stats)
    apart, fused = stats
    assert apart.accepted_at_position == fused.accepted_at_position
    assert apart.accepted_at_position[1] > 0
    assert (apart.forwards, fused.forwards) == (1 + 2 * apart.cycles, 2 + apart.cycles)


@pytest.mark.parametrize("double", DOUBLES)
def test_only_drafts_made_for_the_very_stop_are_used(double: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops 5, 2 and 7 in this order, whatever was likely: after any other the next cycle drafts."""
    monkeypatch.setattr(cycles, "likely_stops", lambda confidence, _: torch.tensor([[5, 2, 7]] * len(confidence)))
    right = DOUBLES[double]
    ahead = Ahead(TEXTS, right)
    engine = ahead.serve(Engine(MODEL, rows=1, capacity=110, plan=steps.parse("onepass:3"), drafter=ahead))
    for prompt in PROMPTS[:3]:
        row = decode(engine, [prompt], Options(max_new_tokens=24))[0]
        at = lambda place, row=row: right(row, place)  # noqa: E731
        trace = reference.trace(23, BLOCK - 1, lambda place, at=at: at(place + 1))
        assert row.stats.forwards == expected_forwards(24, at, lambda accepted: accepted in (5, 2, 7))
        assert row.stats.accepted_at_position == trace.accepted_at


def test_a_trace_counted_by_hand() -> None:
    """25 tokens in blocks of 8 from an oracle: a prefill, a draft, three fused passes; 25 tokens for 5 forwards."""
    ahead = Ahead(TEXTS, DOUBLES["always right"])
    engine = ahead.serve(Engine(MODEL, rows=1, capacity=110, plan=steps.parse("onepass"), drafter=ahead))
    stats = decode(engine, PROMPTS[:1], Options(max_new_tokens=25))[0].stats
    assert (stats.forwards, stats.cycles, stats.drafted, stats.accepted) == (5, 3, 21, 21)
    assert stats.tokens_per_forward == 25 / 5


def test_chains_use_what_was_drafted_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused cycle, a chain that needs no draft pass, a fused cycle that does: 2, 1 and 2 passes after the prefill.

    The policy is told what is there, a shorter block is a beginning of a longer one, and the text is AR's.
    """
    ahead = Ahead(TEXTS, DOUBLES["always right"])
    engine = ahead.serve(Engine(MODEL, rows=1, capacity=200, plan=steps.parse("auto"), drafter=ahead))
    wanted = iter([Step(BLOCK - 1, stops=BLOCK), Step(3), Step(BLOCK - 1, stops=BLOCK)])
    told: list[tuple[int, bool]] = []

    def choose(rows: list[RowState]) -> Step:
        told.append((rows[0].ready, rows[0].blind))
        return next(wanted)

    scripted(engine, choose)
    row = decode(engine, PROMPTS[:1], Options(max_new_tokens=20))[0]
    assert row.token_ids == TEXTS[tuple(PROMPTS[0])][:20]
    assert told == [(0, False), (BLOCK - 1, True), (0, False)]
    assert (row.stats.cycles, row.stats.forwards) == (3, 1 + 2 + 1 + 2)


def test_rows_beside_one_that_missed_take_no_draft_pass_with_it() -> None:
    """One row always right, one never, only stop 0 drafted for: the first takes two passes, and what it draws alone."""
    ahead = Ahead(TEXTS, lambda row, _: row.prompt_ids == PROMPTS[0])
    engine = ahead.serve(Engine(MODEL, rows=2, capacity=110, plan=steps.parse("onepass:1"), drafter=ahead))
    right, wrong = decode(engine, PROMPTS[:2], [Options(max_new_tokens=16), Options(max_new_tokens=7)])
    assert (right.stats.cycles, right.stats.forwards) == (2, 1 + 2 + 2)
    assert (wrong.stats.cycles, wrong.stats.forwards) == (6, 1 + 2 + 5)


def test_fixed_shapes_leave_one_pass_to_a_cycle() -> None:
    """`exact="token"` fuses passes where the probe allows it, that of the prompt and its first drafts too.

    A tree's path would be verified once more, so the chain takes its place.
    """
    for name in ("onepass", "onepass:all:12"):
        engine = Engine(MODEL, rows=1, capacity=160, plan=steps.parse(name), exact="token")
        row = decode(engine, PROMPTS[:1], Options(max_new_tokens=12))[0]
        assert row.token_ids == TEXTS[tuple(PROMPTS[0])][:12]
        assert row.stats.forwards == 1 + row.stats.cycles


# ---------------------------------------------------------------- room


@pytest.mark.parametrize("name", ["onepass:1", "onepass:2", "onepass", "onepass:2:12", "onepass:all:5"])
def test_a_completion_may_fill_its_row_exactly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `Engine.add` accepts never runs out of cache, drafters right, wrong or both; one position less is refused.

    And no pass writes more than `Step.scratch` rows past a row's length, nor does the cache grow by a byte.
    """
    scratch = steps.parse(name).steps(BLOCK)[0].scratch
    capacity = Engine.room(3, 20, scratch)
    small = Engine(MODEL, rows=1, capacity=capacity - 1, plan=steps.parse(name))
    with pytest.raises(CacheFull, match=f"need {capacity} cache positions, a row has {capacity - 1}"):
        small.add(PROMPTS[0], Options(max_new_tokens=20))
    for double in DOUBLES.values():
        ahead = Ahead(TEXTS, double)
        engine = ahead.serve(Engine(MODEL, rows=2, capacity=capacity, plan=steps.parse(name), drafter=ahead))
        widths: list[int] = []
        real = engine.cache.begin

        def spy(
            rows: slice,
            slot_BQ: Tensor,
            *,
            end: int,
            start: int | None = None,
            position_BQ: Tensor | None = None,
            engine: Engine = engine,
            widths: list[int] = widths,
            real: Callable[..., None] = real,
            **more: Any,
        ) -> None:
            lengths = torch.tensor(engine.cache.lengths[rows])
            widths.append(int((slot_BQ - lengths[:, None]).max()) + 1)
            assert end <= max(engine.cache.lengths[rows]) + scratch
            real(rows, slot_BQ, end=end, start=start, position_BQ=position_BQ, **more)

        monkeypatch.setattr(engine.cache, "begin", spy)
        rows = decode(engine, [PROMPTS[0], PROMPTS[1], PROMPTS[0]], Options(max_new_tokens=20))
        assert [row.token_ids for row in rows] == [TEXTS[tuple(p)][:20] for p in (PROMPTS[0], PROMPTS[1], PROMPTS[0])]
        assert max(widths) == scratch - (name.count(":") == 2)  # a tree behind a first token would write one more
        plain = Engine(MODEL, rows=2, capacity=capacity, plan=steps.parse("ar"))
        decode(plain, PROMPTS[:1], Options(max_new_tokens=2))
        assert engine.cache.nbytes == plain.cache.nbytes


@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_may_run_past_the_end_of_the_context(family: str) -> None:
    """A model of 16 positions writes what fits, whatever was drafted beyond."""
    shape = {**FAMILIES[family], "max_position_embeddings": 16}
    engine = Engine(
        dual(family, **shape),
        rows=2,
        capacity=16 + Step(BLOCK - 1, stops=BLOCK).scratch,
        plan=steps.parse("onepass"),
    )
    prompts = [PROMPTS[0], PROMPTS[2]]
    rows = decode(engine, prompts, Options(max_new_tokens=24))
    assert [row.token_ids for row in rows] == [
        reference.greedy_text(tiny(family, **shape), prompt, 16 - len(prompt)) for prompt in prompts
    ]
    assert {row.finish_reason for row in rows} == {"length"}


def test_what_was_drafted_ahead_dies_with_its_row() -> None:
    """Rows end, are aborted and make room at random: a row's next cycle never meets another's drafts.

    The doubles are always right, so a single draft of another row would show in what is accepted.
    """
    chance = random.Random(0)
    ahead = Ahead(TEXTS, DOUBLES["always right"])
    engine = ahead.serve(Engine(MODEL, rows=3, capacity=110, plan=steps.parse("onepass"), drafter=ahead))
    prompt_of = {
        engine.add(p := chance.choice(PROMPTS), Options(max_new_tokens=chance.randint(1, 24))): p for _ in range(40)
    }
    while engine.busy:
        for progress in engine.step():
            row = progress.row
            assert row.token_ids == TEXTS[tuple(prompt_of[row.id])][: len(row.token_ids)]
            assert len(progress.token_ids) in (1, BLOCK) or row.finish_reason is not None
        if chance.random() < 0.3 and engine.live:
            engine.abort(chance.choice(engine.live).id)
    assert (engine.live, engine.rows.reading) == ([], [])
    assert finish(engine) == {}


def test_a_sampled_row_s_text_is_its_own() -> None:
    """Whether its neighbours' drafts were ready or not, and whoever they are: it is what plain sampling draws."""
    sampled = Options(max_new_tokens=16, sampling=Sampling(do_sample=True, temperature=0.8), seed=5)

    def texts(name: str, rows: int) -> list[list[int]]:
        engine = Engine(MODEL, rows=rows, capacity=110, plan=steps.parse(name))
        return [row.token_ids for row in decode(engine, PROMPTS, sampled)]

    plain = texts("ar", 1)
    for name in ("onepass:2", "tree:12", "onepass:2:12", "auto"):
        assert texts(name, 1) == texts(name, 2) == texts(name, 4) == plain
