"""Figures from results: pooled and mean, each with a bootstrap interval over prompts. Pure functions.

Prompts decoded together share their seconds, so what is drawn again is the batch (at batch 1: the prompt). Every figure
but the median is a ratio of two sums over batches.

Shapes: N units drawn (batches), R resamples.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from orthrus.bench.lines import Result
from orthrus.errors import DataError

RESAMPLES: Final = 2000
LEVEL: Final = 0.95
_CHUNK = 1_000_000  # numbers drawn at a time, so that thousands of prompts need no gigabytes

Array: TypeAlias = NDArray[np.float64]
Statistic: TypeAlias = Callable[[Array], Array]
"""From values of units `[..., N, F]` to a figure `[...]`."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """How much faster one contender is than another, from the same prompts in the same run.

    Attributes:
        totals: tokens per second over all prompts, as a ratio.
        median: median over prompts of each prompt's ratio.
        least: the least ratio of any one prompt.
    """

    totals: Estimate
    median: Estimate
    least: float


def bootstrap(values_NF: Array, statistic: Statistic, *, seed: int = 0) -> Estimate:
    """Return a statistic of units, and the interval it takes when units are drawn again with replacement.

    The interval is the percentile bootstrap's (Efron and Tibshirani, 1993, chapter 13): the middle 95 % of
    2,000 resamples, the same for the same seed. Raises DataError when there is no unit.
    """
    units = len(values_NF)
    if units == 0:
        raise DataError("an interval needs at least one result, found none")
    random = np.random.default_rng(seed)
    drawn = []
    for count in _chunks(RESAMPLES, max(1, _CHUNK // values_NF.size)):
        drawn.append(statistic(values_NF[random.integers(0, units, size=(count, units))]))
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(np.concatenate(drawn), (tail, 1 - tail))
    return Estimate(float(statistic(values_NF)), float(low), float(high))


def ratio_of_sums(values: Array) -> Array:
    """Return the first column's sum over the second's; nan where that is 0."""
    sums = values.sum(axis=-2)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(sums[..., 1] != 0, sums[..., 0] / sums[..., 1], np.nan))


def ratio_of_rates(values: Array) -> Array:
    """Return (column 0 / column 1) / (column 2 / column 3), each summed over units."""
    sums = values.sum(axis=-2)
    return np.asarray(sums[..., 0] / sums[..., 1] / (sums[..., 2] / sums[..., 3]))


def middle(values: Array) -> Array:
    """Return the median of the only column."""
    return np.asarray(np.median(values[..., 0], axis=-1))


def speed(results: Iterable[Result]) -> Estimate:
    """Return tokens per second, over all results."""
    return bootstrap(_sums(results, lambda r: (r.stats["emitted"], r.seconds)), ratio_of_sums)


def pooled(results: Iterable[Result], name: str) -> Estimate | None:
    """Return `tokens_per_cycle` or `tokens_per_forward` from all counts together; None without drafts."""
    return _ratio(results, lambda r: _counts(r, name))


def mean(results: Iterable[Result], name: str) -> Estimate | None:
    """Return the mean over prompts of `tokens_per_cycle` or `tokens_per_forward`; None without drafts.

    Prompts that were decoded without a cycle have no tokens per cycle and do not count.
    """
    return _ratio(results, lambda r: _share(_counts(r, name)))


def share(results: Iterable[Result], of: Callable[[Result], bool | None]) -> float | None:
    """Return the share of results for which something is true, among those for which it is known."""
    values = [value for result in results if (value := of(result)) is not None]
    return sum(values) / len(values) if values else None


def accepted_per_position(results: Iterable[Result]) -> list[float]:
    """Return how often slot j's draft was emitted, given that it was proposed, over all results."""
    proposed: list[int] = []
    accepted: list[int] = []
    for result in results:
        proposed = _add(proposed, result.proposed_per_position)
        accepted = _add(accepted, result.accepted_at_position)
    return [kept / tried if tried else 0.0 for kept, tried in zip(accepted, proposed, strict=True)]


def faster(results: Sequence[Result], than: Sequence[Result]) -> Ratio | None:
    """Compare results with a baseline's for the same prompts; None when the two share none."""
    other = {result.prompt: result for result in than}
    pairs = [(result, other[result.prompt]) for result in results if result.prompt in other]
    if not pairs:
        return None
    units: dict[tuple[str, ...], list[tuple[float, ...]]] = {}
    for drafted, base in pairs:
        columns = drafted.stats["emitted"], drafted.seconds, base.stats["emitted"], base.seconds
        units.setdefault(_unit(drafted), []).append(columns)
    sums = np.array([np.sum(rows, axis=0) for rows in units.values()], dtype=float)
    ratios = np.array([float(ratio_of_rates(np.array([row]))) for rows in units.values() for row in rows])
    of_units = ratio_of_rates(sums[:, None])[:, None]
    return Ratio(
        totals=bootstrap(sums, ratio_of_rates),
        median=bootstrap(of_units, middle),
        least=float(ratios.min()),
    )


def _ratio(results: Iterable[Result], of: Callable[[Result], tuple[float, float]]) -> Estimate | None:
    sums = _sums(results, of)
    return bootstrap(sums, ratio_of_sums) if sums[:, 1].sum() else None


def _counts(result: Result, name: str) -> tuple[float, float]:
    stats: Mapping[str, Any] = result.stats
    if name == "tokens_per_forward":
        return stats["emitted"], stats["forwards"]
    if name == "tokens_per_cycle":
        cycles = stats.get("cycles", 0)
        return stats.get("accepted", 0) + stats.get("first_tokens", 0) + cycles, cycles
    raise DataError(f"a figure is tokens_per_forward or tokens_per_cycle, found {name!r}")


def _share(counts: tuple[float, float]) -> tuple[float, float]:
    above, below = counts
    return (above / below, 1) if below else (0, 0)


def _sums(results: Iterable[Result], of: Callable[[Result], tuple[float, float]]) -> Array:
    """Add two numbers of each result up over the results of each batch: `[N, 2]`."""
    sums: dict[tuple[str, ...], tuple[float, float]] = {}
    for result in results:
        above, below = of(result)
        before = sums.get(_unit(result), (0.0, 0.0))
        sums[_unit(result)] = before[0] + above, before[1] + below
    return np.array(list(sums.values()), dtype=float).reshape(-1, 2)


def _unit(result: Result) -> tuple[str, ...]:
    """Return what a result was decoded with: its batch; prompts of one batch are not independent."""
    return result.configuration, result.dtype, str(result.batch), result.suite, result.group


def _add(total: list[int], more: Sequence[int]) -> list[int]:
    width = max(len(total), len(more))
    a, b = (list(counts) + [0] * (width - len(counts)) for counts in (total, more))
    return [x + y for x, y in zip(a, b, strict=True)]


def _chunks(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]
