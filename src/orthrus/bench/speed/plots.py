"""Plots of a report, as PNG files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from orthrus.bench.speed.report import ALL, Report, Summary
from orthrus.errors import DataError
from orthrus.writing import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Draw: TypeAlias = Callable[["Axes"], None]


def plot(report: Report, folder: Path) -> list[Path]:
    """Draw what a report holds into a folder (made if need be); returns the files.

    Per setting: the ratio of tokens per second by domain with its intervals, one file per baseline, and the
    share of drafts accepted by position; over all settings: tokens per second by batch; cost of passes by
    width, fused ones apart.

    Raises:
        DataError: matplotlib is not installed.
    """
    out = []
    for setting in dict.fromkeys(summary.setting for summary in report.summaries):
        part = [summary for summary in report.summaries if summary.setting == setting]
        name = "-".join((setting[0][:6], setting[1], f"batch{setting[2]}"))
        title = f"{report.settings_of(setting[0]).get('model', setting[0])}, {setting[1]}, batch {setting[2]}"
        for base in dict.fromkeys(base for summary in part for base in summary.against):
            out.append(save(folder / f"ratio-{base}-{name}.png", _ratios(part, base, title)))
        if any(summary.accepted_per_position for summary in part):
            out.append(save(folder / f"accepted-{name}.png", _positions(part, title)))
    if len({summary.setting[2] for summary in report.summaries}) > 1:
        out.append(save(folder / "throughput.png", _throughput(report)))
    if report.passes:
        out.append(save(folder / "passes.png", _passes(report)))
    if any(record["pass"] == "fused" for record in report.passes):
        out.append(save(folder / "fused.png", _fused(report)))
    return out


def _ratios(part: Sequence[Summary], base: str, title: str) -> Draw:
    """Draw a bar per domain and contender, with its 95 % interval, and a line at equal speed."""
    rated = [summary for summary in part if base in summary.against]
    sections = list(dict.fromkeys(_section(summary) for summary in rated))
    labels = list(dict.fromkeys(summary.label for summary in rated))

    def draw(axes: "Axes") -> None:
        width = 0.8 / len(labels)
        for number, label in enumerate(labels):
            drawn = [summary for summary in rated if summary.label == label]
            totals = [summary.against[base].totals for summary in drawn]
            axes.bar(
                [sections.index(_section(summary)) + (number + 0.5) * width - 0.4 for summary in drawn],
                [t.value for t in totals],
                width,
                yerr=[[t.value - t.low for t in totals], [t.high - t.value for t in totals]],
                capsize=2,
                label=label,
            )
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(sections)), sections, rotation=30, ha="right")
        axes.set_ylabel(f"tokens/s, ratio to {base}")
        axes.set_title(title)
        legend(axes)

    return draw


def _positions(part: Sequence[Summary], title: str) -> Draw:
    """Draw one curve per domain (its colour) and contender (its dashes)."""
    drafted = [summary for summary in part if summary.accepted_per_position]

    def draw(axes: "Axes") -> None:
        for summary in drafted:
            axes.plot(
                range(1, len(summary.accepted_per_position) + 1),
                summary.accepted_per_position,
                marker=".",
                label=f"{_section(summary)}, {summary.label}",
                color=_colour([_section(one) for one in drafted], _section(summary)),
                linestyle=_dashes([one.label for one in drafted], summary.label),
            )
        axes.set(xlabel="position in the block", ylabel="share of drafts accepted", ylim=(0, 1), title=title)
        legend(axes)

    return draw


def _throughput(report: Report) -> Draw:
    """Draw tokens per second by batch, a curve per contender, precision and configuration, over the widest section."""
    several = len({summary.setting[0] for summary in report.summaries}) > 1
    widest = {s.setting: (s.suite, s.domain) for s in report.summaries}  # the last section of a setting
    curves: dict[str, list[tuple[int, float]]] = {}
    for summary in report.summaries:
        if (summary.suite, summary.domain) != widest[summary.setting]:
            continue
        whole = "" if summary.suite == ALL else f", {_section(summary)}"
        point = summary.setting[2], summary.tokens_per_second.value
        configuration = f", {_configuration(report, summary)}" if several else ""
        curves.setdefault(f"{summary.label}, {summary.setting[1]}{whole}{configuration}", []).append(point)
    return _curves(curves, xlabel="batch", ylabel="tokens/s in all", title="Throughput by batch")


def _configuration(report: Report, summary: Summary) -> str:
    """Name a configuration as files of plots do, and say what it was measured on."""
    device = report.settings_of(summary.setting[0]).get("device")
    return summary.setting[0][:6] + (f" on {device}" if device else "")


def _passes(report: Report) -> Draw:
    """Draw milliseconds by width: drafts, and verifications from the plain step of width 1 on."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record, where in zip(report.passes, _where(report), strict=True):
        if record["pass"] not in ("ar", "draft", "verify"):
            continue
        kind = "draft" if record["pass"] == "draft" else "verify"
        curves.setdefault(f"{kind}, {where}", []).append((record["width"], 1000 * record["seconds"]))
    return _curves(curves, xlabel="positions of the pass", ylabel="ms", title="Cost of passes by width")


