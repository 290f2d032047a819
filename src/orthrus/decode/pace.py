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
"""Variance that costs gain with each time: contexts grow, and clock rates are not the same for all kinds of work."""
_UNKNOWN: Final = 1.0
"""Variance of a cost, or of the pace, of which nothing is known."""
_NOISE, _QUIET, _LEARNS = 1e-2, 1e-4, 0.02
"""Variance of the noise, which is learned: to begin with, the least that it is taken to be, and how fast it follows."""
_OUTLIER, _DEVIATIONS = 0.3, 3.0
"""A time that is longer than expected by this and by so many standard deviations counts as that long: it is of a pause,
which says nothing of what comes after it. There is no such thing as a moment in which everything takes no time."""


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

    @property
    def pace(self) -> float:
        """How many times as long as usual everything takes at the moment."""
        return exp(self._state[0])

    @property
    def levels(self) -> NDArray[np.float64]:
        """The logarithm of what each thing takes at the usual pace, in seconds."""
        return self._state[1:]

    def add(self, level: float | None = None) -> int:
        """Make a place for a thing and return it; what it takes is unknown, or about known.

        The first costs that are about known are at another time's pace: that of now is then to be seen.
        """
        if level is not None and len(self._state) == 1:
            self._errors[0, 0] = _UNKNOWN
        errors = np.zeros((len(self._state) + 1,) * 2)
        errors[:-1, :-1] = self._errors
        errors[-1, -1] = _UNKNOWN if level is None else self._noise
        self._state, self._errors = np.append(self._state, 0.0 if level is None else level), errors
        return len(self._state) - 2

    def forget(self, place: int) -> None:
        """Take nothing to be known of a thing."""
        at = place + 1
        self._errors[at], self._errors[:, at] = 0.0, 0.0
        self._errors[at, at] = _UNKNOWN

    def observe(self, place: int, seconds: float) -> None:
        """Take in that a thing took so long."""
        at, state, errors = place + 1, self._state, self._errors
        state[0] *= _RETURNS
        errors[0] *= _RETURNS
        errors[:, 0] *= _RETURNS
        errors.flat[len(state) + 1 :: len(state) + 1] += _DRIFTS  # the diagonal but for the pace
        errors[0, 0] += _WANDERS * self._noise
        time = log(max(seconds, 1e-9))
        if errors[at, at] >= _UNKNOWN:
            state[at] = time - state[0]
        shared = errors[0] + errors[at]
        variance = float(shared[0] + shared[at]) + self._noise
        bound = max(_OUTLIER, _DEVIATIONS * sqrt(variance))
        surprise = min(time - float(state[0] + state[at]), bound)
        if surprise < -bound:
            wrong = [0, at]
            errors[wrong] *= -surprise / bound
            errors[:, wrong] *= -surprise / bound
            shared = errors[0] + errors[at]
            variance = float(shared[0] + shared[at]) + self._noise
        state += shared * (surprise / variance)
        errors -= np.outer(shared, shared / variance)
        of_noise = self._noise / variance
        self._noise += _LEARNS * of_noise * (surprise**2 * of_noise - self._noise)
        self._noise = max(self._noise, _QUIET)
