"""Draw docs/cycle.svg and docs/onepass.svg: one cycle of decoding, one row of the cache, moment by moment.

Run it from anywhere: `python docs/draw_cycle.py` (matplotlib comes with the dev extras).
"""

import re
from collections.abc import Callable
from io import StringIO
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

ONEPASS_DRAFTS = ["buys", "4", "more"]
ONEPASS_BACKBONE = ["buys", "4", "red"]
ONEPASS_NEXT = ["pens", ".", "They"]
STOP = 2

INK, QUIET = "#1f2933", "#616e7c"
KEPT, ANCHOR_FILL, MASK, DRAFT = "#dbe4ee", "#ffd9a0", "#f1ebfa", "#d6c5f0"
GOOD, BAD = "#bfe5c4", "#f6c9c4"


def box(
    axes: Axes, column: float, y: float, text: str, fill: str, *, dashed: bool = False, height: float = 0.62
) -> None:
    """One token in the slot of its position."""
    shape = FancyBboxPatch(
        (column + 0.06, y),
        0.88,
        height,
        boxstyle="round,pad=0,rounding_size=0.1",
        facecolor=fill,
        edgecolor=QUIET if dashed else INK,
        linestyle="--" if dashed else "-",
        linewidth=0.9,
    )
    axes.add_patch(shape)
    if text:
        axes.text(column + 0.5, y + height / 2, text, ha="center", va="center", color=INK, fontsize=12)


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
    """One pass: the backbone over the anchor, the diffusion view over the block."""
    title(
        axes,
        y,
        "1  Draft",
        "one pass: the backbone reads",
        "the anchor and says what follows,",
        "the view drafts behind it",
    )
    prefix(axes, y)
    box(axes, N, y, ANCHOR, ANCHOR_FILL)
    for j in range(len(DRAFTS)):
        box(axes, N + 1 + j, y, "mask", MASK, dashed=True)
        box(axes, N + 1 + j, y - 1.12, DRAFTS[j], DRAFT if j else GOOD)
        step_down(axes, N + j, y, y - 0.5)
    axes.text(N + 1.5, y - 1.27, "first token", color="#2f7d3b", fontsize=11.5, ha="center", va="top")


