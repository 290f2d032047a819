"""Plots of a report, as PNG files."""

from collections.abc import Callable, Sequence
from pathlib import Path

from orthrus.bench.metrics import ALL, section, split
from orthrus.bench.plots import Album, bars, curves
from orthrus.bench.speed.report import Report, Summary
from orthrus.data.records import Record


def plot(report: Report, folder: Path) -> list[Path]:
    """Draw what a report holds into a folder (made if need be); returns the files.

    Per setting: the ratio of tokens per second by domain with its intervals, one file per baseline, and the
    share of drafts accepted by position; over all settings: tokens per second by batch; cost of passes by
    width, fused ones apart.

    Raises:
        DataError: matplotlib is not installed.
    """
    album = Album(folder)
    for (configuration, dtype, batch), part in split(report.summaries, lambda summary: summary.setting).items():
        name = f"{configuration[:6]}-{dtype}-batch{batch}"
        title = f"{report.settings_of(configuration).get('model', configuration)}, {dtype}, batch {batch}"
        for base in dict.fromkeys(base for summary in part for base in summary.against):
            _ratios(album, part, base, name, title)
        accepted = {f"{s.label}, {_section(s)}": s.accepted_per_position for s in part if s.accepted_per_position}
        if accepted:
            labels = {"xlabel": "position in the block", "ylabel": "share of drafts accepted", "title": title}
            with album.picture(f"accepted-{name}.png", ylim=(0, 1), **labels) as axes:
                curves(axes, {label: list(enumerate(shares, start=1)) for label, shares in accepted.items()})
    if len({summary.setting[2] for summary in report.summaries}) > 1:
        with album.picture(
            "throughput.png", xlabel="batch", ylabel="tokens/s in all", title="Throughput by batch"
        ) as axes:
            curves(axes, _throughput(report), doubling=True)
    for name, title, xlabel, kind_of in (
        ("passes.png", "Cost of passes by width", "positions of the pass", _of_width),
        ("fused.png", "Cost of fused passes by width", "positions verified", _of_stops),
    ):
        if points := _passes(report, kind_of):
            with album.picture(name, title=title, xlabel=xlabel, ylabel="ms") as axes:
                curves(axes, points, doubling=True)
    return album.files


def _ratios(album: Album, part: Sequence[Summary], base: str, name: str, title: str) -> None:
    """Draw a bar per domain and contender, with its 95 % interval, and a line at equal speed."""
    rated = split((summary for summary in part if base in summary.against), lambda summary: summary.label)
    with album.picture(f"ratio-{base}-{name}.png", title=title, ylabel=f"tokens/s, ratio to {base}") as axes:
        bars(axes, {who: {_section(s): s.against[base].totals for s in of_who} for who, of_who in rated.items()})
        axes.axhline(1, color="black", linewidth=0.8)


def _throughput(report: Report) -> dict[str, list[tuple[float, float]]]:
    """Return tokens per second by batch, of each contender, precision and configuration, over the widest section."""
    several = len({summary.setting[0] for summary in report.summaries}) > 1
    widest = {s.setting: (s.suite, s.domain) for s in report.summaries}  # the last section of a setting
    points: dict[str, list[tuple[float, float]]] = {}
    for summary in report.summaries:
        configuration, dtype, batch = summary.setting
        if (summary.suite, summary.domain) != widest[summary.setting]:
            continue
        label = f"{summary.label}, {dtype}" + ("" if summary.suite == ALL else f", {_section(summary)}")
        if several:  # as files of plots name it
            device = report.settings_of(configuration).get("device")
            label += f", {configuration[:6]}" + (f" on {device}" if device else "")
        points.setdefault(label, []).append((batch, summary.tokens_per_second.value))
    return points


def _of_width(record: Record) -> str | None:
    """Name the curve of a pass by its width: verifications begin with the plain step."""
    return {"ar": "verify", "verify": "verify", "draft": "draft"}.get(record["pass"])


def _of_stops(record: Record) -> str | None:
    """Name the curve of a fused pass by its stop points."""
    if record["pass"] != "fused":
        return None
    return "all stops" if record["stops"] == record["width"] else f"{record['stops']} stops"


def _passes(report: Report, kind_of: Callable[[Record], str | None]) -> dict[str, list[tuple[float, float]]]:
    """Return milliseconds by width, of each kind and where it was timed: model and machine where there are several."""
    machines = report.machines()
    models = {record["model"] for record in report.passes}
    points: dict[str, list[tuple[float, float]]] = {}
    for record in report.passes:
        if kind := kind_of(record):
            where = [kind, record["dtype"], f"batch {record['batch']}", f"context {record['context']}"]
            where += [record["model"]] if len(models) > 1 else []
            where += [machines[record.get("provenance")]] if machines else []
            points.setdefault(", ".join(where), []).append((record["width"], 1000 * record["seconds"]))
    return points


def _section(summary: Summary) -> str:
    return section(summary.suite, summary.domain)
