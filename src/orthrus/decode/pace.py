"""How fast a machine is at the moment, and what things take at its usual pace: told apart from times alone.

Other programs, heat and clock rates make everything take longer or shorter together, from moment to moment and by far
more than what is compared here differs. A Kalman filter of the logarithms of times: the pace is one number that wanders
and returns, each cost is one that hardly moves, and a time is the two of them and noise.

Knows numbers and the places of things; which steps these are is `costs`'s.
"""

from math import exp, log, sqrt
from typing import Final

import numpy as np
from numpy.typing import NDArray

_RETURNS: Final = 0.98
"""What is left of the pace's distance from the usual one after each time."""
_WANDERS: Final = 0.25
"""Variance that the pace gains with each time, as a share of that of the noise."""
_DRIFTS: Final = 1e-6
"""Variance that each cost gains with each time: contexts grow, and clock rates are not the same for all work."""
_SHIFTS: Final = 0.01
"""Variance that all costs gain together with each time, as a share of the noise's: what is usual changes, too."""
_UNKNOWN: Final = 1.0
"""Variance of a cost of which nothing is known, and of what is usual by now where costs are of another time."""
_NOISE, _QUIET, _LEARNS = 1e-2, 1e-4, 0.02
"""Variance of the noise, which is learned: to begin with, the least that it is taken to be, and how fast it follows."""
_OUTLIER, _DEVIATIONS, _RARE = 0.3, 3.0, 3
"""A time is out of the ordinary where it is off by more than this, and by so many standard deviations. A longer one
counts as that long: it is of a pause, which says nothing of what comes after it. There are no moments in which things
take no time: a shorter one says that the machine has become faster or, of a thing that was timed so many times at most,
that it was in a pause."""


class Pace:
    """The pace of a machine, and what things take at its usual one.

    What is uncertain of a cost stays so while nothing else is timed: the pace explains these times as well. It is known
    once another thing was timed shortly before or after, and how two things compare as soon as each of them was timed
    beside a third.
    """

    def __init__(self) -> None:
        self._state = np.zeros(1)  # the pace, then the costs, all of them logarithms
        self._errors = np.zeros((1, 1))  # their covariance
        self._noise = _NOISE
        self._times: list[int] = []  # of each thing, how many are known

    @property
    def pace(self) -> float:
        """How many times as long as usual everything takes at the moment."""
        return exp(self._state[0])

    @property
    def levels(self) -> NDArray[np.float64]:
        """The logarithm of what each thing takes at the usual pace, in seconds."""
        return self._state[1:]

    def add(self) -> int:
        """Make a place for a thing and return it; nothing is known of what it takes."""
        place = len(self._state) - 1
        self._state = np.append(self._state, 0.0)
        self._errors = np.pad(self._errors, (0, 1))
        self._times.append(0)
        return place

    def recall(self, level: float) -> int:
        """Make a place for a thing that took about so long at another time, and return it.

        How what was recalled compares is about known, and what is usual by now is told by the first time of any of it.
        """
        place = len(self._state) - 1
        recalled = [other + 1 for other, times in enumerate(self._times) if times]
        self._state = np.append(self._state, level)
        self._errors = np.pad(self._errors, (0, 1))
        self._errors[-1, recalled] = self._errors[recalled, -1] = _UNKNOWN
        self._errors[-1, -1] = _UNKNOWN + self._noise
        self._times.append(1)
        return place

    def forget(self, place: int) -> None:
        """Take nothing to be known of a thing."""
        self._times[place] = 0

    def observe(self, place: int, seconds: float) -> None:
        """Take in that a thing took so long."""
        at, state, errors = place + 1, self._state, self._errors
        state[0] *= _RETURNS
        errors[0] *= _RETURNS
        errors[:, 0] *= _RETURNS
        errors[0, 0] += _WANDERS * self._noise
        errors[1:, 1:] += _SHIFTS * self._noise
        errors.flat[len(state) + 1 :: len(state) + 1] += _DRIFTS  # the diagonal but for the pace
        time = log(max(seconds, 1e-9))
        if self._times[place] == 0:
            state[at] = time - state[0]
            errors[at], errors[:, at] = 0.0, 0.0
            errors[at, at] = _UNKNOWN
        shared, variance = self._told_by(at)
        surprise, bound = time - float(state[0] + state[at]), max(_OUTLIER, _DEVIATIONS * sqrt(variance))
        if surprise > bound:
            surprise = bound
        elif surprise < -bound:
            doubted = at if self._times[place] <= _RARE else 0
            errors[doubted, doubted] += surprise**2
            shared, variance = self._told_by(at)
        state += shared * (surprise / variance)
        errors -= np.outer(shared, shared) / variance  # in this order it stays symmetric to the last bit
        self._times[place] += 1
        of_noise = self._noise / variance
        self._noise += _LEARNS * of_noise * (surprise**2 * of_noise - self._noise)
        self._noise = max(self._noise, _QUIET)

    def _told_by(self, at: int) -> tuple[NDArray[np.float64], float]:
        """Return the covariance of everything with a time of the thing that stands there, and that time's variance."""
        shared = self._errors[0] + self._errors[at]
        return shared, float(shared[0] + shared[at]) + self._noise
