"""Figures equal those worked out by hand, and intervals cover what they should."""

import numpy as np
import pytest

from orthrus.bench import metrics
from orthrus.bench.metrics import bootstrap, ratio_of_sums
from orthrus.errors import DataError
from tests.bench.lines_of import result, stats


def test_pooled_figures_sum_counts_before_they_divide() -> None:
    results = [
        result(id="a", stats=stats(cycles=1, accepted=9)),
        result(id="b", stats=stats(cycles=4, accepted=4)),
    ]
    cycle, forward = (metrics.pooled(results, f"tokens_per_{name}") for name in ("cycle", "forward"))
    assert cycle is not None
    assert cycle.value == (10 + 8) / 5
    assert forward is not None
    assert forward.value == 18 / (3 + 9)


def test_means_divide_each_prompt_before_they_average() -> None:
    results = [
        result(id="a", stats=stats(cycles=1, accepted=9)),
        result(id="b", stats=stats(cycles=4, accepted=4)),
    ]
    cycle, forward = (metrics.mean(results, f"tokens_per_{name}") for name in ("cycle", "forward"))
    assert cycle is not None
    assert cycle.value == (10 / 1 + 8 / 4) / 2
    assert forward is not None
    assert forward.value == pytest.approx((10 / 3 + 8 / 9) / 2, rel=1e-15)


def test_prompts_without_cycles_have_no_tokens_per_cycle() -> None:
    plain = [result(id="a", stats=stats(plain_steps=3))]
    mixed = [*plain, result(id="b", stats=stats(cycles=2, accepted=6))]
    assert metrics.pooled(plain, "tokens_per_cycle") is None
    assert metrics.mean(plain, "tokens_per_cycle") is None
    mean = metrics.mean(mixed, "tokens_per_cycle")
    assert mean is not None
    assert mean.value == 4


def test_first_tokens_count_for_their_cycles() -> None:
    """A cycle whose draft pass gave a token of the backbone's own wrote that, its accepted drafts and the bonus."""
    figure = metrics.pooled(
        [result(id="a", stats=stats(cycles=4, accepted=6) | {"first_tokens": 3})], "tokens_per_cycle"
    )
    assert figure is not None
    assert figure.value == (3 + 6 + 4) / 4


def test_an_unknown_figure_is_refused() -> None:
    with pytest.raises(DataError, match="tokens_per_forward or tokens_per_cycle"):
        metrics.pooled([result()], "tokens_per_joule")


def test_speed_is_all_tokens_over_all_seconds() -> None:
    results = [
        result(id="a", seconds=1.0),
        result(id="b", seconds=3.0, stats=stats(plain_steps=2)),
    ]
    assert metrics.speed(results).value == 12 / 4


def test_ratios_pair_the_prompts_that_both_answered() -> None:
    """Totals, median and least of prompts a (twice as fast), b (four times), c (half); d has no pair."""
    base = [result(id=i, seconds=s) for i, s in (("a", 2.0), ("b", 4.0), ("c", 1.0), ("d", 9.0))]
    own = [result(id=i, mode="orthrus", seconds=s) for i, s in (("c", 2.0), ("b", 1.0), ("a", 1.0))]
    ratio = metrics.faster(own, base)
    assert ratio is not None
    assert ratio.totals.value == (2 + 4 + 1) / (1 + 1 + 2)
    assert ratio.median.value == 2
    assert ratio.least == 0.5
    assert ratio.totals.low <= ratio.totals.value <= ratio.totals.high


def test_ratios_need_the_same_run_precision_and_batch() -> None:
    own = [result(mode="orthrus")]
    for other in ({"configuration": "other"}, {"dtype": "bfloat16"}, {"batch": 8}, {"suite": "other"}):
        assert metrics.faster(own, [result(**other)]) is None
    assert metrics.faster(own, [result(provenance="a later run")]) is not None


def test_ratios_count_tokens_where_texts_differ() -> None:
    """Half the tokens in half the time is no faster."""
    own = [result(mode="orthrus", seconds=0.5, stats=stats(plain_steps=5))]
    ratio = metrics.faster(own, [result()])
    assert ratio is not None
    assert ratio.totals.value == 1


def test_prompts_of_one_batch_are_drawn_together() -> None:
    """One batch leaves nothing to draw: its interval is a point, however much its prompts differ."""
    results = [result(id=str(i), group="0", batch=4, seconds=float(i + 1)) for i in range(4)]
    speed = metrics.speed(results)
    assert speed.low == speed.value == speed.high
    alone = metrics.speed([result(id=str(i), seconds=float(i + 1)) for i in range(4)])
    assert alone.low < alone.value < alone.high


def test_the_interval_covers_the_truth_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ratio of sums with a known truth (2), 200 samples of 100 units: 95 % of the intervals should hold it.

    400 resamples are enough to see it.

    The percentile bootstrap covers a little less (about 94 %). Below 177 of 200 has odds of 1 in 1,000 at 94 %,
    above 196 of 1 in 110 at 95 %; the seed is fixed, so the outcome is too.
    """
    monkeypatch.setattr(metrics, "RESAMPLES", 400)
    random = np.random.default_rng(7)
    covered = 0
    for _ in range(200):
        below = random.exponential(size=100) + 0.5
        above = below * (2 + random.normal(0, 0.5, size=100))
        estimate = bootstrap(np.stack([above, below], axis=1), ratio_of_sums)
        covered += estimate.low <= 2 <= estimate.high
    assert 177 <= covered <= 196


def test_the_interval_narrows_with_the_root_of_the_number_of_prompts() -> None:
    random = np.random.default_rng(3)
    values = np.stack([random.normal(5, 1, size=1600), np.ones(1600)], axis=1)
    few, many = (bootstrap(values[:n], ratio_of_sums) for n in (100, 1600))
    assert 3 < (few.high - few.low) / (many.high - many.low) < 5.5


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(1).normal(5, 1, size=(30, 2))
    assert bootstrap(values, ratio_of_sums, seed=4) == bootstrap(values, ratio_of_sums, seed=4)
    assert bootstrap(values, ratio_of_sums, seed=4) != bootstrap(values, ratio_of_sums, seed=5)


def test_no_results_have_no_interval() -> None:
    with pytest.raises(DataError, match="at least one"):
        metrics.speed([])


def test_shares_count_what_is_known() -> None:
    results = [result(id=str(i), right=right) for i, right in enumerate((True, None, False, True))]
    assert metrics.share(results, lambda r: r.right) == 2 / 3
    assert metrics.share(results[1:2], lambda r: r.right) is None


def test_acceptance_by_position_adds_counts_of_unequal_blocks() -> None:
    results = [
        result(id="a", proposed_per_position=[4, 4], accepted_at_position=[3, 1]),
        result(id="b", proposed_per_position=[1, 1, 1], accepted_at_position=[1, 1, 0]),
        result(id="c"),
    ]
    assert metrics.accepted_per_position(results) == [4 / 5, 2 / 5, 0.0]
