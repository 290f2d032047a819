"""The planner as a pure function: simulated drafts and a simulated clock, no model, no time."""

import math
import random
from collections.abc import Callable

import pytest

from orthrus.decode.plan import KINDS, Costs, Planner, Record, Step, expected, parse
from orthrus.errors import ConfigError

BLOCK = 16


def simulate(
    accept: Callable[[random.Random], int],
    *,
    price: Callable[[Step], float],
    tokens: int,
    plan: str = "auto",
    planner: Planner | None = None,
) -> tuple[float, list[Step]]:
    """Run a planner until so many tokens are out; `accept` says how many drafts would be right this time."""
    planner = planner or Planner(parse(plan), block=BLOCK)
    rng = random.Random(0)
    record = Record()
    seconds, done, steps = 0.0, 0, []
    while done < tokens:
        step = planner.choose([record])
        kept = min(accept(rng), step.drafts)
        planner.observe(step, [record], [kept], price(step))
        seconds += price(step)
        done += kept + 1
        steps.append(step)
    return seconds, steps


def linear(wide: float) -> Callable[[Step], float]:
    """Price passes so that one of 16 rows costs `wide` one-row passes, in proportion in between."""

    def price(step: Step) -> float:
        def one(rows: int) -> float:
            return 1 + (wide - 1) * (rows - 1) / 15

        if step.kind == "plain":
            return one(1)
        if step.lookup:
            return one(step.drafts + 1)
        if step.kind == "onepass":
            return one((step.drafts + 1) * (step.stops + 1))
        return one(step.drafts + 1) + one(1 + (step.nodes or step.drafts))

    return price


def geometric(rate: float) -> Callable[[random.Random], int]:
    """Drafts that are each right with the same chance."""

    def accept(rng: random.Random) -> int:
        count = 0
        while count < 63 and rng.random() < rate:
            count += 1
        return count

    return accept


def fixed(step: Step, accept: Callable[[random.Random], int], price: Callable[[Step], float], tokens: int) -> float:
    """Return what always taking one step would cost."""
    rng, seconds, done = random.Random(0), 0.0, 0
    while done < tokens:
        done += min(accept(rng), step.drafts) + 1
        seconds += price(step)
    return seconds


@pytest.mark.parametrize("wide", [1.2, 1.75, 4.0])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.6, 0.8, 0.95])
def test_auto_is_close_to_the_best_fixed_step(wide: float, rate: float) -> None:
    """Over 2,000 tokens auto loses at most 6 % to the best of plain steps and chains of any length."""
    price, accept = linear(wide), geometric(rate)
    best = min(fixed(Step(m), accept, price, 2000) for m in range(BLOCK))
    seconds, _ = simulate(accept, price=price, tokens=2000)
    assert seconds <= 1.06 * best


def test_a_useless_drafter_costs_at_most_three_percent_more_passes() -> None:
    """Two passes a cycle and nothing ever accepted: after the first probes plain steps remain."""
    price = linear(1.0)
    planner = Planner(parse("auto"), block=BLOCK)
    simulate(lambda rng: 0, price=price, tokens=50, planner=planner)
    seconds, _ = simulate(lambda rng: 0, price=price, tokens=1000, planner=planner)
    assert seconds <= 1.03 * 1000


def test_better_times_are_noticed() -> None:
    """After a long useless stretch, drafts that become right are in use again before long."""
    planner = Planner(parse("auto"), block=BLOCK)
    simulate(lambda rng: 0, price=linear(1.2), tokens=400, planner=planner)
    _, steps = simulate(lambda rng: 63, price=linear(1.2), tokens=4000, planner=planner)
    assert sum(step.kind != "plain" for step in steps[-20:]) == 20


def test_decisions_are_a_function_of_what_was_observed() -> None:
    """Two planners fed the same trace decide the same, step by step."""
    _, first = simulate(geometric(0.7), price=linear(1.5), tokens=1500)
    _, second = simulate(geometric(0.7), price=linear(1.5), tokens=1500)
    assert first == second


def test_fixed_plans_never_change_their_mind() -> None:
    """A plan that was asked for is followed whatever it costs."""
    for name, step in {
        "ar": Step(),
        "full": Step(15),
        "fixed:4": Step(3),
        "tree:7": Step(15, nodes=7),
        "onepass:2": Step(15, stops=2),
        "onepass": Step(15, stops=16),
        "lookup": Step(15, lookup=True),
        "lookup:3": Step(3, lookup=True),
    }.items():
        _, steps = simulate(lambda rng: 0, price=linear(9.0), tokens=30, plan=name)
        assert set(steps) == {step}


@pytest.mark.parametrize("text", ["", "fixed", "fixed:1", "fixed:x", "tree:0", "onepass:0", "lookup:0", "fast", "ar:2"])
def test_other_names_are_refused(text: str) -> None:
    """The message lists the plans there are."""
    with pytest.raises(ConfigError, match="a plan is 'auto'"):
        parse(text)


