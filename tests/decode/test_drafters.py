"""Who drafts never shows in the text, and what the drafts were worth shows in the statistics, to the last count."""

import copy
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from orthrus.checkpoints import drafters
from orthrus.decode.drafters import TreeDrafter, ViewDrafter
from orthrus.decode.engine import Engine
from orthrus.decode.options import Options
from orthrus.decode.output import Stats
from orthrus.decode.passes import Passes, Proposal
from orthrus.decode.rows import Row
from orthrus.decode.tree import Tree, ancestors
from orthrus.errors import ConfigError
from orthrus.model.attach import attach, detach
from orthrus.model.attachment import attachment_of
from orthrus.model.cache import ScratchCache
from orthrus.model.config import OrthrusConfig
from orthrus.model.graphs import compile_passes
from orthrus.model.markov import markov_of
from orthrus.policy import steps
from orthrus.policy.steps import Step
from tests import reference
from tests.decode.drive import BLOCK, Double, configure, decode, dual, engine_of, engine_with, scripted
from tests.families import perturb, tiny

PROMPTS = [[5, 6, 7], [8], [30, 31, 32, 33, 34, 35], [9, 10, 11, 12, 13]]
COUNTS = [23, 7, 16, 1]
MODEL = dual()
TEXTS = {tuple(p): reference.greedy_text(tiny("qwen3"), p, 24) for p in PROMPTS}
OPTIONS = [Options(max_new_tokens=count) for count in COUNTS]


def coin(row: Row, place: int) -> bool:
    """Fall heads two times in three, always the same way for the same row and place."""
    return hash((row.prompt_ids[0], place)) % 3 != 0


Right = Callable[[Row, int], bool]
DOUBLES: dict[str, Right] = {
    "always right": lambda *_: True,
    "never right": lambda *_: False,
    "right by a coin": coin,
    "right at even places": lambda _, place: place % 2 == 0,
}


@pytest.mark.parametrize("block", [2, 4, BLOCK])
@pytest.mark.parametrize("double", DOUBLES)
def test_doubles_leave_the_text_and_count_exactly(double: str, block: int) -> None:
    """Greedy text over three rows and four prompts is the backbone's; every statistic equals the plain trace."""
    engine = engine_with(Double(TEXTS, DOUBLES[double]), MODEL, block=block)
    for row in decode(engine, PROMPTS, OPTIONS):
        text = TEXTS[tuple(row.prompt_ids)][: row.options.max_new_tokens]
        assert row.token_ids == text
        # The prompt's own pass has written the first token.
        expected = reference.trace(len(text) - 1, block - 1, lambda place, row=row: DOUBLES[double](row, place + 1))
        assert row.stats.cycles == expected.cycles
        assert row.stats.plain_steps == 0
        assert row.stats.forwards == 1 + 2 * expected.cycles
        assert row.stats.drafted == expected.cycles * (block - 1)
        assert row.stats.accepted == expected.accepted
        assert row.stats.emitted == len(text)
        assert row.stats.proposed_per_position == expected.proposed_at
        assert row.stats.accepted_at_position == expected.accepted_at


def test_an_oracle_reaches_the_method_s_best() -> None:
    """K tokens per two passes: behind the prompt's own token 24 in 3 cycles of 8."""
    engine = engine_with(Double(TEXTS, DOUBLES["always right"]), MODEL, block=BLOCK)
    stats = decode(engine, PROMPTS[:1], Options(max_new_tokens=25))[0].stats
    assert stats.to_dict() == {
        "cycles": 3,
        "forwards": 7,
        "plain_steps": 0,
        "first_tokens": 0,
        "drafted": 21,
        "accepted": 21,
        "emitted": 25,
        "tokens_per_forward": 25 / 7,
        "acceptance_length": 7.0,
        "tokens_per_cycle": 8.0,
        "accepted_per_position": [1.0] * 7,
    }


def test_plain_decoding_counts_plain_steps() -> None:
    """One pass per token, the prompt's among them; no drafter is ever asked."""

    class Nobody(ViewDrafter):
        def propose(self, *_: object) -> Tensor:
            raise AssertionError("plain decoding drafts nothing")

    stats = decode(engine_of(MODEL, block=1, drafter=Nobody()), PROMPTS[:1], Options(max_new_tokens=9))[0].stats
    assert (stats.cycles, stats.plain_steps, stats.forwards, stats.emitted) == (0, 8, 9, 9)
    assert stats.tokens_per_forward == 1.0
    assert stats.accepted_per_position == []


