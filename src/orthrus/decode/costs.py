"""Seconds per step, as measured on the device at hand.

Knows steps and numbers: the clock is the engine's, deciding is `planner`'s, and what times tell of steps that were not
measured is in `estimates`.
"""

from collections.abc import Sequence
from math import exp, inf, log
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from orthrus.decode.estimates import Estimates
from orthrus.decode.pace import Pace
from orthrus.policy.steps import Kind, Step, step_of

_FORGOTTEN: Final = 2048
"""Turns after which nothing is known of a step that was not taken."""
_SWEPT: Final = 64
"""Turns after which that is looked after, and times that nobody asked for are taken in."""
_MOVED: Final = 0.01
"""Share by which a measured step has to have moved against the others for everything to be reckoned anew."""


class Costs:
    """Seconds per step, for each number of rows by itself; first runs (warm-up) are left out.

    After `_FORGOTTEN` others a step counts as never measured, so that none is given up for what it took then. Of a
    one-pass step only the pass counts, not the draft pass that comes before it when nothing was drafted ahead.
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
    """Seconds per step over one number of rows: what each one costs, and the machine's pace (`orthrus.decode.pace`).

    The pace is seen anew for each number of rows, by its own steps.
    """

    def __init__(self) -> None:
        self._pace = Pace()
        self._places: dict[Step, int] = {}  # of all steps that were ever measured, there
        self._last: dict[Step, int] = {}  # the turn at which each that is known was last measured
        # Between two passes code and data are out of the caches: times wait until they are asked for.
        self._told: list[tuple[int, float]] = []
        self._estimates: Estimates | None = None  # by the levels as they were, until one moves unlike the others
        self._levels: NDArray[np.float64] = np.zeros(0)
        self._shift = 0.0  # by which all of them have moved together since

    @property
    def estimates(self) -> Estimates:
        """What steps take at the usual pace, as last reckoned; what has changed since for all alike is in `pace`."""
        if self._estimates is None:
            self._levels = self._pace.levels.copy()
            self._estimates = Estimates({step: exp(self._levels[self._places[step]]) for step in self._last})
        return self._estimates

    @property
    def pace(self) -> float:
        """How many times as long as their estimates steps take at the moment."""
        return self._pace.pace * exp(self._shift)

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
        for place, seconds in self._told:
            self._pace.observe(place, seconds)
        if self._told and self._estimates is not None:
            moved = (self._pace.levels - self._levels)[[self._places[step] for step in self._last]]
            self._shift = float(np.sort(moved)[len(moved) // 2])  # the middle one
            if np.abs(moved - self._shift).max() > _MOVED:
                self._reckon_anew()
        self._told.clear()

    def _reckon_anew(self) -> None:
        self._estimates, self._shift = None, 0.0

    def measured(self, step: Step) -> bool:
        """Tell whether this very step was measured."""
        return step in self._last

    def measured_any(self, kind: Kind) -> bool:
        """Tell whether any step of a kind was."""
        return any(step.kind == kind for step in self._last)

    def all_measured(self) -> list[tuple[Step, int, float]]:
        """Return the measured steps, the turn of each one's last time, and what it takes."""
        return [(step, last, exp(self._pace.levels[self._places[step]])) for step, last in self._last.items()]