def test_blocks_beyond_the_trained_length_are_refused() -> None:
    """A view trained for 16 is not asked for 17."""
    with pytest.raises(ConfigError, match="trained for at most 16"):
        Planner(parse("fixed:17"), block=16)


def test_costs_interpolate_between_measured_chains() -> None:
    """Costs are medians without the warm-up run; chains in between lie on the line."""
    costs = Costs()
    for seconds in (100.0, 2.0, 4.0, 3.0):
        costs.observe(Step(3), 1, seconds)
    assert costs.estimate(Step(3), 1) == 3.0
    for seconds in (100.0, 9.0):
        costs.observe(Step(15), 1, seconds)
    assert costs.estimate(Step(9), 1) == 6.0
    assert costs.estimate(Step(1), 1) == 3.0
    assert costs.estimate(Step(), 1) is None
    for seconds in (100.0, 1.0):
        costs.observe(Step(), 1, seconds)
    assert costs.estimate(Step(1), 1) == 2 + (3 - 2) / 3
    assert costs.estimate(Step(15, nodes=31), 1) is None
    assert costs.estimate(Step(15, lookup=True), 1) == 4.5
    for seconds in (100.0, 5.0):
        costs.observe(Step(15, lookup=True), 1, seconds)
    assert costs.estimate(Step(3, lookup=True), 1) == 1 + (5 - 1) * 3 / 15
    assert costs.estimates((Step(), Step(15), Step(15, nodes=31)), 1) == pytest.approx(
        [1.0, 9.0, math.nan], nan_ok=True
    )


def test_costs_of_the_nearest_number_of_rows_serve_until_there_are_own_ones() -> None:
    """Steps are only ever compared at one number of rows."""
    costs = Costs()
    for rows in (2, 16):
        for step in (Step(), Step(15)):
            costs.observe(step, rows, 1.0)
            costs.observe(step, rows, 1.0)
    assert [costs.basis(r) for r in (1, 2, 5, 6, 16, 99)] == [2, 2, 2, 16, 16, 16]


def test_expected_tokens_of_a_certain_and_a_hopeless_record() -> None:
    """Expectations tend to drafts + 1 and to 1 as evidence grows; the prior decides where there is none."""
    sure, hopeless, prior = Record(), Record(), Record()
    for _ in range(200):
        sure.add("chain", drafts=4, accepted=4)
        hopeless.add("chain", drafts=4, accepted=0)
        prior.add("lookup", drafts=4, accepted=4)
    tokens = expected([sure, hopeless], prior)
    chain, tree, _, lookup = range(4)
    assert tokens[0, chain, 4] > 4.2
    assert tokens[1, chain, 4] < 1.3
    assert (tokens[:, lookup, 4] > 4.2).all()
    assert (tokens[:, tree, :3] == [1, 1.5, 1.75]).all()


def test_expected_tokens_are_those_of_the_slow_reckoning() -> None:
    """Row after row and slot after slot, as the definition says."""
    rng = random.Random(3)
    prior, rows = Record(fade=0.99), [Record() for _ in range(3)]
    for _ in range(60):
        row, drafts = rng.choice(rows), rng.randint(1, 15)
        kept = rng.randint(0, drafts)
        kind = rng.choice(list(KINDS))
        for record in (row, prior):
            record.add(kind, drafts=drafts, accepted=kept)

    def rate(kept: float, tried: float, otherwise: float) -> float:
        return (kept + 2 * otherwise) / (tried + 2)

    tokens = expected(rows, prior)
    for b, row in enumerate(rows):
        for k in range(len(KINDS)):
            total = run = 1.0
            general = rate(prior.counts[1, k].sum(), prior.counts[0, k].sum(), 0.5)
            for slot in range(64):
                usual = rate(prior.counts[1, k, slot], prior.counts[0, k, slot], general)
                run *= rate(row.counts[1, k, slot], row.counts[0, k, slot], usual)
                total += run
                assert tokens[b, k, slot + 1] == pytest.approx(total)


def test_copies_are_made_only_where_something_was_found() -> None:
    """However good copying has been, rows without anything to copy do not count on it."""
    planner, record = Planner(parse("auto"), block=BLOCK), Record()
    price = linear(1.2)
    for step in (Step(15), Step(), Step(15), Step()):
        planner.observe(step, [record], [0], price(step))
    for _ in range(50):
        planner.observe(Step(15, lookup=True), [record], [15], 1.2)
    planner.known.allowance = 0.0
    assert planner.choose([record], [True]) == Step(15, lookup=True)
    assert not planner.choose([record], [False]).lookup
    assert planner.choose([record] * 4, [True, False, False, False]).lookup
    before = record.counts.copy()
    planner.observe(Step(15, lookup=True), [record], [0], 1.2, [False])
    assert (record.counts == record.fade * before).all()
