"""From files of results to figures: one summary per suite, domain and contender."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

from orthrus.bench import lines, metrics, quality
from orthrus.bench.contenders import LLAMA, MODES, OWN
from orthrus.bench.lines import Result
from orthrus.bench.metrics import Estimate, Ratio, sections, split
from orthrus.bench.race import Contender
from orthrus.bench.speed.prices import Prices
from orthrus.data.records import Record, read_records
from orthrus.decode.exact import EXACT, Exact
from orthrus.errors import ConfigError, DataError

BASELINES: Final = ("ar", "hf", "hf-static")

Setting: TypeAlias = tuple[str, str, int]
"""Configuration, dtype and batch: results that share them come from comparable runs."""
Machines: TypeAlias = Mapping[str | None, str]
"""Where passes were timed, in words, by the id of their run's provenance; empty where that was one machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The figures of one contender on one domain of one suite.

    Attributes:
        suite, domain: what it was measured on; "all" for several together.
        against: ratio of tokens per second to each baseline's that ran beside it.
        tokens_per_cycle, tokens_per_forward: pooled over all counts, mean over prompts; None without any.
        identical: share of texts equal to plain decoding's; None where it did not run.
        accepted_per_position: how often slot j's draft was emitted, given that it was proposed.
    """

    setting: Setting
    suite: str
    domain: str
    contender: Contender
    prompts: int
    tokens_per_second: Estimate
    against: dict[str, Ratio]
    tokens_per_cycle: tuple[Estimate | None, Estimate | None]
    tokens_per_forward: tuple[Estimate | None, Estimate | None]
    identical: float | None
    right: float | None
    accepted_per_position: list[float]

    def to_dict(self) -> dict[str, Any]:
        configuration, dtype, batch = self.setting
        figures = asdict(self)
        del figures["setting"], figures["contender"]
        for name in ("tokens_per_cycle", "tokens_per_forward"):
            figures[name] = dict(zip(("pooled", "mean"), figures[name], strict=True))
        return {"configuration": configuration, "dtype": dtype, "batch": batch, **self.contender._asdict(), **figures}


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything that some files of results say; `prices` is the file whose seconds count in place of the clock's."""

    provenances: list[Record]
    summaries: list[Summary]
    passes: list[Record]
    steps: list[Record] = field(default_factory=list)
    qualities: list[quality.Summary] = field(default_factory=list)
    prices: str | None = None

    def settings_of(self, configuration: str) -> Mapping[str, Any]:
        """Return the settings that a configuration's id stands for; empty where no provenance record says."""
        return next((p["settings"] for p in self.provenances if p.get("configuration") == configuration), {})

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
            "quality": [asdict(summary) for summary in self.qualities],
        }


def read_report(paths: Sequence[Path], *, baselines: Sequence[str] = BASELINES, prices: Path | None = None) -> Report:
    """Read files of results and work their figures out.

    `baselines` are modes (of `orthrus`, with a plan: "orthrus:full"; exact to the token with "@token"). With `prices`,
    a file of measured passes of one precision, seconds are computed from these and from counts, of our own modes alone.

    Raises:
        DataError: a file cannot be read, a line of it is not of this format, or there is nothing to report.
        ConfigError: a baseline that is no mode.
    """
    files = {str(path): read_records(path) for path in paths}
    records = [record for read in files.values() for record in read]
    # The same line of two files counts once.
    answered = {(r.prompt, r.contender): r for where, read in files.items() for r in Result.read(read, where=where)}
    compared = [line for where, read in files.items() for line in quality.Quality.read(read, where=where)]
    heads = {id: head for where, read in files.items() for id, head in lines.provenances(read, where=where).items()}
    everywhere = ", ".join(files)
    results = list(answered.values()) if prices is None else _priced(answered.values(), Prices.read(prices, None))
    report = Report(
        provenances=list(heads.values()),
        summaries=summaries(results, baselines=baselines),
        passes=[record for record in records if record.get("kind") == lines.PASS],
        steps=[record for record in records if record.get("kind") == lines.STEP],
        qualities=quality.summaries(compared, where=everywhere),
        prices=None if prices is None else prices.name,
    )
    if not (report.summaries or report.passes or report.steps or report.qualities):
        raise DataError(f"{everywhere}: at least one result line is required, found none")
    return report


def _priced(results: Iterable[Result], prices: Prices) -> list[Result]:
    ours = [(result, prices.completion(result)) for result in results if result.mode in OWN]
    return [
        replace(r, seconds=seconds, rounds_seconds=[seconds], group=r.id if r.rows == 1 else r.group)
        for r, seconds in ours
    ]


def summaries(results: Sequence[Result], *, baselines: Sequence[str] = BASELINES) -> list[Summary]:
    """Return figures for every setting, each domain of each suite and all together, and every contender."""
    out = []
    for setting, of_setting in split(results, lambda r: (r.configuration, r.dtype, r.batch)).items():
        for (suite, domain), part in sections(of_setting):
            by_contender = split(part, lambda r: r.contender)
            bases = {name: by_contender[who] for name in baselines if (who := _baseline(name)) in by_contender}
            for contender, answers in by_contender.items():
                ratios = {name: metrics.faster(answers, base) for name, base in bases.items() if base is not answers}
                cycle, forward = (
                    (metrics.pooled(answers, name), metrics.mean(answers, name))
                    for name in ("tokens_per_cycle", "tokens_per_forward")
                )
                summary = Summary(
                    setting=setting,
                    suite=suite,
                    domain=domain,
                    contender=contender,
                    prompts=len(answers),
                    tokens_per_second=metrics.speed(answers),
                    against={name: ratio for name, ratio in ratios.items() if ratio is not None},
                    tokens_per_cycle=cycle,
                    tokens_per_forward=forward,
                    identical=metrics.share(answers, lambda r: r.identical),
                    right=metrics.share(answers, lambda r: r.right),
                    accepted_per_position=metrics.accepted_per_position(answers),
                )
                out.append(summary)
    return out


def _baseline(name: str) -> Contender:
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
    promised: Exact = next((one for one in EXACT if one == exact), "distribution")
    return Contender(mode, plan or None, promised if ours else None)
