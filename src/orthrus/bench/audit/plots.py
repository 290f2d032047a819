"""An audit's plots, as PNG files.

Plans are taken together: what they promise is the same.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orthrus.bench.audit.report import AuditReport, Summary, widest
from orthrus.bench.speed.plots import Draw, legend, save, section
from orthrus.bench.speed.report import split

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(report: AuditReport, folder: Path) -> list[Path]:
    """Draw shares by domain and by perplexity, for each batch size, and every parting, into a folder (made if need be).

    Raises DataError when matplotlib is not installed.
    """
    every = widest(report.summaries)
    out = []
    for batch in dict.fromkeys(summary.setting.batch for summary in report.summaries):
        part = [summary for summary in report.summaries if summary.setting.batch == batch]
        out.append(save(folder / f"identical-batch{batch}.png", _domains(part, batch)))
        out.append(save(folder / f"perplexity-batch{batch}.png", _quantiles(widest(part), batch)))
    parted = [summary for summary in every if summary.gaps]
    return [*out, save(folder / "partings.png", _partings(parted))] if parted else out


def _domains(summaries: Sequence[Summary], batch: int) -> Draw:
    """Draw a bar per domain and curve."""
    sections = list(dict.fromkeys(map(_section, summaries)))
    curves = list(split(summaries, _curve))

    def draw(axes: "Axes") -> None:
        width = 0.8 / len(curves)
        for number, (label, drawn) in enumerate(curves):
            shares = {name: _share([(s.identical, s.prompts) for s in part]) for name, part in split(drawn, _section)}
            lefts = [sections.index(name) + (number + 0.5) * width - 0.4 for name in shares]
            axes.bar(lefts, list(shares.values()), width, label=label)
        axes.set_xticks(range(len(sections)), sections, rotation=30, ha="right")
        axes.set(ylabel="share of identical texts", ylim=(0, 1.02), title=f"batch {batch}")
        legend(axes)

    return draw


def _quantiles(summaries: Sequence[Summary], batch: int) -> Draw:
    """Draw a curve over the quantiles of perplexity, each a little apart, because many of them lie at 1."""

    def draw(axes: "Axes") -> None:
        most = 0
        for number, (label, drawn) in enumerate(split(summaries, _curve)):
            parts = list(zip(*(s.by_perplexity for s in drawn), strict=False))
            shares = [_share([(quantile.identical, quantile.prompts) for quantile in part]) for part in parts]
            axes.plot([i + 1 + 0.03 * number for i in range(len(shares))], shares, marker=".", label=label)
            most = max(most, len(shares))
        axes.set_xticks(range(1, most + 1))
        axes.set(xlabel="quantile of the perplexity of plain decoding's text", ylabel="share of identical texts")
        axes.set(ylim=(0, 1.02), title=f"batch {batch}")
        legend(axes)

    return draw


def _partings(summaries: Sequence[Summary]) -> Draw:
    """Draw a point per text that parts: where, and how close the two best logits were."""

    def draw(axes: "Axes") -> None:
        for label, drawn in split(summaries, _curve):
            partings = [(parting.at, parting.gap) for s in drawn for parting in s.partings if parting.gap is not None]
            axes.plot([at for at, _ in partings], [gap for _, gap in partings], ".", label=label)
        axes.set_yscale("symlog", linthresh=1e-4)
        axes.set_ylim(bottom=0)
        axes.set(xlabel="position of the first token that differs", ylabel="best logit minus second best")
        legend(axes)

    return draw


def _curve(summary: Summary) -> str:
    s = summary.setting
    return f"{s.dtype} {s.exact} {s.mode}"


def _section(summary: Summary) -> str:
    return section(summary.suite, summary.domain)


def _share(counts: Sequence[tuple[int, int]]) -> float:
    return sum(part for part, _ in counts) / sum(whole for _, whole in counts)
