"""From files of results to figures: one summary per suite, domain and contender."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

from orthrus.bench import lines, metrics, quality
from orthrus.bench.contenders import LLAMA, MODES, OWN
from orthrus.bench.lines import Result
from orthrus.bench.metrics import Estimate, Ratio
from orthrus.bench.speed.prices import Prices
from orthrus.data.records import Record, read_records
from orthrus.decode.exact import EXACT
from orthrus.errors import ConfigError, DataError

ALL: Final = "all"
BASELINES: Final = ("ar", "hf", "hf-static")

T = TypeVar("T")
K = TypeVar("K")

Setting: TypeAlias = tuple[str, str, int]
"""Configuration, dtype and batch: results that share them come from comparable runs."""
Machines: TypeAlias = Mapping[str | None, str]
"""Where passes were timed, in words, by the id of their run's provenance; empty where that was one machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The figures of one contender on one domain of one suite.

    Attributes:
        setting: configuration, dtype and batch.
        suite, domain: what it was measured on; "all" for several together.
        mode, plan, exact: who.
        prompts: how many results stand behind the figures.
        tokens_per_second: of all results together.
        against: ratio of tokens per second to each baseline's that ran beside it.
        tokens_per_cycle, tokens_per_forward: pooled over all counts, mean over prompts; None without any.
        identical: share of texts equal to plain decoding's; None where it did not run.
        right: share of right answers; None where nothing can tell.
        accepted_per_position: how often slot j's draft was emitted, given that it was proposed.
    """

    setting: Setting
    suite: str
    domain: str
    mode: str
    plan: str | None
    exact: str | None
    prompts: int
    tokens_per_second: Estimate
    against: dict[str, Ratio]
    tokens_per_cycle: tuple[Estimate | None, Estimate | None]
    tokens_per_forward: tuple[Estimate | None, Estimate | None]
    identical: float | None
    right: float | None
    accepted_per_position: list[float]

    @property
    def label(self) -> str:
        """The contender in words."""
        return " ".join(filter(None, (self.mode, self.plan, "exact" if self.exact == "token" else None)))

    def to_dict(self) -> dict[str, Any]:
        configuration, dtype, batch = self.setting
        figures = asdict(self)
        del figures["setting"]
        for name in ("tokens_per_cycle", "tokens_per_forward"):
            figures[name] = dict(zip(("pooled", "mean"), figures[name], strict=True))
        return {"configuration": configuration, "dtype": dtype, "batch": batch, **figures}


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything that some files of results say.

    Attributes:
        provenances: the runs' provenance records, in the order of the files.
        summaries: figures of completions.
        passes: costs of single passes, as measured.
        steps: costs of training steps, as measured.
        qualities: figures of precisions.
        prices: the file of passes whose seconds count in place of the clock's, if any.
    """

    provenances: list[Record]
    summaries: list[Summary]
    passes: list[Record]
    steps: list[Record] = field(default_factory=list)
    qualities: list[quality.Summary] = field(default_factory=list)
    prices: str | None = None

    def settings_of(self, configuration: str) -> Mapping[str, Any]:
        """Return the settings that a configuration's id stands for; empty where no provenance record says."""
        settings = [p["settings"] for p in self.provenances if p.get("configuration") == configuration]
        return settings[0] if settings else {}

    def machines(self) -> Machines:
        """Say where each run timed its passes: on which device, and with which threads and torch if these differ."""
        by_id = {p["id"]: p for p in self.provenances}
        runs: dict[str | None, Record] = {id: by_id.get(id, {}) for id in (r.get("provenance") for r in self.passes)}
        differ = [name for name in ("threads", "torch") if len({run.get(name) for run in runs.values()}) > 1]
        said = {
            id: ", ".join([run.get("device", "unknown"), *(f"{name} {run.get(name, 'unknown')}" for name in differ)])
            for id, run in runs.items()
        }
        return said if len(set(said.values())) > 1 else {}

    def to_dict(self) -> dict[str, Any]:
        return {
            "provenance": self.provenances,
            "prices": self.prices,
            "summaries": [summary.to_dict() for summary in self.summaries],
            "passes": self.passes,
            "steps": self.steps,
            "quality": [summary.to_dict() for summary in self.qualities],
        }


