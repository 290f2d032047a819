"""An audit's plots, as PNG files. Plans are taken together: what they promise is the same."""

from pathlib import Path

from orthrus.bench.audit.report import AuditReport
from orthrus.bench.metrics import section, split
from orthrus.bench.plots import Album, bars


def plot(report: AuditReport, folder: Path) -> list[Path]:
    """Draw the share of identical texts by domain, for each batch size; raises DataError without matplotlib."""
    album = Album(folder)
    for batch, part in split(report.summaries, lambda summary: summary.setting.batch).items():
        shares: dict[str, dict[str, float]] = {}
        by_promise = split(part, lambda s: (f"{s.setting.dtype} {s.setting.exact} {s.setting.mode}", s.suite, s.domain))
        for (label, suite, domain), drawn in by_promise.items():
            share = sum(summary.identical for summary in drawn) / sum(summary.prompts for summary in drawn)
            shares.setdefault(label, {})[section(suite, domain)] = share
        labels = {"ylabel": "share of identical texts", "title": f"batch {batch}"}
        with album.picture(f"identical-batch{batch}.png", ylim=(0, 1.02), **labels) as axes:
            bars(axes, shares)
    return album.files
