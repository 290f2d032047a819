"""Seconds per step, as measured on the device at hand, and what they tell of steps that were not measured.

Knows steps and numbers: the clock is the engine's, deciding is `planner`'s.
"""

from bisect import bisect_right
from collections.abc import Sequence
from math import exp, inf, log
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from orthrus.decode.pace import Pace
from orthrus.decode.plan import Kind, Step, step_of

_FORGOTTEN: Final = 2048
"""Turns after which nothing is known of a step that was not taken."""
_SWEPT: Final = 64
"""Turns after which that is looked after, and times that nobody asked for are taken in."""
_MOVED: Final = 0.01
"""Share by which a measured step has to have moved for everything to be reckoned anew."""


class Costs:
    """Seconds per step, for each number of rows by itself; first runs (warm-up) are left out.

    After `_FORGOTTEN` others a step counts as never measured, so that none is given up for what it took then.

    Of a one-pass step only the pass counts, not the draft pass that comes before it when nothing was drafted ahead.
    """

    def __init__(self) -> None:
        self._known: dict[int, StepCosts] = {}
        self._met: set[tuple[int, Step]] = set()
        self._turn = 0

    def observe(self, step: Step, rows: int, seconds: float) -> None:
        """Add one measured step over so many rows."""
        self._turn += 1
        if (rows, step) in self._met:
            self._known.setdefault(rows, StepCosts()).observe(step, seconds, turn=self._turn)
        self._met.add((rows, step))
        if self._turn % _SWEPT == 0:
            for known in self._known.values():
                known.forget(before=self._turn - _FORGOTTEN)

    def over(self, rows: int) -> "StepCosts":
        """Return what steps cost over so many rows."""
        known = self._known.get(rows)
        if known is None:
            return StepCosts()
        known.take_in()
        return known

    def basis(self, rows: int) -> int:
        """Return the number of rows whose costs to go by: this one, or the nearest where steps can be compared."""
        known = [r for r, costs in self._known.items() if costs.measured(Step()) and costs.measured_any("chain")]
        return min(known, key=lambda r: max(r, rows) / min(r, rows), default=rows)

    def to_record(self) -> list[list[Any]]:
        """Return what was measured, as JSON values: for each shape rows, the step's fields, how long ago, seconds."""
        return [
            [rows, *step, self._turn - last, float(f"{seconds:.6g}")]
            for rows in self._known
            for step, last, seconds in self.over(rows).all_measured()
        ]

    @classmethod
    def from_record(cls, record: Sequence[Sequence[Any]]) -> "Costs":
        """Take up what an earlier process measured; what is usual by now is told by the first step that is measured.

        Raises:
            TypeError, ValueError: the record is of something else.
        """
        costs = cls()
        for rows, drafts, nodes, stops, lookup, ago, seconds in record:
            step = step_of([drafts, nodes, stops, lookup])
            if not 0 < float(seconds) < inf:
                raise ValueError(f"steps take a finite time above zero, found {seconds}")
            costs._known.setdefault(int(rows), StepCosts()).recall(step, float(seconds), turn=-int(ago))
        return costs