def verify(axes: Axes, y: float) -> None:
    """One pass of the frozen backbone."""
    title(
        axes,
        y,
        "2  Verify",
        "frozen backbone, one causal",
        "pass from the first token on,",
        "written over the draft's keys",
    )
    prefix(axes, y)
    box(axes, N, y, ANCHOR, KEPT)
    for j, token in enumerate(DRAFTS):
        box(axes, N + 1 + j, y, token, DRAFT if j else GOOD)
    for j, token in enumerate(BACKBONE[1:], start=1):
        fill = GOOD if j < ACCEPTED else ANCHOR_FILL if j == ACCEPTED else "#ffffff"
        box(axes, N + 1 + j, y - 1.12, token, fill, dashed=j > ACCEPTED)
        step_down(axes, N + j, y, y - 0.5)
    axes.text(
        N + 1.5 + ACCEPTED / 2,
        y - 1.27,
        f"{ACCEPTED - 1} drafts agree",
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


def drafted_ahead(axes: Axes, y: float) -> None:
    """The row as the last fused pass left it."""
    title(axes, y, "Before", "the last pass has already", "drafted what may follow", "the anchor")
    prefix(axes, y)
    box(axes, N, y, ANCHOR, ANCHOR_FILL)
    for j, token in enumerate(ONEPASS_DRAFTS):
        box(axes, N + 1 + j, y, token, DRAFT)
    length_mark(axes, N, y + 0.78, y - 0.16, "length n")


def fused(axes: Axes, y: float) -> None:
    """One pass of both views: the backbone's rows, and a block of masks per stop."""
    title(axes, y, "1  One pass", "frozen backbone: anchor and", "drafts, causal, as ever;")
    prefix(axes, y)
    box(axes, N, y, ANCHOR, ANCHOR_FILL)
    for j, token in enumerate(ONEPASS_DRAFTS):
        box(axes, N + 1 + j, y, token, DRAFT)
    y -= 0.95
    lines = (
        "diffusion view: a block of",
        "masks for each place where",
        "acceptance may stop sees the",
        "text up to there, and itself",
    )
    for i, line in enumerate(lines):
        axes.text(-4.2, y + 0.12 - 0.39 * i, line, color=QUIET, fontsize=11.5, va="center")
    for stop, label in enumerate(("if none is kept", "if 1 is kept", "if 2 are kept", "if all 3 are kept")):
        met = stop == STOP
        for column in range(N + 1 + stop):
            box(axes, column, y, "", KEPT if column < N else ANCHOR_FILL if column == N else DRAFT, height=0.36)
        for j in range(len(ONEPASS_DRAFTS) + 1):
            fill = GOOD if met else MASK
            box(axes, N + 1 + stop + j, y, "mask", fill, dashed=not met, height=0.36)
        colour = "#2f7d3b" if met else QUIET
        axes.text(N + 8.25, y + 0.18, label, color=colour, fontsize=11.5, va="center")
        y -= 0.52


def accept(axes: Axes, y: float) -> None:
    """What the backbone's rows say."""
    title(
        axes, y, "2  Accept", "2 drafts agree, the bonus", "follows: of the blocks, the", "third was drafted for this"
    )
    for j, token in enumerate(ONEPASS_BACKBONE):
        box(axes, N + 1 + j, y, token, GOOD if j < STOP else ANCHOR_FILL)
    axes.text(N + 1 + STOP / 2, y - 0.15, "accepted", color="#2f7d3b", fontsize=11.5, ha="center", va="top")
    axes.text(N + 1.5 + STOP, y - 0.15, "bonus", color="#b45309", fontsize=11.5, ha="center", va="top")


def drafted_again(axes: Axes, y: float) -> None:
    """The next cycle begins with drafts."""
    title(axes, y, "Next", "slot j of that block said", "what comes j + 1 after the", "bonus, without knowing it")
    prefix(axes, y)
    box(axes, N, y, ANCHOR, KEPT)
    for j in range(STOP):
        box(axes, N + 1 + j, y, ONEPASS_DRAFTS[j], GOOD)
    box(axes, N + 1 + STOP, y, ONEPASS_BACKBONE[STOP], ANCHOR_FILL)
    for j, token in enumerate(ONEPASS_NEXT):
        box(axes, N + 2 + STOP + j, y, token, DRAFT)
    length_mark(axes, N + 1 + STOP, y + 0.78, y - 0.16, f"length n + {STOP + 1}")


def picture(name: str, moments: dict[Callable[[Axes, float], None], float], *, width: float, height: float) -> None:
    """Draw moments, each at its height, into a file beside this one, the same bytes every time."""
    figure, axes = plt.subplots(figsize=(0.684 * (width + 4.3), 0.68 * (height + 0.2)))
    for moment, y in moments.items():
        moment(axes, y)
    axes.set(xlim=(-4.3, width), ylim=(-0.2, height))
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    drawn = StringIO()
    figure.savefig(drawn, metadata={"Date": None}, facecolor="white")
    short = re.sub(r"\d+\.\d{2,}", lambda number: f"{float(number[0]):.1f}", drawn.getvalue())
    Path(__file__).with_name(name).write_text(short, encoding="utf-8")


def main() -> None:
    """Write both pictures; text stays text, in whatever sans-serif font the reader has."""
    mpl.rcParams.update({"svg.hashsalt": "orthrus", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]})
    picture("cycle.svg", {before: 8.2, draft: 6.5, verify: 3.9, commit: 0.9}, width=N + 7.2, height=9.5)
    moments = {drafted_ahead: 8.3, fused: 6.5, accept: 2.7, drafted_again: 0.9}
    picture("onepass.svg", moments, width=N + 10.4, height=9.6)


if __name__ == "__main__":
    main()