def test_drafts_beyond_the_end_of_the_text_do_not_count() -> None:
    """An end token among good drafts: those up to it were accepted, neither the rest nor a bonus was.

    The text ends with its fifth token. Blocks of 8, oracle: one cycle, 7 drafts right, 4 of them emitted.
    """
    text = TEXTS[tuple(PROMPTS[0])]
    assert text.index(text[4]) == 4
    engine = engine_with(Double(TEXTS, DOUBLES["always right"]), MODEL, block=BLOCK)
    row = decode(engine, PROMPTS[:1], Options(max_new_tokens=24, eos_token_id=(text[4],)))[0]
    assert row.token_ids == text[:5]
    assert (row.stats.cycles, row.stats.drafted, row.stats.accepted, row.stats.emitted) == (1, 7, 4, 5)
    assert row.stats.accepted_per_position == [1.0] * 4 + [0.0] * 3


def test_an_end_token_as_bonus_counts_as_bonus() -> None:
    """Never right: each token is a bonus, the end token too, so nothing was accepted."""
    text = TEXTS[tuple(PROMPTS[0])]
    engine = engine_with(Double(TEXTS, DOUBLES["never right"]), MODEL, block=4)
    row = decode(engine, PROMPTS[:1], Options(max_new_tokens=24, eos_token_id=(text[4],)))[0]
    assert (row.stats.cycles, row.stats.accepted, row.stats.emitted) == (4, 0, 5)


def test_progress_tells_drafts_from_bonus() -> None:
    """Each step reports its tokens, the accepted drafts first, and how many these are; the prompt's token is alone."""
    engine = engine_with(Double(TEXTS, lambda _, place: place % 4 < 2), MODEL, block=4)
    engine.add(PROMPTS[0], Options(max_new_tokens=8))
    steps = []
    while engine.busy:
        steps += [(p.token_ids, p.accepted) for p in engine.step()]
    # Place 0 is the prompt's, 1 is drafted rightly, 2 is corrected; then 3 is; 4 and 5 are right, 6 is corrected.
    text = TEXTS[tuple(PROMPTS[0])]
    assert steps == [(text[:1], 0), (text[1:3], 1), (text[3:4], 0), (text[4:7], 2), (text[7:8], 0)]


# ---------------------------------------------------------------- other people's


class Oracle(Double):
    """Another drafter than the view: it has a name of its own and brings no correction."""

    name = "oracle"

    def propose(self, *given: Any) -> Tensor:
        return 30 * super().propose(*given)


def with_a_bias() -> PreTrainedModel:
    """A model whose view's correction makes one token all but certain after any other."""
    model = attach(tiny("qwen3"), OrthrusConfig(block_size=BLOCK, markov_rank=2), attn_implementation="orthrus")
    correction = markov_of(model)
    assert correction is not None
    with torch.no_grad():
        correction.before_VR.fill_(10.0)
        correction.after_VR.zero_()
        correction.after_VR[90] = 10.0
    return model


@pytest.mark.parametrize("plan", ["full", "fixed:4", "tree:12"])
def test_the_view_s_correction_is_the_view_s_alone(plan: str) -> None:
    """An oracle's drafts are all kept, whatever the model's own view adds to its logits."""
    oracle = Oracle(TEXTS, DOUBLES["always right"])
    oracle.engine = Engine(with_a_bias(), rows=2, capacity=96, plan=steps.parse(plan), drafter=oracle)
    for row in oracle.engine.finish(PROMPTS[:2], Options(max_new_tokens=16)):
        assert row.token_ids == TEXTS[tuple(row.prompt_ids)][:16]
        assert row.stats.cycles == {"full": 2, "fixed:4": 4, "tree:12": 2}[plan]  # for 15 tokens


def test_passes_of_another_drafter_count_under_its_name() -> None:
    """Not as passes of the backbone, which are one per cycle and the prefill; sums keep them apart as well."""
    oracle = Oracle(TEXTS, DOUBLES["always right"])
    rows = decode(engine_with(oracle, MODEL, block=BLOCK), PROMPTS[:2], Options(max_new_tokens=16))
    assert [row.stats.forwards for row in rows] == [1 + 2, 1 + 2]  # for 1 token and 15
    assert [row.stats.draft_passes for row in rows] == [{"oracle": 2}, {"oracle": 2}]
    assert Stats.total(row.stats for row in rows).to_dict()["draft_passes"] == {"oracle": 4}
    own = decode(engine_with(Double(TEXTS, DOUBLES["always right"]), MODEL, block=BLOCK), PROMPTS[:1], OPTIONS[:1])
    assert "draft_passes" not in own[0].stats.to_dict()


