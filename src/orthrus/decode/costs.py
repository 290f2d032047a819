"""Seconds per step, as measured on the device at hand, and what they tell of steps that were not measured.

Knows steps and numbers: the clock is the engine's, deciding is `planner`'s.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orthrus.decode.plan import Kind, Step, step_of

_STALE = 8
_FORGOTTEN = 2048
_SWEPT = 64
_OTHERS_REST_ON = ("plain", "chain", "lookup")  # kinds that others are reckoned from


class Costs:
    """Seconds per step, as measured: the median of the last few of each shape, first runs (warm-up) left out.

    Machines change their pace, for moments and for good: times of a shape that is taken up again after `_STALE` other
    steps start anew (soon, for what drove it out may have been a bad moment that fills all of them), and after
    `_FORGOTTEN` of them a shape counts as never measured, so that no step is given up for what it took then.

    Of a one-pass step only the pass counts, not the draft pass that comes before it when nothing was drafted ahead.
    """

    def __init__(self, *, window: int = 9) -> None:
        self._seen: dict[int, dict[Step, deque[float]]] = {}
        self._runs: dict[tuple[int, Step], int] = {}
        self._last: dict[tuple[int, Step], int] = {}
        self._turn = 0
        self._window = window
        # Of an earlier process: what was measured there and not yet here, and what took how long of what was.
        self._recalled: dict[tuple[int, Step], float] = {}
        self._retaken: dict[tuple[int, Step], float] = {}
        # What follows from the times, until enough of them are new.
        self._vectors: dict[tuple[int, tuple[Step, ...]], NDArray[np.float64]] = {}
        self._estimates: dict[tuple[int, Step], float | None] = {}
        self._points: dict[tuple[int, Kind], list[tuple[int, float]]] = {}

    def observe(self, step: Step, rows: int, seconds: float) -> None:
        """Add one measured step over so many rows."""
        self._turn += 1
        runs = self._runs[rows, step] = self._runs.get((rows, step), 0) + 1
        anew = self._turn - self._last.get((rows, step), 0) > _STALE
        if runs > 1:
            self._last[rows, step] = self._turn
            times = self._seen.setdefault(rows, {}).setdefault(step, deque(maxlen=self._window))
            if anew:
                times.clear()
            times.append(seconds)
            if (rows, step) in self._recalled:
                self._retaken[rows, step] = self._recalled.pop((rows, step))
        forgotten = self._forget() if self._turn % _SWEPT == 0 else False
        new = anew or 1 < runs <= 4 or runs % (2 * self._window) == 0
        if forgotten or (new and (step.kind in _OTHERS_REST_ON or self._recalled)):
            for known in (self._vectors, self._estimates, self._points):
                known.clear()
        elif new:
            self._outdate(step.kind)

    def _outdate(self, kind: Kind) -> None:
        """Forget what was reckoned of a kind whose times tell of no other."""
        self._vectors.clear()
        self._estimates = {at: seconds for at, seconds in self._estimates.items() if at[1].kind != kind}
        self._points = {at: points for at, points in self._points.items() if at[1] != kind}

    def _forget(self) -> bool:
        """Drop what was measured too long ago; tells whether there was any."""
        old = [(rows, step) for (rows, step), last in self._last.items() if self._turn - last > _FORGOTTEN]
        for rows, step in old:
            for known in (self._last, self._recalled, self._retaken):
                known.pop((rows, step), None)
            self._seen.get(rows, {}).pop(step, None)
        return bool(old)

    def _time(self, step: Step, rows: int) -> float:
        """Return a measured step's cost."""
        return median(self._times(step, rows))

    def _times(self, step: Step, rows: int) -> Sequence[float]:
        """Return a step's last times; those of an earlier process are held to the pace of this one."""
        times = self._seen[rows][step]
        if (rows, step) not in self._recalled or not self._retaken:
            return times
        pace = median(median(self._seen[r][s]) / max(old, 1e-9) for (r, s), old in self._retaken.items())
        return [pace * seconds for seconds in times]

    def basis(self, rows: int) -> int:
        """Return the number of rows whose costs to go by: this one, or the nearest where steps can be compared."""
        known = [r for r, steps in self._seen.items() if Step() in steps and any(s.kind == "chain" for s in steps)]
        return min(known, key=lambda r: max(r, rows) / min(r, rows), default=rows)

    def measured(self, step: Step, rows: int) -> bool:
        """Tell whether this very step was measured over so many rows."""
        return step in self._seen.get(rows, {})

    def estimates(self, steps: tuple[Step, ...], rows: int) -> NDArray[np.float64]:
        """Return each step's `estimate`, what a chain of its length drafts and verifies for, and its `least`.

        Reckoned anew once every other window of observations.

        Returns:
            Array `[4, steps]`, nan where unknown.
        """
        if (rows, steps) not in self._vectors:
            costs = [
                (
                    self.estimate(step, rows),
                    self.draft(step.drafts, rows),
                    self.estimate(Step(step.drafts, lookup=True), rows) if step.drafts else None,
                    self.least(step, rows) if step.stops else None,
                )
                for step in steps
            ]
            self._vectors[rows, steps] = np.array(
                [[np.nan if cost is None else cost for cost in kind] for kind in zip(*costs, strict=True)]
            )
        return self._vectors[rows, steps]

    def draft(self, drafts: int, rows: int) -> float | None:
        """Return what the draft pass of a chain costs: the chain without its verification; None where unknown."""
        chain = self.estimate(Step(drafts), rows) if drafts else None
        verify = self.estimate(Step(drafts, lookup=True), rows) if drafts else None
        return None if chain is None or verify is None else max(0.0, chain - verify)

    def estimate(self, step: Step, rows: int) -> float | None:
        """Return a step's cost as measured, by interpolation over its length; None where unknown.

        A copy that was never measured is taken to cost half of what a chain of its length does: one of two passes. One
        that was is taken to cost at most the whole: where it took more, that was in a bad moment of the machine. A
        fused pass costs what its positions do in a verification, and beyond that what one that was measured does; a
        tree costs what one that was measured does, or a chain, but for the width of its verification.
        """
        if (rows, step) not in self._estimates:
            self._estimates[rows, step] = self._reckon(step, rows)
        return self._estimates[rows, step]

    def _reckon(self, step: Step, rows: int) -> float | None:
        seen = self._seen.get(rows, {})
        if step in seen:
            own = self._time(step, rows)
            chain = self.estimate(Step(step.drafts), rows) if step.lookup else None
            return own if chain is None else min(own, chain)
        if step.kind == "onepass":
            return self._fused(step, rows)
        if step.kind == "tree":
            return self._tree(step, rows)
        if step.kind == "plain":
            return None
        points = self._measured(step.kind, rows)
        if not points:
            chain = self.estimate(Step(step.drafts), rows) if step.lookup else None
            return None if chain is None else chain / 2
        plain = self.estimate(Step(), rows)
        if plain is not None:
            # The shortest there could be: passes of one row.
            points = [(0, (1 if step.lookup else 2) * plain), *points]
        below = [p for p in points if p[0] < step.drafts]
        above = [p for p in points if p[0] > step.drafts]
        if below and above:
            return on_line([below[-1], above[0]], step.drafts)
        # Beyond the measured ones a pass costs at most what a longer one does, and at least what a shorter one did.
        return above[0][1] if above else below[-1][1]

    def least(self, step: Step, rows: int) -> float | None:
        """Return the least that a one-pass step can cost: a verification of as many positions; None where unknown."""
        verify, position = self.estimate(Step(step.drafts, lookup=True), rows), self._position(step.drafts, rows)
        if verify is None or position is None:
            return None
        return verify + position * (step.scratch - step.drafts - 1)

    def _position(self, drafts: int, rows: int) -> float | None:
        """Return what each position of a verification of so many drafts costs beyond a plain step."""
        plain, verify = self.estimate(Step(), rows), self.estimate(Step(drafts, lookup=True), rows)
        return None if plain is None or verify is None else max(0.0, verify - plain) / drafts

    def _fused(self, step: Step, rows: int) -> float | None:
        """Reckon a one-pass step from the measured one, over a tree or not as it is, whose positions are the nearest.

        What that one takes beyond its least (a second set of attention weights, for one thing) this one is taken to,
        too.
        """
        own, beyond = self.least(step, rows), []
        for other in self._seen.get(rows, {}):
            if other.kind == "onepass" and (least := self.least(other, rows)) is not None:
                apart = (bool(other.nodes) != bool(step.nodes), abs(other.scratch - step.scratch))
                beyond.append((apart, self._time(other, rows) - least))
        return None if own is None or not beyond else own + max(0.0, min(beyond)[1])

    def _tree(self, step: Step, rows: int) -> float | None:
        """Reckon a tree that was not measured."""
        plain, chain = self.estimate(Step(), rows), self.estimate(Step(step.drafts), rows)
        position = self._position(step.drafts, rows)
        if plain is None or chain is None or position is None:
            return None
        width, seconds = (self._measured("tree", rows) or [(step.drafts, chain)])[-1]
        return max(plain, seconds + position * (step.nodes - width))

    def _measured(self, kind: Kind, rows: int) -> list[tuple[int, float]]:
        """Return what was measured of a kind, by drafts or by a tree's nodes."""
        if (rows, kind) not in self._points:
            seen = self._seen.get(rows, {})
            self._points[rows, kind] = sorted(
                (s.nodes or s.drafts, self._time(s, rows)) for s in seen if s.kind == kind
            )
        return self._points[rows, kind]

    def to_record(self) -> list[list[Any]]:
        """Return what was measured, as JSON values: for each shape rows, the step's fields, how long ago, and times."""
        return [
            [rows, *step, self._turn - self._last[rows, step], *self._times(step, rows)]
            for rows, steps in self._seen.items()
            for step in steps
        ]

    @classmethod
    def from_record(cls, record: Sequence[Sequence[Any]]) -> "Costs":
        """Take up what an earlier process measured: each shape's times start anew when it is taken.

        The machine may have another pace by now. What is not yet measured here is held to that of what is.

        Raises:
            TypeError, ValueError: the record is of something else.
        """
        costs = cls()
        for rows, drafts, nodes, stops, lookup, ago, *times in record:
            step = step_of([drafts, nodes, stops, lookup])
            costs._last[int(rows), step] = -max(int(ago), _STALE)
            costs._seen.setdefault(int(rows), {})[step] = deque(map(float, times), maxlen=costs._window)
            costs._recalled[int(rows), step] = median(map(float, times))
        return costs


def on_line(points: Sequence[tuple[int, float]], x: int) -> float:
    """Read a line through two or more points in order at x; past the last one it goes on, but never down."""
    right = min(max(bisect_right(points, x, key=lambda point: point[0]), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    if x1 == x0:
        return y1
    value = y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return value if x <= x1 else max(value, y1)
