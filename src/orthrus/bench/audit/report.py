"""From an audit's lines to figures, and to a yes or no: does what is promised hold?

Pure functions of references and verdicts. Knows what is claimed at which precision; knows no model and no terminal.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from orthrus.bench import lines, metrics
from orthrus.bench.audit.verdicts import MARGINS, Key, Parting, Reference, Verdict, read
from orthrus.bench.metrics import Estimate
from orthrus.bench.speed.report import sections, split
from orthrus.data.records import Record, read_records
from orthrus.errors import DataError

EPSILON: Final = 1e-3
QUANTILES: Final = 4

Promise: TypeAlias = tuple[str, str]
"""Precision and exactness."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Who wrote, how many rows at once, at which precision, under which promise."""

    dtype: str
    exact: str
    mode: str
    plan: str | None
    batch: int

    @classmethod
    def of(cls, verdict: Verdict) -> "Setting":
        """Return the setting of one text."""
        r = verdict.result
        return cls(dtype=r.dtype, exact=str(r.exact), mode=r.mode, plan=r.plan, batch=r.batch)

    @property
    def claimed(self) -> bool:
        """Whether these texts are promised to be plain decoding's own, token for token."""
        return self.exact == "token" or self.dtype == "float32"

    @property
    def label(self) -> str:
        """Mode and plan in words."""
        return " ".join(filter(None, (self.mode, self.plan)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """One text that is not the reference."""

    setting: Setting
    suite: str
    id: str
    parting: Parting

    def to_dict(self) -> dict[str, Any]:
        """Return the mismatch as plain JSON values."""
        return {**asdict(self.setting), "suite": self.suite, "id": self.id, **asdict(self.parting)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Contract:
    """What was promised, and what broke it.

    Attributes:
        epsilon: mixtures of experts may part where the reference's two best logits are at most this far apart.
        experts: whether the backbone is one; of a dense backbone every mismatch breaks the contract.
        texts: how many texts were promised to equal their reference.
        ties: promised texts that part within epsilon, experts only.
        broken: promised texts that part otherwise.
    """

    epsilon: float
    experts: bool
    texts: int
    ties: list[Mismatch]
    broken: list[Mismatch]

    @property
    def holds(self) -> bool:
        """Whether nothing broke it."""
        return not self.broken

    def to_dict(self) -> dict[str, Any]:
        """Return the contract as plain JSON values."""
        return {
            "holds": self.holds,
            "epsilon": self.epsilon,
            "experts": self.experts,
            "texts": self.texts,
            "ties": [mismatch.to_dict() for mismatch in self.ties],
            "broken": [mismatch.to_dict() for mismatch in self.broken],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantile:
    """Texts whose references are about as surprising to the backbone: perplexities, and how many are identical."""

    low: float
    high: float
    prompts: int
    identical: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The figures of one setting on one domain of one suite ("all" for several together).

    Attributes:
        prompts: texts behind the figures.
        identical: of them, those equal to the reference.
        identical_to_hf: of them, those equal to Hugging Face's `generate` at the same precision.
        partings: where the others leave the reference.
        tokens_per_cycle: pooled over all counts; None without drafts.
        speed: tokens per second against plain decoding at the same precision, promise and batch; None for itself.
        by_perplexity: the share split by quantiles of the reference's perplexity, the least first.
    """

    setting: Setting
    suite: str
    domain: str
    prompts: int
    identical: int
    identical_to_hf: int
    partings: list[Parting]
    tokens_per_cycle: float | None
    speed: Estimate | None
    by_perplexity: list[Quantile]

    @property
    def gaps(self) -> list[float]:
        """The known gaps of the partings."""
        return [parting.gap for parting in self.partings if parting.gap is not None]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain JSON values."""
        return {
            **asdict(self.setting),
            "claimed": self.setting.claimed,
            "suite": self.suite,
            "domain": self.domain,
            "prompts": self.prompts,
            "identical": self.identical,
            "identical_share": self.identical / self.prompts,
            "identical_to_hf": self.identical_to_hf,
            "identical_to_hf_share": self.identical_to_hf / self.prompts,
            "partings": [asdict(parting) for parting in self.partings],
            "tokens_per_cycle": self.tokens_per_cycle,
            "speed": None if self.speed is None else self.speed.to_dict(),
            "by_perplexity": [asdict(quantile) for quantile in self.by_perplexity],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Plainly:
    """What the references themselves say, at one precision and promise.

    Attributes:
        prompts, positions: how many texts and tokens.
        identical_to_hf: texts that Hugging Face's `generate` writes too.
        hf_partings: where the others part.
        close: for each margin, the share of positions whose gap is below it: what a recheck would look at again.
        conditions: device, attention function, threads, the probe's finding.
    """

    dtype: str
    exact: str
    prompts: int
    positions: int
    identical_to_hf: int
    hf_partings: list[Parting]
    close: dict[str, float]
    conditions: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditReport:
    """Everything that an audit found out about one model with one set of settings."""

    provenances: list[Record]
    contract: Contract
    plainly: list[Plainly]
    summaries: list[Summary]

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings that all lines share; empty where no provenance record says."""
        return self.provenances[-1]["settings"] if self.provenances else {}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "provenance": self.provenances,
            "contract": self.contract.to_dict(),
            "references": [plainly.to_dict() for plainly in self.plainly],
            "summaries": [summary.to_dict() for summary in self.summaries],
        }


def read_audit(path: Path, configuration: str, *, epsilon: float = EPSILON) -> AuditReport:
    """Read what a file holds of one audited configuration; raises DataError where it holds nothing of it."""
    records = read_records(path)
    references, verdicts = read(records, configuration, where=str(path))
    if not verdicts:
        raise DataError(f"{path}: at least one audited text of configuration {configuration} is required, found none")
    own = [r for r in records if r.get("kind") == lines.PROVENANCE and r.get("configuration") == configuration]
    experts = any(record["settings"]["experts"] for record in own)
    return AuditReport(
        provenances=own,
        contract=contract(verdicts, epsilon=epsilon, experts=experts),
        plainly=plainly(references, verdicts),
        summaries=summaries(references, verdicts),
    )


def contract(verdicts: Iterable[Verdict], *, epsilon: float = EPSILON, experts: bool = False) -> Contract:
    """Hold texts against what is promised: all of float32's, and at any precision those of exact="token"."""
    texts = 0
    ties: list[Mismatch] = []
    broken: list[Mismatch] = []
    for verdict in verdicts:
        setting, at = Setting.of(verdict), verdict.result.diverges_at
        texts += setting.claimed
        if setting.claimed and at is not None:
            tied = experts and verdict.gap is not None and verdict.gap <= epsilon
            parting = Parting(at, verdict.gap)
            mismatch = Mismatch(setting=setting, suite=verdict.result.suite, id=verdict.result.id, parting=parting)
            (ties if tied else broken).append(mismatch)
    return Contract(epsilon=epsilon, experts=experts, texts=texts, ties=ties, broken=broken)


def plainly(references: Sequence[Reference], verdicts: Sequence[Verdict]) -> list[Plainly]:
    """Return what the references say, for each precision and promise."""
    known = {(v.result.dtype, v.result.exact): v.conditions for v in verdicts}
    out = []
    for (dtype, exact), part in split(references, lambda reference: (reference.dtype, reference.exact)):
        positions = sum(reference.tokens for reference in part)
        counts = np.sum([reference.close for reference in part], axis=0)
        out.append(
            Plainly(
                dtype=dtype,
                exact=exact,
                prompts=len(part),
                positions=positions,
                identical_to_hf=sum(reference.hf is None for reference in part),
                hf_partings=[reference.hf for reference in part if reference.hf is not None],
                close={str(margin): float(count / positions) for margin, count in zip(MARGINS, counts, strict=True)},
                conditions=known.get((dtype, exact), {}),
            )
        )
    return out


def summaries(references: Sequence[Reference], verdicts: Sequence[Verdict], *, seed: int = 0) -> list[Summary]:
    """Return figures for every setting, on each domain of each suite and on all together."""
    perplexities = {reference.key: reference.perplexity for reference in references}
    verdict_of = {(v.result.prompt, v.result.contender): v for v in verdicts}
    order = _order(verdicts)
    out = []
    for (suite, domain), results in sections([verdict.result for verdict in verdicts]):
        section = [verdict_of[result.prompt, result.contender] for result in results]
        by_setting = dict(split(section, Setting.of))
        for setting in filter(by_setting.__contains__, order):
            plain = Setting(dtype=setting.dtype, exact=setting.exact, mode="ar", plan=None, batch=setting.batch)
            against = by_setting.get(plain, []) if setting.mode != "ar" else []
            out.append(_summary(setting, suite, domain, by_setting[setting], against, perplexities, seed))
    return out


def widest(summaries: Sequence[Summary]) -> list[Summary]:
    """Return the summaries of all suites and domains together."""
    last = summaries[-1]
    return [s for s in summaries if (s.suite, s.domain) == (last.suite, last.domain)]


def _order(verdicts: Sequence[Verdict]) -> list[Setting]:
    """Return all settings as they first appear, those of one precision and promise together."""
    groups = split(dict.fromkeys(map(Setting.of, verdicts)), lambda setting: (setting.dtype, setting.exact))
    return [setting for _, group in groups for setting in group]


def _summary(
    setting: Setting,
    suite: str,
    domain: str,
    part: Sequence[Verdict],
    plain: Sequence[Verdict],
    perplexities: Mapping[Key, float],
    seed: int,
) -> Summary:
    results = [verdict.result for verdict in part]
    cycles = metrics.pooled(results, "tokens_per_cycle", seed=seed)
    ratio = metrics.faster(results, [verdict.result for verdict in plain], seed=seed)
    return Summary(
        setting=setting,
        suite=suite,
        domain=domain,
        prompts=len(part),
        identical=sum(r.diverges_at is None for r in results),
        identical_to_hf=sum(verdict.hf is None for verdict in part),
        partings=[Parting(v.result.diverges_at, v.gap) for v in part if v.result.diverges_at is not None],
        tokens_per_cycle=None if cycles is None else cycles.value,
        speed=None if ratio is None else ratio.totals,
        by_perplexity=quantiles([(perplexities[v.key], v.result.diverges_at is None) for v in part]),
    )


def quantiles(texts: Sequence[tuple[float, bool]], count: int = QUANTILES) -> list[Quantile]:
    """Split texts, given as perplexity and whether identical, into `count` parts as equal as can be, in order."""
    ordered = sorted(texts)
    cuts = [round(i * len(ordered) / count) for i in range(count + 1)]
    parts = [ordered[start:stop] for start, stop in pairwise(cuts)]
    return [
        Quantile(low=part[0][0], high=part[-1][0], prompts=len(part), identical=sum(same for _, same in part))
        for part in parts
        if part
    ]
