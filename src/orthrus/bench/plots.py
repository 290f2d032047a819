"""Pictures of any measurement, as PNG files: bars and curves, each with a legend beside."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from orthrus.bench.metrics import Estimate
from orthrus.errors import DataError
from orthrus.writing import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curves: TypeAlias = Mapping[str, Sequence[tuple[float, float]]]
"""Points by the label of their curve."""


class Album:
    """The pictures of a folder, which is made if need be; `files` is what was drawn, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[Path] = []

    @contextmanager
    def picture(self, name: str, **properties: Any) -> "Iterator[Axes]":
        """Give axes with these properties to draw on, and save them under that name; DataError without matplotlib."""
        # Lazily, because it is an extra; without pyplot, so that no global state and no display is needed.
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise DataError("plots need matplotlib, which is not installed: pip install 'orthrus-lm[bench]'") from error
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        axes = figure.add_subplot()
        axes.set(**properties)
        yield axes
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))
        with replacing(self.folder / name) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
        self.files.append(self.folder / name)


def bars(axes: "Axes", heights: Mapping[str, Mapping[str, float | Estimate]]) -> None:
    """Draw a bar per section and label, by label and section; an estimate with its interval."""
    sections = list(dict.fromkeys(section for of_label in heights.values() for section in of_label))
    width = 0.8 / len(heights)
    for number, (label, of_label) in enumerate(heights.items()):
        estimates = [one if isinstance(one, Estimate) else Estimate(one, nan, nan) for one in of_label.values()]
        axes.bar(
            [sections.index(section) + (number + 0.5) * width - 0.4 for section in of_label],
            [one.value for one in estimates],
            width,
            yerr=[[one.value - one.low for one in estimates], [one.high - one.value for one in estimates]],
            capsize=2,
            label=label,
        )
    axes.set_xticks(range(len(sections)), sections, rotation=30, ha="right")


def curves(axes: "Axes", points: Curves, *, doubling: bool = False) -> None:
    """Draw a curve per label; what a label says before its first comma picks the dashes, the rest the colour.

    With `doubling` the x axis is logarithmic, with a tick at each point, and the y axis from 0 on.
    """
    names = [label.partition(", ")[::2] if ", " in label else ("", label) for label in points]
    firsts, rests = (list(dict.fromkeys(name[part] for name in names)) for part in (0, 1))
    for (label, of_label), (first, rest) in zip(points.items(), names, strict=True):
        axes.plot(
            [x for x, _ in sorted(of_label)],
            [y for _, y in sorted(of_label)],
            marker=".",
            label=label,
            color=f"C{rests.index(rest) % 10}",
            linestyle=("-", "--", ":", "-.")[firsts.index(first) % 4],
        )
    if doubling:
        ticks = sorted({x for of_label in points.values() for x, _ in of_label})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, map(str, ticks))
        axes.set_ylim(bottom=0)
