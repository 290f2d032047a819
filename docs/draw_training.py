"""Draw docs/training.svg: loss and drafts kept over the steps of a view's training, from the log of its run.

    python docs/draw_training.py runs/smollm2/log.jsonl      # results/smollm2-training.jsonl unless given

A log is what `orthrus train` writes into `run.output`, or lines with the same keys. Steps that were taken again after
an interruption count once. matplotlib comes with the dev extras.
"""

import json
import sys
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
INK, QUIET, DRAWN = "#1f2933", "#616e7c", "#7c5cc4"
SMOOTH = 5  # reports in a moving mean


def steps_of(path: Path) -> dict[int, Mapping[str, Any]]:
    """Return the reports of a log by their step; of a step that was reported twice, the later one."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    reports = {line["step"]: line for line in lines if "loss" in line and line.get("event", "step") == "step"}
    return dict(sorted(reports.items()))


def smooth(values: list[float]) -> list[float]:
    """Return the mean of each value and those before it."""
    parts = [values[max(0, i + 1 - SMOOTH) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def draw(reports: Mapping[int, Mapping[str, Any]], path: Path) -> None:
    """Draw two panels: the loss, and the leading drafts of a block that the backbone agrees with."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    named = {"loss": "loss", "accepted": "drafts kept, of a block"}
    for axes, (name, title) in zip(panels, named.items(), strict=True):
        points = {step: line[name] for step, line in reports.items() if name in line}
        axes.plot(points.keys(), points.values(), ".", color=QUIET, markersize=3, alpha=0.5)
        axes.plot(points.keys(), smooth([*points.values()]), color=DRAWN)
        axes.set_title(title, color=INK)
        axes.set_xlabel("step", color=QUIET)
        axes.tick_params(colors=QUIET)
        axes.grid(alpha=0.3)
    written = StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    path.write_text(written.getvalue(), encoding="utf-8")


if __name__ == "__main__":
    mpl.rcParams |= {"svg.hashsalt": "orthrus", "svg.fonttype": "none", "font.family": "sans-serif"}
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "results" / "smollm2-training.jsonl"
    draw(steps_of(given), ROOT / "docs" / "training.svg")