class StepCosts:
    """Seconds per step over one number of rows, at the machine's usual pace (`orthrus.decode.pace`).

    The pace is seen anew for each number of rows, by its own steps.
    """

    def __init__(self) -> None:
        self._pace = Pace()
        self._places: dict[Step, int] = {}  # of all steps that were ever measured, there
        self._last: dict[Step, int] = {}  # the turn at which each that is known was last measured
        # Between two passes code and data are out of the caches: times wait until they are asked for.
        self._told: list[tuple[int, float]] = []
        # What follows from the levels, until one of them moves by `_MOVED`.
        self._levels: NDArray[np.float64] = np.zeros(0)
        self._vectors: dict[tuple[Step, ...], NDArray[np.float64]] = {}
        self._estimates: dict[Step, float | None] = {}
        self._points: dict[Kind, list[tuple[int, float]]] = {}

    @property
    def pace(self) -> float:
        """How many times as long as usual steps take at the moment."""
        return self._pace.pace

    def observe(self, step: Step, seconds: float, *, turn: int) -> None:
        """Add one measured step."""
        if step not in self._places:
            self._places[step] = self._pace.add()
        if step not in self._last:
            self._reckon_anew()
        self._last[step] = turn
        self._told.append((self._places[step], seconds))

    def recall(self, step: Step, seconds: float, *, turn: int) -> None:
        """Add what a step took in an earlier process."""
        self._places[step] = self._pace.recall(log(seconds))
        self._last[step] = turn
        self._reckon_anew()

    def forget(self, *, before: int) -> None:
        """Drop what was last measured before a turn."""
        self.take_in()
        for step in [step for step, last in self._last.items() if last < before]:
            del self._last[step]
            self._pace.forget(self._places[step])
            self._reckon_anew()

    def take_in(self) -> None:
        """Learn from what was observed."""
        if not self._told:
            return
        for place, seconds in self._told:
            self._pace.observe(place, seconds)
        self._told.clear()
        if np.abs(self._pace.levels - self._levels).max() > _MOVED:
            self._reckon_anew()

    def _reckon_anew(self) -> None:
        self._levels = self._pace.levels.copy()
        for reckoned in (self._vectors, self._estimates, self._points):
            reckoned.clear()

    def measured(self, step: Step) -> bool:
        """Tell whether this very step was measured."""
        return step in self._last

    def measured_any(self, kind: Kind) -> bool:
        """Tell whether any step of a kind was."""
        return any(step.kind == kind for step in self._last)

    def all_measured(self) -> list[tuple[Step, int, float]]:
        """Return the measured steps, the turn of each one's last time, and what it takes."""
        return [(step, last, self._seconds(step)) for step, last in self._last.items()]

    def estimates(self, steps: tuple[Step, ...]) -> NDArray[np.float64]:
        """Return each step's `estimate`, what a chain of its length drafts and verifies for, and its `least`.

        Returns:
            Array `[4, steps]`, nan where unknown.
        """
        if steps not in self._vectors:
            costs = [
                (
                    self.estimate(step),
                    self.draft(step.drafts),
                    self.estimate(Step(step.drafts, lookup=True)) if step.drafts else None,
                    self.least(step) if step.stops else None,
                )
                for step in steps
            ]
            self._vectors[steps] = np.array(
                [[np.nan if cost is None else cost for cost in kind] for kind in zip(*costs, strict=True)]
            )
        return self._vectors[steps]

    def draft(self, drafts: int) -> float | None:
        """Return what the draft pass of a chain costs: the chain without its verification; None where unknown."""
        chain = self.estimate(Step(drafts)) if drafts else None
        verify = self.estimate(Step(drafts, lookup=True)) if drafts else None
        return None if chain is None or verify is None else max(0.0, chain - verify)

    def estimate(self, step: Step) -> float | None:
        """Return a step's cost as measured, by interpolation over its length; None where unknown.

        A copy that was never measured is taken to cost half of what a chain of its length does: one of two passes. One
        that was is taken to cost at most the whole: where it took more, that was in a pause. A fused pass costs
        what its positions do in a verification, and beyond that what one that was measured does; a tree costs what one
        that was measured does, or a chain, but for the width of its verification.
        """
        if step not in self._estimates:
            self._estimates[step] = self._reckon(step)
        return self._estimates[step]

    def _reckon(self, step: Step) -> float | None:
        if self.measured(step):
            own = self._seconds(step)
            chain = self.estimate(Step(step.drafts)) if step.lookup else None
            return own if chain is None else min(own, chain)
        if step.kind == "onepass":
            return self._fused(step)
        if step.kind == "tree":
            return self._tree(step)
        if step.kind == "plain":
            return None
        points = self._measured(step.kind)
        if not points:
            chain = self.estimate(Step(step.drafts)) if step.lookup else None
            return None if chain is None else chain / 2
        plain = self.estimate(Step())
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
        verify, position = self.estimate(Step(step.drafts, lookup=True)), self._position(step.drafts)
        if verify is None or position is None:
            return None
        return verify + position * (step.scratch - step.drafts - 1)

    def _position(self, drafts: int) -> float | None:
        """Return what each position of a verification of so many drafts costs beyond a plain step."""
        plain, verify = self.estimate(Step()), self.estimate(Step(drafts, lookup=True))
        return None if plain is None or verify is None else max(0.0, verify - plain) / drafts

    def _fused(self, step: Step) -> float | None:
        """Reckon a one-pass step from the measured one, over a tree or not as it is, whose positions are the nearest.

        What that one takes beyond its least (a second set of attention weights, for one thing) this one is taken to,
        too.
        """
        own, beyond = self.least(step), []
        for other in self._last:
            if other.kind == "onepass" and (least := self.least(other)) is not None:
                apart = (bool(other.nodes) != bool(step.nodes), abs(other.scratch - step.scratch))
                beyond.append((apart, self._seconds(other) - least))
        return None if own is None or not beyond else own + max(0.0, min(beyond)[1])

    def _tree(self, step: Step) -> float | None:
        """Reckon a tree that was not measured."""
        plain, chain = self.estimate(Step()), self.estimate(Step(step.drafts))
        position = self._position(step.drafts)
        if plain is None or chain is None or position is None:
            return None
        width, seconds = (self._measured("tree") or [(step.drafts, chain)])[-1]
        return max(plain, seconds + position * (step.nodes - width))

    def _measured(self, kind: Kind) -> list[tuple[int, float]]:
        """Return what was measured of a kind, by drafts or by a tree's nodes."""
        if kind not in self._points:
            measured = [step for step in self._last if step.kind == kind]
            self._points[kind] = sorted((step.nodes or step.drafts, self._seconds(step)) for step in measured)
        return self._points[kind]

    def _seconds(self, step: Step) -> float:
        """Return what a measured step takes."""
        return exp(self._pace.levels[self._places[step]])


def on_line(points: Sequence[tuple[int, float]], x: int) -> float:
    """Read a line through two or more points in order at x; past the last one it goes on, but never down."""
    right = min(max(bisect_right(points, x, key=lambda point: point[0]), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    if x1 == x0:
        return y1
    value = y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return value if x <= x1 else max(value, y1)
