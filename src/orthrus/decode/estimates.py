"""What steps take that were not measured, from what others were measured to take.

A pure function of these: all of them twice as long, all estimates are. Knows steps and numbers; times are `costs`'s.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from orthrus.policy.steps import Kind, Step


class Estimates:
    """What steps over one number of rows are taken to cost, given what some of them do (as `costs.Costs` counts it)."""

    def __init__(self, seconds: Mapping[Step, float]) -> None:
        self._seconds = dict(seconds)
        self._known: dict[Step, float | None] = {}
        self._tables: dict[tuple[Step, ...], NDArray[np.float64]] = {}
        self._points: dict[Kind, list[tuple[int, float]]] = {}

    def table(self, steps: tuple[Step, ...]) -> NDArray[np.float64]:
        """Return what each step takes (`of`), what a chain of its length drafts and verifies for, and its `least`.

        Returns:
            Array `[4, steps]`, nan where unknown.
        """
        if steps not in self._tables:
            costs = [
                (
                    self.of(step),
                    self.draft(step.drafts),
                    self.of(Step(step.drafts, lookup=True)) if step.drafts else None,
                    self.least(step) if step.stops else None,
                )
                for step in steps
            ]
            self._tables[steps] = np.array(
                [[np.nan if cost is None else cost for cost in kind] for kind in zip(*costs, strict=True)]
            )
        return self._tables[steps]

    def draft(self, drafts: int) -> float | None:
        """Return what the draft pass of a chain costs: the chain without its verification; None where unknown."""
        chain = self.of(Step(drafts)) if drafts else None
        verify = self.of(Step(drafts, lookup=True)) if drafts else None
        return None if chain is None or verify is None else max(0.0, chain - verify)

    def of(self, step: Step) -> float | None:
        """Return a step's cost as measured, by interpolation over its length; None where unknown.

        A copy that was never measured is taken to cost half of what a chain of its length does: one of two passes. One
        that was is taken to cost at most the whole: where it took more, that was in a pause. A fused pass costs what
        its positions do in a verification, and beyond that what one that was measured does; a tree costs what one that
        was measured does, or a chain, but for the width of its verification.
        """
        if step not in self._known:
            self._known[step] = self._reckon(step)
        return self._known[step]

    def _reckon(self, step: Step) -> float | None:
        if step in self._seconds:
            own = self._seconds[step]
            chain = self.of(Step(step.drafts)) if step.lookup else None
            return own if chain is None else min(own, chain)
        if step.kind == "onepass":
            return self._fused(step)
        if step.kind == "tree":
            return self._tree(step)
        if step.kind == "plain":
            return None
        points = self._measured(step.kind)
        if not points:
            chain = self.of(Step(step.drafts)) if step.lookup else None
            return None if chain is None else chain / 2
        plain = self.of(Step())
        if plain is not None:
            # The shortest there could be: passes of one row.
            points = [(0, (1 if step.lookup else 2) * plain), *points]
        below = [p for p in points if p[0] < step.drafts]
        above = [p for p in points if p[0] > step.drafts]
        if below and above:
            return on_line([below[-1], above[0]], step.drafts)
        # Beyond the measured ones a pass costs at most what a longer one does, and at least what a shorter one did.
        return above[0][1] if above else below[-1][1]

    def least(self, step: Step) -> float | None:
        """Return the least that a one-pass step can cost: a verification of as many positions; None where unknown."""
        verify, position = self.of(Step(step.drafts, lookup=True)), self._position(step.drafts)
        if verify is None or position is None:
            return None
        return verify + position * (step.scratch - step.drafts - 1)

    def _position(self, drafts: int) -> float | None:
        """Return what each position of a verification of so many drafts costs beyond a plain step."""
        plain, verify = self.of(Step()), self.of(Step(drafts, lookup=True))
        return None if plain is None or verify is None else max(0.0, verify - plain) / drafts

    def _fused(self, step: Step) -> float | None:
        """Reckon a one-pass step from the measured one, over a tree or not as it is, whose positions are the nearest.

        What that one takes beyond its least (a second set of attention weights, for one thing) this one is taken to,
        too.
        """
        own, beyond = self.least(step), []
        for other in self._seconds:
            if other.kind == "onepass" and (least := self.least(other)) is not None:
                apart = (bool(other.nodes) != bool(step.nodes), abs(other.scratch - step.scratch))
                beyond.append((apart, self._seconds[other] - least))
        return None if own is None or not beyond else own + max(0.0, min(beyond)[1])

    def _tree(self, step: Step) -> float | None:
        """Reckon a tree that was not measured."""
        plain, chain = self.of(Step()), self.of(Step(step.drafts))
        position = self._position(step.drafts)
        if plain is None or chain is None or position is None:
            return None
        width, seconds = (self._measured("tree") or [(step.drafts, chain)])[-1]
        return max(plain, seconds + position * (step.nodes - width))

    def _measured(self, kind: Kind) -> list[tuple[int, float]]:
        """Return what was measured of a kind, by drafts or by a tree's nodes."""
        if kind not in self._points:
            measured = [step for step in self._seconds if step.kind == kind]
            self._points[kind] = sorted((step.nodes or step.drafts, self._seconds[step]) for step in measured)
        return self._points[kind]


def on_line(points: Sequence[tuple[int, float]], x: int) -> float:
    """Read a line through two or more points in order at x; past the last one it goes on, but never down."""
    right = min(max(bisect_right(points, x, key=lambda point: point[0]), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    if x1 == x0:
        return y1
    value = y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return value if x <= x1 else max(value, y1)
