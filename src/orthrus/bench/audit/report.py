"""From an audit's lines to figures, setting by setting. Pure functions of references and verdicts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from orthrus.bench import lines, metrics
from orthrus.bench.audit.contract import EPSILON, Contract, contract
from orthrus.bench.audit.verdicts import MARGINS, Divergence, Reference, Setting, Verdict, read
from orthrus.bench.metrics import Estimate, sections, split
from orthrus.data.records import Record, read_records
from orthrus.errors import DataError

QUANTILES: Final = 4


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
        identical, identical_to_hf: texts equal to the reference; to Hugging Face's `generate` at the same precision.
        tokens_per_cycle, tokens_per_forward: pooled over all counts; None without drafts.
        least_tokens_per_forward: of the text with the fewest.
        speed: tokens per second against plain decoding at the same precision, promise and batch; None for itself.
        by_perplexity: the share split by quantiles of the reference's perplexity, the least first.
    """

    setting: Setting
    suite: str
    domain: str
    prompts: int
    identical: int
    identical_to_hf: int
    partings: list[Divergence]
    tokens_per_cycle: float | None
    tokens_per_forward: float
    least_tokens_per_forward: float
    below_one_token_per_forward: int
    speed: Estimate | None
    by_perplexity: list[Quantile]

    @property
    def gaps(self) -> list[float]:
        return [parting.gap for parting in self.partings if parting.gap is not None]

    def to_dict(self) -> dict[str, Any]:
        figures = asdict(self)
        return {
            **figures.pop("setting"),
            "claimed": self.setting.claimed,
            **figures,
            "identical_share": self.identical / self.prompts,
            "identical_to_hf_share": self.identical_to_hf / self.prompts,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainSummary:
    """What the references themselves say, at one precision and promise.

    Attributes:
        identical_to_hf: texts that Hugging Face's `generate` writes too; `hf_partings`, where the others part.
        close: for each margin, the share of positions whose gap is below it: what a recheck would look at again.
        conditions: device, attention function, operators, threads, the probe's finding.
    """

    dtype: str
    exact: str
    prompts: int
    positions: int
    identical_to_hf: int
    hf_partings: list[Divergence]
    close: dict[str, float]
    conditions: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditReport:
    """Everything that an audit found out about one model with one set of settings."""

    provenances: list[Record]
    contract: Contract
    plain: list[PlainSummary]
    summaries: list[Summary]

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings that all lines share; empty where no provenance record says."""
        return self.provenances[-1]["settings"] if self.provenances else {}

    def to_dict(self) -> dict[str, Any]:
        return {
            "provenance": self.provenances,
            "contract": self.contract.to_dict(),
            "references": [asdict(plain) for plain in self.plain],
            "summaries": [summary.to_dict() for summary in self.summaries],
        }


def read_audit(path: Path, configuration: str, *, epsilon: float = EPSILON) -> AuditReport:
    """Read what a file holds of one audited configuration; raises DataError where it holds nothing of it."""
    records = read_records(path)
    references, verdicts = read(records, configuration, where=str(path))
    if not verdicts:
        raise DataError(f"{path}: at least one audited text of configuration {configuration} is required, found none")
    heads = [r for r in records if r.get("kind") == lines.PROVENANCE and r.get("configuration") == configuration]
    experts = any(record["settings"]["experts"] for record in heads)
    return AuditReport(
        provenances=heads,
        contract=contract(verdicts, epsilon=epsilon, experts=experts),
        plain=plain_summaries(references, verdicts),
        summaries=summaries(references, verdicts),
    )


def plain_summaries(references: Sequence[Reference], verdicts: Sequence[Verdict]) -> list[PlainSummary]:
    """Return what the references say, for each precision and promise."""
    conditions = {(v.dtype, str(v.exact)): v.conditions for v in verdicts}
    out = []
    for (dtype, exact), part in split(references, lambda reference: (reference.dtype, reference.exact)).items():
        positions = sum(reference.tokens for reference in part)
        counts = np.sum([reference.close for reference in part], axis=0)
        out.append(
            PlainSummary(
                dtype=dtype,
                exact=exact,
                prompts=len(part),
                positions=positions,
                identical_to_hf=sum(reference.hf is None for reference in part),
                hf_partings=[reference.hf for reference in part if reference.hf is not None],
                close={str(margin): float(count / positions) for margin, count in zip(MARGINS, counts, strict=True)},
                conditions=conditions.get((dtype, exact), {}),
            )
        )
    return out


def summaries(references: Sequence[Reference], verdicts: Sequence[Verdict]) -> list[Summary]:
    """Return figures for every setting, on each domain of each suite and on all together."""
    perplexities = {reference.key: reference.perplexity for reference in references}
    settings = dict.fromkeys(verdict.setting for verdict in verdicts)
    of_promise = split(settings, lambda setting: (setting.dtype, setting.exact))  # one precision and promise together
    order = [setting for group in of_promise.values() for setting in group]
    out = []
    for (suite, domain), part in sections(verdicts):
        by_setting = split(part, lambda verdict: verdict.setting)
        for setting in filter(by_setting.__contains__, order):
            plain = Setting(dtype=setting.dtype, exact=setting.exact, mode="ar", plan=None, batch=setting.batch)
            texts = by_setting[setting]
            cycles = metrics.pooled(texts, "tokens_per_cycle")
            forward = [verdict.stats["tokens_per_forward"] for verdict in texts]
            ratio = metrics.faster(texts, by_setting.get(plain, []) if setting.mode != "ar" else [])
            summary = Summary(
                setting=setting,
                suite=suite,
                domain=domain,
                prompts=len(texts),
                identical=sum(verdict.diverges_at is None for verdict in texts),
                identical_to_hf=sum(verdict.hf is None for verdict in texts),
                partings=[parting for v in texts if (parting := v.parting) is not None],
                tokens_per_cycle=None if cycles is None else cycles.value,
                tokens_per_forward=sum(verdict.tokens for verdict in texts) / sum(verdict.passes for verdict in texts),
                least_tokens_per_forward=min(forward),
                below_one_token_per_forward=sum(value < 1 for value in forward),
                speed=None if ratio is None else ratio.totals,
                by_perplexity=quantiles([(perplexities[v.key], v.diverges_at is None) for v in texts]),
            )
            out.append(summary)
    return out


def widest(summaries: Sequence[Summary]) -> list[Summary]:
    """Return the summaries of all suites and domains together."""
    last = summaries[-1]
    return [s for s in summaries if (s.suite, s.domain) == (last.suite, last.domain)]


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
