"""Draw docs/cycle.svg: one cycle of decoding, one row of the cache, four moments.

Run it from anywhere: `python docs/draw_cycle.py` (matplotlib comes with the dev extras).
"""

from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

PREFIX = ["Ann", "has", "3", "pens"]
ANCHOR = "and"
DRAFTS = ["buys", "4", "more", ".", "They"]
BACKBONE = ["buys", "4", "more", ",", "so", "she"]
ACCEPTED = 3
N = len(PREFIX)

INK, QUIET = "#1f2933", "#616e7c"
KEPT, ANCHOR_FILL, MASK, DRAFT = "#dbe4ee", "#ffd9a0", "#f1ebfa", "#d6c5f0"
GOOD, BAD = "#bfe5c4", "#f6c9c4"


def box(axes: Axes, column: float, y: float, text: str, fill: str, *, dashed: bool = False) -> None:
    """One token in the slot of its position."""
    shape = FancyBboxPatch(
        (column + 0.06, y),
        0.88,
        0.62,
        boxstyle="round,pad=0,rounding_size=0.1",
        facecolor=fill,
        edgecolor=QUIET if dashed else INK,
        linestyle="--" if dashed else "-",
        linewidth=0.9,
    )
    axes.add_patch(shape)
    axes.text(column + 0.5, y + 0.3, text, ha="center", va="center", color=INK, fontsize=12)


def title(axes: Axes, y: float, head: str, *lines: str) -> None:
    """What a moment is called and what happens in it, on the left."""
    axes.text(-4.2, y + 0.42, head, color=INK, fontsize=14, fontweight="bold", va="center")
    for i, line in enumerate(lines):
        axes.text(-4.2, y + 0.02 - 0.39 * i, line, color=QUIET, fontsize=11.5, va="center")


def prefix(axes: Axes, y: float, fill: str = KEPT) -> None:
    """The cached text that every pass reads."""
    for i, token in enumerate(PREFIX):
        box(axes, i, y, token, fill)


def length_mark(axes: Axes, column: int, top: float, bottom: float, text: str) -> None:
    """The row's length: the border between what is kept and what is scratch."""
    axes.plot([column, column], [top, bottom], color="#c2410c", linewidth=1.8)
    axes.text(column, top + 0.12, text, color="#c2410c", fontsize=11.5, ha="center", va="bottom")


def step_down(axes: Axes, column: float, start: float, end: float) -> None:
    """What a slot says about the position after it."""
    arrow = {"arrowstyle": "-|>", "color": QUIET, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 1}
    axes.annotate("", xy=(column + 1.5, end), xytext=(column + 0.6, start), arrowprops=arrow)


def before(axes: Axes, y: float) -> None:
    """The row as the last cycle left it."""
    title(axes, y, "Before", "cached text; its last token,", "the anchor, is at position n")
    prefix(axes, y)
    box(axes, N, y, ANCHOR, ANCHOR_FILL)
    length_mark(axes, N, y + 0.78, y - 0.16, "length n")


def draft(axes: Axes, y: float) -> None:
    """One pass of the diffusion view."""
    title(axes, y, "1  Draft", "diffusion view, one pass:", "each slot sees the prefix", "and the whole block")
    prefix(axes, y)
    box(axes, N, y, ANCHOR, ANCHOR_FILL)
    for j in range(len(DRAFTS)):
        box(axes, N + 1 + j, y, "mask", MASK, dashed=True)
        box(axes, N + 1 + j, y - 1.12, DRAFTS[j], DRAFT)
        step_down(axes, N + j, y, y - 0.5)


def verify(axes: Axes, y: float) -> None:
    """One pass of the frozen backbone."""
    title(
        axes,
        y,
        "2  Verify",
        "frozen backbone, one causal",
        "pass over anchor and drafts,",
        "written over the draft's keys",
    )
    prefix(axes, y)
    box(axes, N, y, ANCHOR, ANCHOR_FILL)
    for j, token in enumerate(DRAFTS):
        box(axes, N + 1 + j, y, token, DRAFT)
    for j, token in enumerate(BACKBONE):
        fill = GOOD if j < ACCEPTED else ANCHOR_FILL if j == ACCEPTED else "#ffffff"
        box(axes, N + 1 + j, y - 1.12, token, fill, dashed=j > ACCEPTED)
        step_down(axes, N + j, y, y - 0.5)
    axes.text(
        N + 1 + ACCEPTED / 2,
        y - 1.27,
        f"{ACCEPTED} drafts agree: accepted",
        color="#2f7d3b",
        fontsize=11.5,
        ha="center",
        va="top",
    )
    axes.text(N + 1.5 + ACCEPTED, y - 1.27, "bonus", color="#b45309", fontsize=11.5, ha="center", va="top")
    axes.text(N + 3 + ACCEPTED, y - 1.27, "ignored", color=QUIET, fontsize=11.5, ha="center", va="top")


def commit(axes: Axes, y: float) -> None:
    """The length moves; nothing else does."""
    title(
        axes,
        y,
        "3  Commit",
        f"length grows by {ACCEPTED} + 1, the",
        "bonus is the next anchor:",
        "no copy, no crop",
    )
    prefix(axes, y)
    box(axes, N, y, ANCHOR, KEPT)
    for j in range(len(DRAFTS)):
        if j < ACCEPTED:
            box(axes, N + 1 + j, y, DRAFTS[j], GOOD)
        elif j > ACCEPTED:
            box(axes, N + 1 + j, y, "", BAD, dashed=True)
    box(axes, N + 1 + ACCEPTED, y, BACKBONE[ACCEPTED], ANCHOR_FILL)
    length_mark(axes, N + 1 + ACCEPTED, y + 0.78, y - 0.16, f"length n + {ACCEPTED + 1}")
    axes.text(N + 2.5 + ACCEPTED, y - 0.15, "scratch", color=QUIET, fontsize=11.5, ha="center", va="top")


def main() -> None:
    """Write the picture beside this file, the same bytes every time."""
    mpl.rcParams.update({"svg.hashsalt": "orthrus", "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(figsize=(10.6, 6.6))
    before(axes, 8.2)
    draft(axes, 6.5)
    verify(axes, 3.9)
    commit(axes, 0.9)
    axes.set(xlim=(-4.3, N + 7.2), ylim=(-0.2, 9.5))
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    figure.savefig(Path(__file__).with_name("cycle.svg"), metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
