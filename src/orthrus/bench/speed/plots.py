"""Plots of a report, as PNG files."""

from collections.abc import Sequence
from pathlib import Path

from orthrus.bench.metrics import section, split
from orthrus.bench.plots import Album, Curves, bars, curves
from orthrus.bench.speed.report import Report, Summary


def plot(report: Report, folder: Path) -> list[Path]:
    """Draw what a report holds into a folder; returns the files. Raises DataError without matplotlib.

    Per setting: the ratio of tokens per second by domain, one file per baseline, and the share of drafts accepted by
    position; over all settings: cost of passes by width.
    """
    album = Album(folder)
    for (configuration, dtype, batch), part in split(report.summaries, lambda summary: summary.setting).items():
        name = f"{configuration[:6]}-{dtype}-batch{batch}"
        title = f"{report.settings_of(configuration).get('model', configuration)}, {dtype}, batch {batch}"
        for base in dict.fromkeys(base for summary in part for base in summary.against):
            _ratios(album, part, base, name, title)
        accepted = {
            f"{s.contender.label}, {_section(s)}": s.accepted_per_position for s in part if s.accepted_per_position
        }
        if accepted:
            labels = {"xlabel": "position in the block", "ylabel": "share of drafts accepted", "title": title}
            with album.picture(f"accepted-{name}.png", ylim=(0, 1), **labels) as axes:
                curves(axes, {label: list(enumerate(shares, start=1)) for label, shares in accepted.items()})
    if report.passes:
        labels = {"title": "Cost of passes by width", "xlabel": "positions, of fused passes those verified"}
        with album.picture("passes.png", ylabel="ms", **labels) as axes:
            curves(axes, _passes(report), doubling=True)
    return album.files


def _ratios(album: Album, part: Sequence[Summary], base: str, name: str, title: str) -> None:
    """Draw a bar per domain and contender, with its 95 % interval, and a line at equal speed."""
    rated = split((summary for summary in part if base in summary.against), lambda summary: summary.contender.label)
    with album.picture(f"ratio-{base}-{name}.png", title=title, ylabel=f"tokens/s, ratio to {base}") as axes:
        bars(axes, {who: {_section(s): s.against[base].totals for s in of_who} for who, of_who in rated.items()})
        axes.axhline(1, color="black", linewidth=0.8)


def _passes(report: Report) -> Curves:
    """Return milliseconds by width, of each kind and where it was timed: model and machine where there are several.

    Verifications begin with the plain step; fused passes are told apart by their stop points.
    """
    machines = report.machines()
    models = {record["model"] for record in report.passes}
    points: dict[str, list[tuple[float, float]]] = {}
    for record in report.passes:
        stops = "all" if record.get("stops") == record["width"] else record.get("stops")
        kinds = {"ar": "verify", "verify": "verify", "draft": "draft", "fused": f"fused for {stops} stops"}
        if kind := kinds.get(record["pass"]):
            where = [kind, record["dtype"], f"batch {record['batch']}", f"context {record['context']}"]
            where += [record["model"]] if len(models) > 1 else []
            where += [machines[record.get("provenance")]] if machines else []
            points.setdefault(", ".join(where), []).append((record["width"], 1000 * record["seconds"]))
    return points


def _section(summary: Summary) -> str:
    return section(summary.suite, summary.domain)