class InTurn(Oracle):
    """A drafter that takes a pass for each token, and proposes four at most."""

    name = "in turn"
    proposals = 4

    def propose(self, *given: Any) -> Proposal:  # type: ignore[override]
        logits_BMV = super().propose(*given)
        return Proposal(logits_BMV, passes=logits_BMV.shape[1])


def test_a_drafter_has_a_block_of_its_own_and_says_what_its_drafts_took() -> None:
    """Five tokens a cycle for one pass of the backbone and four of its own; longer blocks are refused."""
    drafter = InTurn(TEXTS, DOUBLES["always right"])
    engine = drafter.engine = Engine(MODEL, rows=2, capacity=96, plan=steps.parse("full"), drafter=drafter)
    for row in engine.finish(PROMPTS[:2], Options(max_new_tokens=15)):
        assert row.token_ids == TEXTS[tuple(row.prompt_ids)][:15]
        assert (row.stats.cycles, row.stats.forwards, row.stats.draft_passes) == (3, 1 + 3, {"in turn": 3 * 4})
    with pytest.raises(ConfigError, match="blocks of 8, this view was trained for at most 5"):
        Engine(MODEL, rows=1, capacity=96, plan=steps.parse("fixed:8"), drafter=drafter)


class Forester(Oracle, TreeDrafter):
    """A drafter that grows its own trees: the text, where the coin lies right, and beside each of its nodes another."""

    name = "forester"

    def grow(
        self, passes: Passes, rows: slice, anchor_B: Tensor, drafts: int, nodes: int, states: Sequence[Any]
    ) -> tuple[Tree, int]:
        deep = min(drafts, nodes // 2)
        token_BM = self.propose(passes, rows, anchor_B, deep, states).argmax(-1)
        token_BN = torch.stack([token_BM, (token_BM + 1) % 96], dim=2).flatten(1)
        parent_BN = torch.tensor([max(2 * level - 1, 0) for level in range(deep) for _ in range(2)])
        parent_BN = parent_BN.expand(len(token_BM), -1)
        depth_BP = torch.tensor([0, *(level + 1 for level in range(deep) for _ in range(2))]).expand(len(token_BM), -1)
        likely_BN = torch.full(token_BN.shape, 0.5)
        return Tree(token_BN, parent_BN, depth_BP, ancestors(parent_BN, depth=deep), likely_BN), 2


@pytest.mark.parametrize("double", DOUBLES)
def test_a_drafter_may_grow_its_own_trees(double: str) -> None:
    """Under `tree:N` it is asked for a tree; its passes count, and the text is the backbone's."""
    drafter = Forester(TEXTS, DOUBLES[double])
    engine = drafter.engine = Engine(MODEL, rows=3, capacity=96, plan=steps.parse("tree:8"), drafter=drafter)
    for row in engine.finish(PROMPTS, OPTIONS):
        assert row.token_ids == TEXTS[tuple(row.prompt_ids)][: row.options.max_new_tokens]
        assert row.stats.forwards == 1 + row.stats.cycles
        assert row.stats.draft_passes.get("forester", 0) == 2 * row.stats.cycles
        if double == "always right" and len(row.token_ids) == 23:
            assert row.stats.cycles == 5  # for 22 tokens: four nodes deep, and the bonus


def test_a_model_keeps_the_drafter_that_it_was_loaded_with() -> None:
    """Engines take it unless they are given another, or draft nothing; a copy has it too, and taking the view off

    takes it away.
    """
    model, oracle = dual(), Oracle(TEXTS, DOUBLES["always right"])
    attachment_of(model).drafter = oracle
    engine = Engine(model, rows=1, capacity=96, plan=steps.parse("full"))
    assert engine.drafter is oracle
    own = ViewDrafter()
    assert Engine(model, rows=1, capacity=96, plan=steps.parse("full"), drafter=own).drafter is own
    for plan in ("ar", "lookup"):
        assert Engine(model, rows=1, capacity=96, plan=steps.parse(plan)).drafter.name == "view"
    assert isinstance(attachment_of(copy.deepcopy(model)).drafter, Oracle)
    again = attach(detach(model), OrthrusConfig(block_size=BLOCK))
    assert attachment_of(again).drafter is None


def test_a_drafter_is_loaded_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """`KIND:SOURCE` calls the kind's module with the source and the model; anything else is refused by name."""
    module = SimpleNamespace(load=lambda source, model: (source, model))
    monkeypatch.setitem(sys.modules, "some.module", module)  # type: ignore[arg-type]
    monkeypatch.setitem(drafters.KINDS, "some", "some.module")
    assert drafters.load_drafter("some:a/place:b", MODEL) == ("a/place:b", MODEL)
    for name in ("some", "some:", "other:place"):
        with pytest.raises(ConfigError, match=f"KIND:SOURCE.*some, found '{name}'"):
            drafters.load_drafter(name, MODEL)


def test_other_drafters_take_no_part_in_fused_passes() -> None:
    """A plan of nothing else is refused by name; `auto` does without."""
    oracle = Oracle(TEXTS, DOUBLES["never right"])
    with pytest.raises(ConfigError, match="found drafter 'oracle': take 'full'"):
        Engine(MODEL, rows=1, capacity=200, plan=steps.parse("onepass:2"), drafter=oracle)
    engine = oracle.engine = Engine(MODEL, rows=1, capacity=96, plan=steps.parse("auto"), drafter=oracle)
    assert all(not step.stops for step in engine.policy.steps)
    (row,) = engine.finish(PROMPTS[:1], OPTIONS[0])
    assert row.token_ids == TEXTS[tuple(PROMPTS[0])][:23]


class Reader(Double):
    """Keep what two layers say at each slot as keys of layers of its own, and check them when it drafts.

    Its rows' states count the tokens that were kept, from those that were cached when they began.
    """

    name = "reader"
    taps = (1, 0, 1)

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(TEXTS, coin)
        self.model = model
        self.checked = 0

    def reset(self, row: Row) -> list[int]:
        return [row.cached]

    def read(self, cache: ScratchCache, hidden: Sequence[Tensor]) -> None:
        assert len(hidden) == 3
        assert hidden[0] is hidden[2]
        assert cache.current.position_BQ is not None
        position_BHQD = cache.current.position_BQ[:, None, : hidden[0].shape[1], None].float()
        for layer, states_BQH in enumerate(hidden[:2]):
            cache.update(states_BQH[:, None], position_BHQD, 2 + layer)

    def accepted(self, states: Sequence[list[int]], counts: Sequence[int]) -> None:
        for state, count in zip(states, counts, strict=True):
            state.append(count)

    def propose(self, passes: Passes, rows: slice, anchor_B: Tensor, drafts: int, states: Sequence[Any]) -> Tensor:
        assert self.engine is not None
        cache = self.engine.cache
        for place, row, state in zip(range(cache.rows)[rows], self.engine.live[rows], states, strict=True):
            assert row.drafting is state
            text = row.text()[:-1]
            assert cache.lengths[place] == len(text)
            assert state[0] + sum(state[1:]) == len(text) - (len(row.prompt_ids) - 1 - state[0])
            plain = self.model(input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states if text else ()
            for own, layer in ((2, 1), (3, 0)) if text else ():
                kept_LH = cache.keys[own][place, : len(text), 0]
                # The last layer's output is normed before the model returns it.
                expected = self.model.base_model.norm(kept_LH) if layer == 1 else kept_LH
                torch.testing.assert_close(expected, plain[layer + 1][0], rtol=1e-3, atol=1e-4)
                assert cache.values[own][place, : len(text), 0, 0].tolist() == list(range(len(text)))
                self.checked += 1
        return super().propose(passes, rows, anchor_B, drafts, states)


@pytest.mark.parametrize("plan", ["fixed:4", "tree:6"])
def test_taps_give_each_slot_s_hidden_states_wherever_rows_go(plan: str) -> None:
    """Over prompts in slices, rejected drafts, trees' paths, rows that end and trade places, and shared prompt starts:

    what a drafter keeps of two layers beside the keys is, at every slot, what a plain pass over the text says, and the
    position of each is that of its slot.
    """
    model = tiny("qwen3")
    reader = Reader(tiny("qwen3"))
    model = attach(model, OrthrusConfig(block_size=BLOCK), attn_implementation="orthrus")
    engine = Engine(model, rows=3, capacity=96, plan=steps.parse(plan), drafter=reader, prefill_slice=2)
    reader.engine = engine
    prompts = [*PROMPTS, PROMPTS[2]]
    rows = engine.finish(prompts, [Options(max_new_tokens=count) for count in (*COUNTS, 9)])
    assert [row.token_ids for row in rows] == [
        TEXTS[tuple(prompt)][:count] for prompt, count in zip(prompts, (*COUNTS, 9), strict=True)
    ]
    assert rows[-1].drafting[0] > 0
    assert reader.checked > 20


def test_taps_that_cannot_be_read_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that there are not, by the first step; compiled passes, when the engine is made."""
    reader = Reader(MODEL)
    monkeypatch.setattr(reader, "taps", (2,))
    engine = Engine(MODEL, rows=1, capacity=96, plan=steps.parse("full"), drafter=reader)
    engine.add(PROMPTS[0], OPTIONS[0])
    with pytest.raises(ConfigError, match=r"taps of reader must be layers 0 to 1, found \[2\]"):
        engine.step()
    model = dual()
    compile_passes(model, backend="eager")
    with pytest.raises(ConfigError, match="'reader' reads hidden states, which compiled passes hide"):
        Engine(model, rows=1, capacity=96, plan=steps.parse("full"), drafter=reader)


@pytest.mark.parametrize("anchor", ["twin", "backbone"])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("seed", range(3))
def test_untrained_twins_leave_the_text(seed: int, attention: str, anchor: str) -> None:
    """Whatever the twin says: fresh copies and copies moved far away."""
    model = configure(dual(), block_attention=attention, anchor=anchor)
    perturb(model, scale=float(seed), seed=seed)
    for row in decode(engine_of(model, block=BLOCK), PROMPTS, OPTIONS):
        assert row.token_ids == TEXTS[tuple(row.prompt_ids)][: row.options.max_new_tokens]


# ---------------------------------------------------------------- the backbone's own first token


class NeverRight(ViewDrafter):
    """The view's draft pass, every draft turned into what the view thinks least likely."""

    ahead = False

    def propose(self, passes: Passes, rows: slice, anchor_B: Tensor, drafts: int, states: Sequence[Any]) -> Proposal:
        made = passes.draft(rows, anchor_B, drafts - 1)
        return Proposal(-1e3 * made.logits_BMV, made.first_B1V)


@pytest.mark.parametrize("name", ["full", "fixed:4", "tree:6"])
@pytest.mark.parametrize("anchor", ["twin", "backbone"])
def test_a_cycle_writes_two_tokens_whatever_the_drafts_are(anchor: str, name: str) -> None:
    """One by each pass, neither of them a draft: the first token and the bonus; so a token takes no pass but one."""
    model = configure(dual(), anchor=anchor)
    engine = Engine(model, rows=1, capacity=96, plan=steps.parse(name), drafter=NeverRight())
    for row in decode(engine, PROMPTS[:2], Options(max_new_tokens=20)):
        assert row.token_ids == TEXTS[tuple(row.prompt_ids)][:20]
        stats = row.stats
        # The last cycle ends on its first token, so what would verify drafts behind that does not count.
        assert (stats.cycles, stats.forwards, stats.first_tokens, stats.accepted) == (10, 1 + 2 * 10 - 1, 10, 0)
        assert (stats.tokens_per_cycle, stats.acceptance_length) == (2.0, 0.0)
        assert set(stats.accepted_per_position) == {0.0}
        assert stats.tokens_per_forward == 1.0


@pytest.mark.parametrize(("anchor", "most"), [("twin", BLOCK - 2), ("backbone", BLOCK - 1)])
def test_drafts_are_those_behind_the_first_token(anchor: str, most: int) -> None:
    """Of a block with the anchor in it one slot less drafts; the first token is counted apart from them."""
    model = configure(dual(), anchor=anchor)
    row = decode(Engine(model, rows=1, capacity=96, plan=steps.parse("full")), PROMPTS[:1], Options(max_new_tokens=9))[
        0
    ]
    assert row.stats.drafted == most * row.stats.cycles
    assert len(row.stats.accepted_per_position) == most
    assert row.stats.emitted == 9


@pytest.mark.parametrize(("step", "count"), [(Step(), 6), (Step(3), 6), (Step(3), 1)])
def test_the_prompt_s_token_counts_with_the_cycle_that_takes_its_drafts(step: Step, count: int) -> None:
    """Where none follows, it is no part of tokens per cycle."""
    engine = Engine(dual(), rows=1, capacity=96, plan=steps.parse("full"))
    scripted(engine, lambda *_: step)
    stats = decode(engine, PROMPTS[:1], Options(max_new_tokens=count))[0].stats
    assert stats.first_tokens == stats.cycles
    assert (stats.cycles > 0) is (step.drafts > 0 and count > 1)
    assert stats.emitted == count


def test_an_end_token_may_be_the_first() -> None:
    """Then nothing of the cycle behind it counts: drafts, bonus or the pass that verifies."""
    text = TEXTS[tuple(PROMPTS[0])]
    options = Options(max_new_tokens=24, eos_token_id=(text[3],))
    row = decode(
        Engine(dual(), rows=1, capacity=96, plan=steps.parse("full"), drafter=NeverRight()), PROMPTS[:1], options
    )[0]
    assert row.token_ids == text[: text.index(text[3]) + 1]
    assert (row.stats.cycles, row.stats.first_tokens, row.stats.emitted, row.stats.forwards) == (2, 2, 4, 4)
