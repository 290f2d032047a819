"""Prices from a few coefficients: told apart from the machine's speed, whatever the clock says."""

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from orthrus.policy.cost import Prices, features
from orthrus.policy.steps import Step
from tests.policy.simulated import BLOCK, Machine, Moody, Shared, linear

STEPS = [Step(), Step(7), Step(15), Step(15, nodes=31), Step(15, lookup=True)]


def of(step: Step, *, drew: bool = True) -> np.ndarray:
    return features(step, drew=drew, block=BLOCK)


def price(prices: Prices, step: Step) -> float:
    return float(prices.of(of(step)[None])[0])


def learned(machine: Machine, turns: int = 600, *, wide: float = 1.6, steps: Sequence[Step] = STEPS) -> Prices:
    """Prices after so many steps of these on a machine."""
    rng, prices = random.Random(0), Prices()
    for _ in range(turns):
        step = rng.choice(steps)
        prices.observe(of(step), machine(linear(wide)(step, True)))
    return prices


@pytest.mark.parametrize("pace", [1e-6, 1.0, 1e4])
def test_prices_are_ratios_whatever_the_machine_takes(pace: float) -> None:
    """Each step's price is what it takes next to a plain step, within 2 %; of steps never taken within 5 %."""
    prices = learned(lambda seconds: pace * seconds)
    for step in STEPS:
        assert price(prices, step) == pytest.approx(linear(1.6)(step, True), rel=0.02)
    for step in (Step(3), Step(11), Step(7, lookup=True)):
        assert price(prices, step) == pytest.approx(linear(1.6)(step, True), rel=0.05)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "machine", [Shared, lambda seed: Moody(share=0.02, steps=20, seed=seed)], ids=["shared", "moody"]
)
def test_prices_hold_on_a_machine_that_others_use(machine: Callable[[int], Machine], seed: int) -> None:
    """By single times steps would be off by half; prices are within 6 %."""
    prices = learned(machine(seed), turns=1500)
    for step in STEPS:
        assert price(prices, step) == pytest.approx(linear(1.6)(step, True), rel=0.06)


def test_what_is_uncertain_is_priced_low_and_what_was_timed_is_not() -> None:
    """A tree is priced far below what is likely before any step, and after chains alone; not once some were taken.

    So is a plain step: prices are in plain steps, and where nobody took one its time is as uncertain as any other.
    """

    def doubt(prices: Prices, step: Step) -> float:
        return float(1 - prices.of(of(step)[None], optimism=1.0)[0] / price(prices, step))

    tree, chains = Step(15, nodes=31), [Step(), Step(7), Step(15)]
    never_plain = learned(lambda s: s, steps=[Step(7), Step(15)])
    new, partly, old = Prices(), learned(lambda s: s, steps=chains), learned(lambda s: s)
    assert doubt(new, tree) > 0.2
    assert doubt(partly, Step(15)) < 0.02 < 0.04 < doubt(partly, tree)
    assert doubt(old, tree) < 0.02
    assert doubt(old, Step()) < 0.02 < 0.1 < doubt(never_plain, Step())


@pytest.mark.parametrize("step", [Step(), Step(15), Step(15, lookup=True)])
@pytest.mark.parametrize("times", [50.0, 0.02, math.inf, 0.0, -1.0])
def test_one_time_out_of_the_ordinary_says_little_of_prices(step: Step, times: float) -> None:
    """A pause, or a clock that was set: once sixty more steps were timed, prices are as before, within 4 %."""
    prices = learned(lambda seconds: seconds)
    prices.observe(of(step), times * linear(1.6)(step, True))
    rng = random.Random(1)
    for _ in range(60):
        other = rng.choice(STEPS)
        prices.observe(of(other), linear(1.6)(other, True))
    for other in STEPS:
        assert price(prices, other) == pytest.approx(linear(1.6)(other, True), rel=0.04)


def test_the_first_time_only_says_the_order_of_magnitude() -> None:
    """It is that of warm-up, ten times as long; a few steps later nothing of it is left."""
    prices = Prices()
    prices.observe(of(Step(15)), 30.0)
    rng = random.Random(0)
    for _ in range(100):
        step = rng.choice(STEPS)
        prices.observe(of(step), linear(1.6)(step, True))
    for step in STEPS:
        assert price(prices, step) == pytest.approx(linear(1.6)(step, True), rel=0.05)


def test_prices_over_another_number_of_rows_begin_with_those_known() -> None:
    """What steps cost next to one another is a good guess; the machine's speed is not."""
    first = learned(lambda seconds: seconds)
    second = Prices(first)
    assert price(second, Step(15)) == pytest.approx(price(first, Step(15)))
    for _ in range(200):
        for step in STEPS:
            second.observe(of(step), 7 * linear(2.5)(step, True))
    assert price(second, Step(15)) == pytest.approx(linear(2.5)(Step(15), True), rel=0.03)
    assert price(first, Step(15)) == pytest.approx(linear(1.6)(Step(15), True), rel=0.02)


@pytest.mark.parametrize(
    "strange",
    [
        lambda turn: 0.5 if turn % 30 == 0 else 1.0,
        lambda turn: 1e-9 if turn % 20 == 0 else 1.0,
        lambda turn: (1.0, 3.0)[turn // 100 % 2],
        lambda turn: math.inf if turn % 50 == 0 else 1.0,
        lambda turn: -1.0 if turn % 50 == 0 else 1e200,
    ],
)
def test_errors_stay_those_of_some_distribution(strange: Callable[[int], float]) -> None:
    """After five thousand strange times: symmetric to the last bit, positive, and all prices finite."""
    rng, prices = random.Random(0), Prices()
    for turn in range(5_000):
        step = STEPS[turn % 3]
        prices.observe(of(step), linear(1.6)(step, True) * strange(turn) * math.exp(rng.gauss(0, 0.03)))
    assert np.array_equal(prices._errors, prices._errors.T)
    assert np.linalg.eigvalsh(prices._errors).min() > 0
    assert np.isfinite(prices.of(np.stack([of(step) for step in STEPS]), optimism=1.0)).all()