def read_report(paths: Sequence[Path], *, baselines: Sequence[str] = BASELINES, prices: Path | None = None) -> Report:
    """Read files of results and work their figures out.

    Args:
        paths: files that `orthrus bench run`, `passes`, `train` or `quality` wrote.
        baselines: modes (of `orthrus`, with a plan: "orthrus:full"; exact to the token with "@token") that every other
            contender is compared with, where they ran.
        prices: a file of measured passes of one precision (`orthrus bench passes`): seconds are computed from these and
            from counts, of our own modes alone.

    Raises:
        DataError: a file cannot be read, a line of it is not of this format, or there is nothing to report.
        ConfigError: a baseline that is no mode.
    """
    provenances: dict[str, Record] = {}
    passes: list[Record] = []
    steps: list[Record] = []
    read: list[Record] = []
    answered: dict[tuple[lines.Prompt, lines.Who], Result] = {}
    for path in paths:
        records = read_records(path)
        provenances |= lines.provenances(records, where=str(path))
        passes += [r for r in records if r.get("kind") == lines.PASS]
        steps += [r for r in records if r.get("kind") == lines.STEP]
        read += [r for r in records if r.get("kind") == lines.QUALITY]
        # The same line of two files (or of one, given twice) counts once.
        answered |= {(r.prompt, r.contender): r for r in lines.results(records, where=str(path))}
    results = list(answered.values()) if prices is None else _priced(answered.values(), Prices.read(prices, None))
    if not (results or passes or steps or read):
        raise DataError(f"{', '.join(map(str, paths))}: at least one result line is required, found none")
    return Report(
        provenances=list(provenances.values()),
        summaries=summaries(results, baselines=baselines),
        passes=passes,
        steps=steps,
        qualities=quality.summaries(read, where=", ".join(map(str, paths))),
        prices=None if prices is None else prices.name,
    )


def _priced(results: Iterable[Result], prices: Prices) -> list[Result]:
    ours = [(result, prices.completion(result)) for result in results if result.mode in OWN]
    return [
        replace(r, seconds=seconds, rounds_seconds=[seconds], group=r.id if r.rows == 1 else r.group)
        for r, seconds in ours
    ]


def summaries(results: Sequence[Result], *, baselines: Sequence[str] = BASELINES) -> list[Summary]:
    """Return figures for every setting, each domain of each suite and all together, and every contender."""
    out = []
    for setting, of_setting in split(results, lambda r: (r.configuration, r.dtype, r.batch)):
        for (suite, domain), part in sections(of_setting):
            by_contender = dict(split(part, lambda r: r.contender))
            bases = {name: by_contender[who] for name in baselines if (who := _baseline(name)) in by_contender}
            for one in by_contender.values():
                out.append(_summary(setting, suite, domain, one, bases))
    return out


def _baseline(name: str) -> lines.Who:
    """Return who a baseline's name stands for; of our own modes the faster kind, unless it is asked for by `@token`."""
    who, _, exact = name.partition("@")
    mode, _, plan = who.partition(":")
    ours = mode in OWN
    misplaced = bool(plan) != (mode == "orthrus") and mode not in LLAMA
    if mode not in MODES or misplaced or ("@" in name and not (ours and exact in EXACT)):
        raise ConfigError(
            f"a baseline is one of {', '.join(MODES)}, orthrus with a plan (orthrus:full), llama.cpp with its weights "
            f"too (llama.cpp:q8_0), our own modes exact to the token too (ar@token); found {name!r}"
        )
    return mode, plan or None, (exact or "distribution") if ours else None


def _summary(
    setting: Setting,
    suite: str,
    domain: str,
    results: list[Result],
    bases: Mapping[str, list[Result]],
) -> Summary:
    ratios = {name: metrics.faster(results, base) for name, base in bases.items() if base is not results}
    cycle, forward = (
        (metrics.pooled(results, name), metrics.mean(results, name))
        for name in ("tokens_per_cycle", "tokens_per_forward")
    )
    return Summary(
        setting=setting,
        suite=suite,
        domain=domain,
        mode=results[0].mode,
        plan=results[0].plan,
        exact=results[0].exact,
        prompts=len(results),
        tokens_per_second=metrics.speed(results),
        against={name: ratio for name, ratio in ratios.items() if ratio is not None},
        tokens_per_cycle=cycle,
        tokens_per_forward=forward,
        identical=metrics.share(results, lambda r: r.identical),
        right=metrics.share(results, lambda r: r.right),
        accepted_per_position=metrics.accepted_per_position(results),
    )


def sections(results: Sequence[Result]) -> Iterator[tuple[tuple[str, str], list[Result]]]:
    """Yield each domain of each suite, each suite of several domains, and several suites together."""
    suites = list(split(results, lambda r: r.suite))
    for suite, of_suite in suites:
        domains = list(split(of_suite, lambda r: r.domain))
        for domain, part in domains:
            yield (suite, domain), part
        if len(domains) > 1:
            yield (suite, ALL), of_suite
    if len(suites) > 1:
        yield (ALL, ALL), list(results)


def split(items: Iterable[T], key: Callable[[T], K]) -> Iterable[tuple[K, list[T]]]:
    """Group items by a key, in the order in which keys first appear."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups.items()
