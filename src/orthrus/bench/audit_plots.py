"""An audit's plots, as PNG files.

Needs matplotlib; knows which curves answer which question.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orthrus.bench.audit_report import AuditReport, Summary, widest
from orthrus.bench.plots import Draw, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(report: AuditReport, folder: Path) -> list[Path]:
    """Draw shares by domain and by perplexity, and every parting, into a folder (made if need be).

    Raises DataError when matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    every = widest(report.summaries)
    parted = [summary for summary in every if summary.gaps]
    out = [
        save(folder / "identical.png", _bars(report.summaries)),
        save(folder / "perplexity.png", _quantiles(every)),
    ]
    return [*out, save(folder / "partings.png", _partings(parted))] if parted else out


def _bars(summaries: Sequence[Summary]) -> Draw:
    """Draw a bar per domain and setting."""
    places = list(dict.fromkeys(f"{s.suite} {s.domain}" for s in summaries))
    names = list(dict.fromkeys(map(_name, summaries)))

    def draw(axes: "Axes") -> None:
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            own = [s for s in summaries if _name(s) == name]
            lefts = [places.index(f"{s.suite} {s.domain}") + (number + 0.5) * width - 0.4 for s in own]
            axes.bar(lefts, [s.identical / s.prompts for s in own], width, label=name)
        axes.set_xticks(range(len(places)), places, rotation=30, ha="right")
        axes.set(ylabel="share of identical texts", ylim=(0, 1.02))
        _legend(axes)

    return draw


def _quantiles(summaries: Sequence[Summary]) -> Draw:
    """Draw the share of identical texts over the perplexity of their references."""

    def draw(axes: "Axes") -> None:
        for s in summaries:
            middles = [(quantile.low * quantile.high) ** 0.5 for quantile in s.by_perplexity]
            axes.plot(middles, [q.identical / q.prompts for q in s.by_perplexity], marker=".", label=_name(s))
        axes.set_xscale("log")
        axes.set(xlabel="perplexity of plain decoding's text", ylabel="share of identical texts", ylim=(0, 1.02))
        _legend(axes)

    return draw


def _partings(summaries: Sequence[Summary]) -> Draw:
    """Draw a point per text that parts: where, and how close the two best logits were."""

    def draw(axes: "Axes") -> None:
        for s in summaries:
            known = [(parting.at, parting.gap) for parting in s.partings if parting.gap is not None]
            axes.plot(*zip(*known, strict=True), ".", label=_name(s))
        axes.set_yscale("symlog", linthresh=1e-4)
        axes.set(xlabel="position of the first token that differs", ylabel="best logit minus second best")
        _legend(axes)

    return draw


def _name(summary: Summary) -> str:
    s = summary.setting
    return f"{s.dtype} {s.exact} {s.label}, batch {s.batch}"


def _legend(axes: "Axes") -> None:
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))