def _fused(report: Report) -> Draw:
    """Draw milliseconds of fused passes by positions verified, a curve per number of stop points."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record, where in zip(report.passes, _where(report), strict=True):
        if record["pass"] != "fused":
            continue
        stops = "all" if record["stops"] == record["width"] else str(record["stops"])
        curves.setdefault(f"{stops} stops, {where}", []).append((record["width"], 1000 * record["seconds"]))
    return _curves(curves, xlabel="positions verified", ylabel="ms", title="Cost of fused passes by width")


def _where(report: Report) -> list[str]:
    """Say what each pass was timed on: its model and machine only where there are several."""
    machines = report.machines()
    models = {record["model"] for record in report.passes}
    out = []
    for record in report.passes:
        parts = [record["dtype"], f"batch {record['batch']}", f"context {record['context']}"]
        parts += [record["model"]] if len(models) > 1 else []
        parts += [machines[record.get("provenance")]] if machines else []
        out.append(", ".join(parts))
    return out


def _curves(curves: dict[str, list[tuple[int, float]]], *, xlabel: str, ylabel: str, title: str) -> Draw:
    """Draw curves over a logarithmic scale; the first word of a label picks the dashes, the rest the colour."""
    firsts, rests = zip(*(label.partition(", ")[::2] for label in curves), strict=True)

    def draw(axes: "Axes") -> None:
        for (label, points), first, rest in zip(curves.items(), firsts, rests, strict=True):
            xs, ys = zip(*sorted(points), strict=True)
            colour, dashes = _colour(rests, rest), _dashes(firsts, first)
            axes.plot(xs, ys, marker=".", label=label, color=colour, linestyle=dashes)
        ticks = sorted({x for points in curves.values() for x, _ in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, map(str, ticks))
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
        axes.set_ylim(bottom=0)
        legend(axes)

    return draw


def _colour(names: Sequence[str], name: str) -> str:
    return f"C{list(dict.fromkeys(names)).index(name) % 10}"


def _dashes(names: Sequence[str], name: str) -> str:
    return ("-", "--", ":", "-.")[list(dict.fromkeys(names)).index(name) % 4]


def _section(summary: Summary) -> str:
    return section(summary.suite, summary.domain)


def section(suite: str, domain: str) -> str:
    """Name a domain of a suite, and not twice where the suite's name says it."""
    return suite if domain in suite else f"{suite} {domain}"


def legend(axes: "Axes") -> None:
    """Name the curves beside the axes, where they hide none."""
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))


def save(path: Path, draw: Draw) -> Path:
    """Draw one figure into a PNG file; raises DataError when matplotlib is not installed."""
    figure = _figure()
    draw(figure.add_subplot())
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return path


def _figure() -> Any:
    # Lazily, because it is an extra; without pyplot, so that no global state and no display is needed.
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("plots need matplotlib, which is not installed: pip install 'orthrus-lm[bench]'") from error
    return Figure(figsize=(10, 4.5), layout="constrained")
