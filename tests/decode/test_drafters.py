"""Who drafts never shows in the text, and what the drafts were worth shows in the statistics, to the last count."""

from collections.abc import Callable

import pytest

from orthrus.decode.options import Options
from orthrus.decode.rows import Row
from tests import reference
from tests.decode.drive import BLOCK, Double, decode, dual, engine_of, engine_with
from tests.families import tiny

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
        expected = reference.trace(len(text), block - 1, lambda place, row=row: DOUBLES[double](row, place))
        assert row.stats.cycles == expected.cycles
        assert row.stats.plain_steps == 0
        assert row.stats.forwards == 1 + 2 * expected.cycles
        assert row.stats.drafted == expected.cycles * (block - 1)
        assert row.stats.accepted == expected.accepted
        assert row.stats.emitted == len(text)
        assert row.stats.proposed_per_position == expected.proposed_at
        assert row.stats.accepted_at_position == expected.accepted_at


def test_an_oracle_reaches_the_method_s_best() -> None:
    """K tokens per two passes: 24 tokens in 3 cycles of 8."""
    engine = engine_with(Double(TEXTS, DOUBLES["always right"]), MODEL, block=BLOCK)
    stats = decode(engine, PROMPTS[:1], Options(max_new_tokens=24))[0].stats
    assert stats.to_dict() == {
        "cycles": 3,
        "forwards": 7,
        "plain_steps": 0,
        "drafted": 21,
        "accepted": 21,
        "emitted": 24,
        "tokens_per_forward": 24 / 7,
        "acceptance_length": 7.0,
        "tokens_per_cycle": 8.0,
        "accepted_per_position": [1.0] * 7,
    }


def test_plain_decoding_counts_plain_steps() -> None:
    """One pass per token and one prefill; no drafter is ever asked."""

    def nobody(*_: object) -> None:
        raise AssertionError("plain decoding drafts nothing")

    stats = decode(engine_of(MODEL, block=1, drafter=nobody), PROMPTS[:1], Options(max_new_tokens=9))[0].stats
    assert (stats.cycles, stats.plain_steps, stats.forwards, stats.emitted) == (0, 9, 10, 9)
    assert stats.tokens_per_forward == 0.9
    assert stats.accepted_per_position == []


def test_drafts_beyond_the_end_of_the_text_do_not_count() -> None:
    """An end token among good drafts: those up to it were accepted, neither the rest nor a bonus was.

    The text ends with its fifth token. Blocks of 8, oracle: one cycle, 7 drafts right, 5 of them emitted.
    """
    text = TEXTS[tuple(PROMPTS[0])]
    assert text.index(text[4]) == 4
    engine = engine_with(Double(TEXTS, DOUBLES["always right"]), MODEL, block=BLOCK)
    row = decode(engine, PROMPTS[:1], Options(max_new_tokens=24, eos_token_id=(text[4],)))[0]
    assert row.token_ids == text[:5]
    assert (row.stats.cycles, row.stats.drafted, row.stats.accepted, row.stats.emitted) == (1, 7, 5, 5)
    assert row.stats.accepted_per_position == [1.0] * 5 + [0.0] * 2


def test_an_end_token_as_bonus_counts_as_bonus() -> None:
    """Never right: each token is a bonus, the end token too, so nothing was accepted."""
    text = TEXTS[tuple(PROMPTS[0])]
    engine = engine_with(Double(TEXTS, DOUBLES["never right"]), MODEL, block=4)
    row = decode(engine, PROMPTS[:1], Options(max_new_tokens=24, eos_token_id=(text[4],)))[0]
    assert (row.stats.cycles, row.stats.accepted, row.stats.emitted) == (5, 0, 5)


def test_progress_tells_drafts_from_bonus() -> None:
    """Each step reports its tokens, the accepted drafts first, and how many these are."""
    engine = engine_with(Double(TEXTS, lambda _, place: place % 4 < 2), MODEL, block=4)
    engine.add(PROMPTS[0], Options(max_new_tokens=8))
    steps = []
    while engine.busy:
        steps += [(p.token_ids, p.accepted) for p in engine.step()]
    # Places 0 and 1 are drafted rightly, 2 is corrected; from 3 on: wrong; 4 and 5 right, 6 corrected; 7 wrong.
    text = TEXTS[tuple(PROMPTS[0])]
    assert steps == [(text[:3], 2), (text[3:4], 0), (text[4:7], 2), (text[7:8], 0)]
    # (Place 3 is a cycle of its own: its first draft is wrong.)


@pytest.mark.parametrize("seed", range(3))
def test_untrained_twins_leave_the_text(seed: int) -> None:
    """Whatever the twin says: fresh copies and copies moved far away."""
    from tests.families import perturb

    model = dual()
    perturb(model, scale=float(seed), seed=seed)
    for row in decode(engine_of(model, block=BLOCK), PROMPTS, OPTIONS):
        assert row.token_ids == TEXTS[tuple(row.prompt_ids)][: row.options.max_new_tokens]
