"""An audit's plots, as PNG files.

Plans are taken together: what they promise is the same.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from orthrus.bench.audit.report import AuditReport, Summary, widest
from orthrus.bench.metrics import section, split
from orthrus.bench.plots import Album, bars, curves


def plot(report: AuditReport, folder: Path) -> list[Path]:
    """Draw shares by domain and by perplexity, for each batch size, and every parting, into a folder (made if need be).

    Raises DataError when matplotlib is not installed.
    """
    album = Album(folder)
    for batch, part in split(report.summaries, lambda summary: summary.setting.batch).items():
        shared = {"ylabel": "share of identical texts", "ylim": (0, 1.02), "title": f"batch {batch}"}
        with album.picture(f"identical-batch{batch}.png", **shared) as axes:
            bars(axes, {label: _by_section(drawn) for label, drawn in split(part, _curve).items()})
        shared |= {"xlabel": "quantile of the perplexity of plain decoding's text"}
        with album.picture(f"perplexity-batch{batch}.png", **shared) as axes:
            drawn = split(widest(part), _curve).items()
            curves(axes, {label: _by_quantile(of_label, number) for number, (label, of_label) in enumerate(drawn)})
            axes.set_xticks(range(1, 1 + max(len(summary.by_perplexity) for summary in widest(part))))
    parted = split((summary for summary in widest(report.summaries) if summary.gaps), _curve)
    if parted:
        shared = {"xlabel": "position of the first token that differs", "ylabel": "best logit minus second best"}
        with album.picture("partings.png", **shared) as axes:
            curves(axes, {label: _partings(drawn) for label, drawn in parted.items()}, line=False)
            axes.set_yscale("symlog", linthresh=1e-4)
            axes.set_ylim(bottom=0)
    return album.files


def _by_section(summaries: Sequence[Summary]) -> dict[str, float]:
    sections = split(summaries, lambda summary: section(summary.suite, summary.domain))
    return {name: _share((s.identical, s.prompts) for s in part) for name, part in sections.items()}


def _by_quantile(summaries: Sequence[Summary], number: int) -> list[tuple[float, float]]:
    """Return points over the quantiles, those of each curve a little apart, because many of them lie at 1."""
    parts = zip(*(summary.by_perplexity for summary in summaries), strict=False)
    shares = [_share((quantile.identical, quantile.prompts) for quantile in part) for part in parts]
    return [(place + 0.03 * number, share) for place, share in enumerate(shares, start=1)]


def _partings(summaries: Sequence[Summary]) -> list[tuple[float, float]]:
    """Return where each text parts, and how close the two best logits were."""
    partings = [parting for summary in summaries for parting in summary.partings]
    return [(parting.at, parting.gap) for parting in partings if parting.gap is not None]


def _curve(summary: Summary) -> str:
    s = summary.setting
    return f"{s.dtype} {s.exact} {s.mode}"


def _share(counts: Iterable[tuple[int, int]]) -> float:
    parts, wholes = zip(*counts, strict=True)
    return float(sum(parts) / sum(wholes))
