"""Results in groups, and their figures: pooled and mean, each with a bootstrap interval over prompts. Pure functions.

Prompts decoded together share their seconds, so what is drawn again is the batch (at batch 1: the prompt). Every figure
but the median is a ratio of two sums over batches.

Shapes: N units drawn (batches), R resamples.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Final, TypeAlias, TypeVar, final

import numpy as np
from numpy.typing import NDArray

from orthrus.bench.lines import Result
from orthrus.errors import DataError

ALL: Final = "all"
"""What several domains or suites together are called."""
RESAMPLES: Final = 2000
LEVEL: Final = 0.95
_CHUNK = 1_000_000  # numbers drawn at a time, so that thousands of prompts need no gigabytes

R = TypeVar("R", bound=Result)
T = TypeVar("T")
K = TypeVar("K")
Array: TypeAlias = NDArray[np.float64]
Statistic: TypeAlias = Callable[[Array], Array]
"""From values of units `[..., N, F]` to a figure `[...]`."""


@final
@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """How much faster one contender is, from the same prompts in the same run, in tokens per second.

    `totals` is over all prompts, `median` over prompts of each one's ratio, `least` that of any one prompt.
    """

    totals: Estimate
    median: Estimate
    least: float


def split(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Group items by a key, in the order in which keys first appear."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def sections(results: Sequence[R]) -> Iterator[tuple[tuple[str, str], list[R]]]:
    """Yield each domain of each suite, each suite of several domains, and several suites together."""
    suites = split(results, lambda r: r.suite)
    for suite, of_suite in suites.items():
        domains = split(of_suite, lambda r: r.domain)
        for domain, part in domains.items():
            yield (suite, domain), part
        if len(domains) > 1:
            yield (suite, ALL), of_suite
    if len(suites) > 1:
        yield (ALL, ALL), list(results)


def section(suite: str, domain: str) -> str:
    """Name a domain of a suite, and not twice where the suite's name says it."""
    return suite if domain in suite else f"{suite} {domain}"


def percentiles(values: Iterable[float | None], marks: Sequence[float]) -> list[float]:
    """Return percentiles of the values that are known; none where none is."""
    known = [value for value in values if value is not None]
    return [float(value) for value in np.percentile(known, marks)] if known else []


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
    size = max(1, _CHUNK // values_NF.size)
    for start in range(0, RESAMPLES, size):
        count = min(size, RESAMPLES - start)
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


def speed(results: Iterable[Result]) -> Estimate:
    """Return tokens per second, over all results."""
    return bootstrap(_sums(results, lambda r: (r.stats["emitted"], r.seconds)), ratio_of_sums)


def pooled(results: Iterable[Result], name: str) -> Estimate | None:
    """Return `tokens_per_cycle` or `tokens_per_forward` from all counts together; None without drafts."""
    return _ratio(results, lambda r: _counts(r, name))


def mean(results: Iterable[Result], name: str) -> Estimate | None:
    """Return the mean over prompts of `tokens_per_cycle` or `tokens_per_forward`, of those that have one, if any."""
    return _ratio(results, lambda r: _share(_counts(r, name)))


def share(results: Iterable[Result], of: Callable[[Result], bool | None]) -> float | None:
    """Return the share of results for which something is true, among those for which it is known."""
    values = [value for result in results if (value := of(result)) is not None]
    return sum(values) / len(values) if values else None


def accepted_per_position(results: Iterable[Result]) -> list[float]:
    """Return how often slot j's draft was emitted, given that it was proposed, over all results."""
    every = list(results)
    proposed = map(sum, zip_longest(*(result.proposed_per_position for result in every), fillvalue=0))
    accepted = map(sum, zip_longest(*(result.accepted_at_position for result in every), fillvalue=0))
    return [kept / tried if tried else 0.0 for kept, tried in zip(accepted, proposed, strict=True)]


def faster(results: Sequence[Result], than: Sequence[Result]) -> Ratio | None:
    """Compare results with a baseline's for the same prompts; None when the two share none."""
    other = {result.prompt: result for result in than}
    paired = [result for result in results if result.prompt in other]
    if not paired:
        return None

    def columns(one: Result) -> tuple[float, ...]:
        base = other[one.prompt]
        return one.stats["emitted"], one.seconds, base.stats["emitted"], base.seconds

    sums = _sums(paired, columns)
    return Ratio(
        totals=bootstrap(sums, ratio_of_rates),
        median=bootstrap(ratio_of_rates(sums[:, None])[:, None], lambda of_units: np.median(of_units[..., 0], axis=-1)),
        least=float(ratio_of_rates(np.array([[columns(one)] for one in paired])).min()),
    )


def _ratio(results: Iterable[Result], of: Callable[[Result], tuple[float, float]]) -> Estimate | None:
    sums = _sums(results, of)
    return bootstrap(sums, ratio_of_sums) if len(sums) and sums[:, 1].sum() else None


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


def _sums(results: Iterable[Result], of: Callable[[Result], tuple[float, ...]]) -> Array:
    """Add numbers of each result up over the results of each batch: `[N, F]`."""
    batches = split(results, lambda r: (r.configuration, r.dtype, r.batch, r.suite, r.group)).values()
    return np.array([np.sum([of(result) for result in batch], axis=0) for batch in batches], dtype=float)
