"""Acceptance by source: what is counted, and what is expected of the next drafts."""

import math
import random

import pytest

from orthrus.policy.acceptance import GUESS, LONG, SHORT, VIEW, Acceptance, RowOutcome, RowState, expected
from orthrus.policy.lookup import Match
from orthrus.policy.steps import Step

SLOTS = 15
USUAL_FADE = 0.99


def row(match: Match | None = None, fade: float = 0.95) -> RowState:
    return RowState(Acceptance(SLOTS, fade), match)


def usual() -> Acceptance:
    return Acceptance(SLOTS, USUAL_FADE)


def view(drafted: int, kept: int) -> RowOutcome:
    return RowOutcome(source="view", drafted=drafted, kept=kept, drew=True)


def copy(drafted: int, kept: int) -> RowOutcome:
    return RowOutcome(source="text", drafted=drafted, kept=kept)


def test_expected_tokens_of_a_certain_and_a_hopeless_row() -> None:
    """They tend to drafts + 1 and to 1 as evidence grows; the guess decides where there is none."""
    sure, hopeless = row(), row()
    for _ in range(200):
        sure.acceptance.learn(view(4, 4), None)
        hopeless.acceptance.learn(view(4, 0), None)
    tokens = expected([sure, hopeless, row()], usual())
    assert tokens[0, VIEW, 4] > 4.2
    assert tokens[1, VIEW, 4] < 1.3
    assert tokens[2, VIEW, :3].tolist() == [1, 1.5, 1.75]


def test_one_block_tells_a_text_that_is_easier_than_others() -> None:
    """Where hardly any draft is kept otherwise, ten of fifteen kept promise more of this text; and the other way."""
    poor, rich, easy, hard = usual(), usual(), row(), row()
    for turn in range(100):
        poor.learn(view(15, 2 if turn % 4 == 0 else 0), None)
        rich.learn(view(15, 12 if turn % 4 else 15), None)
    easy.acceptance.learn(view(15, 10), None)
    hard.acceptance.learn(view(15, 0), None)
    of_poor, of_rich = (expected([row(), easy, hard], one)[:, VIEW, 15] for one in (poor, rich))
    assert of_poor[0] < 1.6
    assert of_poor[1] > 4
    assert of_rich[0] > 10
    assert of_rich[2] < 0.7 * of_rich[0]


def test_expected_tokens_are_those_of_the_slow_reckoning() -> None:
    """Row after row and slot after slot, as the definition says."""
    rng = random.Random(3)
    general, rows = usual(), [row(match) for match in ("short", "long", None)]
    for _ in range(60):
        one, drafted = rng.choice(rows), rng.randint(1, SLOTS)
        source, kept = rng.choice(["view", "text"]), rng.randint(0, drafted)
        for acceptance in (one.acceptance, general):
            acceptance.learn(RowOutcome(source=source, drafted=drafted, kept=kept), one.match)  # type: ignore[arg-type]

    def rate(kept: float, tried: float, otherwise: float, trust: float = 2.0) -> float:
        return (kept + trust * otherwise) / (tried + trust)

    def usually(s: int, slot: int) -> float:
        overall = rate(general.counts[1, s].sum(), general.counts[0, s].sum(), *GUESS[s])
        return rate(general.counts[1, s, slot], general.counts[0, s, slot], overall)

    def at_own_odds(one: RowState, s: int, slot: int) -> float:
        slope, curvature = 0.0, 1.0
        for m in range(SLOTS):
            chance, (tried, kept) = usually(s, m), one.acceptance.counts[:, s, m]
            slope += kept - tried * chance
            curvature += tried * chance * (1 - chance)
        odds = usually(s, slot) / (1 - usually(s, slot)) * math.exp(slope / curvature)
        return odds / (1 + odds)

    def own(one: RowState, s: int, slot: int) -> float:
        return rate(one.acceptance.counts[1, s, slot], one.acceptance.counts[0, s, slot], at_own_odds(one, s, slot))

    tokens = expected(rows, general)
    for b, one in enumerate(rows):
        for at, s in enumerate((VIEW, LONG if one.match == "long" else SHORT)):
            total = run = 1.0
            for slot in range(SLOTS):
                run *= own(one, s, slot) if s == VIEW or one.match else 0.0
                total += run
                assert tokens[b, at, slot + 1] == pytest.approx(total)


def test_one_copy_that_failed_does_not_end_copying_after_a_long_match() -> None:
    """A text's loop is worth more than one exception in another tells; after a short match it may be chance."""
    general = usual()
    for match in ("short", "long"):
        general.learn(copy(15, 0), match)
    tokens = expected([row("long"), row("short")], general)[:, SHORT, 15]
    assert tokens[0] > 2
    assert tokens[1] < 1.5


def test_what_a_copy_would_have_kept_counts_as_far_as_the_text_went_on() -> None:
    """Of rows that did something else; a copy that was made says it itself, and nothing is said twice."""
    told = Acceptance(SLOTS, fade=1.0)
    told.learn(RowOutcome("view", 15, 4, drew=True, copy_kept=2), "long")
    told.learn(RowOutcome(copy_kept=1), "long")
    told.learn(RowOutcome("view", 15, 4, drew=True), "long")
    told.learn(RowOutcome("text", 15, 4, copy_kept=4), "short")
    tried, kept = told.counts
    assert tried[LONG, :4].tolist() == [2, 1, 1, 0]
    assert kept[LONG, :4].tolist() == [2, 1, 0, 0]
    assert tried[SHORT, :6].tolist() == [1, 1, 1, 1, 1, 0]


def test_a_tree_counts_by_the_chain_inside_it() -> None:
    """And a row that copied without a match, as others did, learns nothing but that time has passed."""
    tree, chain = Acceptance(SLOTS), Acceptance(SLOTS)
    tree.learn(RowOutcome("view", 15, 7, drew=True, chain=(4, 9)), None)
    chain.learn(view(9, 4), None)
    assert (tree.counts == chain.counts).all()
    before = tree.counts.copy()
    tree.learn(copy(15, 0), None)
    assert (tree.counts == tree.fade * before).all()


@pytest.mark.parametrize(
    ("step", "blind", "served"),
    [
        (Step(15), False, True),
        (Step(15), True, True),
        (Step(16), True, False),
        (Step(15, nodes=31), False, True),
        (Step(15, nodes=31), True, False),
        (Step(15, stops=2), True, True),
        (Step(15, lookup=True), False, False),
        (Step(), False, False),
    ],
)
def test_ready_drafts_serve_the_steps_that_can_do_with_them(step: Step, blind: bool, served: bool) -> None:
    """As many as there are; a tree grows from drafts that knew the anchor."""
    one = row()
    one.ready, one.blind = 15, blind
    assert one.serves(step) is served
