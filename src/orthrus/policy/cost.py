"""The price of any step in plain passes, learned apart from how fast the machine is at the moment.

A step is a sum of passes, so a few coefficients price all steps, and every step taken teaches all of them:

    seconds = pace * (1 + features @ coefficients)

An extended Kalman filter follows the logarithms of the pace, which wanders, and of the coefficients, which hardly move.

Shapes: S steps, F features.
"""

from functools import lru_cache
from math import log
from typing import Final

import numpy as np
from numpy.typing import NDArray

from orthrus.policy.steps import Step

START: Final = np.array(
    [  # coefficient, variance of its logarithm
        (0.1, 1.0),  # more than one position in the pass that verifies
        (0.3, 1.0),  # a block of them
        (1.0, 0.1),  # a draft pass
        (0.4, 1.0),  # and its positions
        (0.05, 1.0),  # a tree
    ]
)
"""What steps take before any was timed."""
GROWS: Final = np.array([0.0, 1.0, 0.0, 1.0, 0.0])
"""Which coefficients may grow with the number of rows."""
WANDERS: Final = 0.25
"""Variance that the pace gains with each step, as a share of that of the noise."""
DRIFTS: Final = 8e-5
"""Variance that each coefficient gains with each step: contexts grow, and other programs take other resources."""
NOISE: Final = (1e-2, 1e-4)
"""Variance of the noise, which is learned: to begin with, and at least."""
OUTLIER: Final = 0.3
"""A time further off counts as that far off, unless the filter itself is that unsure."""


@lru_cache
def features(step: Step, *, drew: bool, block: int) -> NDArray[np.float64]:
    """Return the features `[F]` of a step; `drew` says whether its drafts, if of the view, take a pass of their own."""
    blocks, draws = step.drafts / max(block - 1, 1), drew and step.drafts > 0 and not step.lookup
    verified = step.nodes / max(block - 1, 1) if step.nodes else blocks
    return np.array([step.drafts > 0, verified, draws, draws * blocks, step.nodes > 0], dtype=float)


class Prices:
    """Prices of steps over one number of rows.

    Args:
        like: prices over another number of rows, to begin with.
        times: how many times as many rows there are now; without `like`, how many there are. Next to a plain pass,
            positions then take as long as before at least, and so many times as long at most.
    """

    def __init__(self, like: "Prices | None" = None, *, times: float = 1.0) -> None:
        half_F = 0.5 * log(times) * GROWS
        # The logarithms of the pace and of the coefficients, and their covariance.
        self._state: NDArray[np.float64] = np.array([np.nan, *half_F])
        self._state[1:] += np.log(START[:, 0]) if like is None else like._state[1:]
        self._errors = np.diag([1.0, *START[:, 1]])
        if like is not None:
            self._errors[1:, 1:] = like._errors[1:, 1:]
        self._errors[1:, 1:] += np.outer(half_F, half_F)
        self._noise = NOISE[0]

    def of(self, features_SF: NDArray[np.float64], optimism: float = 0.0) -> NDArray[np.float64]:
        """Return prices `[S]`, each so many standard deviations below what is likely.

        They are in plain passes as fast as passes likely are now. A plain step that nobody took is as uncertain as any.
        """
        share_SF = features_SF * np.exp(self._state[1:])
        price_S: NDArray[np.float64] = 1.0 + share_SF.sum(1)
        slope_SF = np.ones((len(share_SF), len(self._state)))
        np.divide(share_SF, price_S[:, None], out=slope_SF[:, 1:])
        variance_S = ((slope_SF @ self._errors) * slope_SF).sum(1)
        low_S: NDArray[np.float64] = price_S * np.exp(-optimism * np.sqrt(variance_S))
        return low_S

    def observe(self, features_F: NDArray[np.float64], seconds: float) -> None:
        """Learn from the time that one step took."""
        state, errors = self._state, self._errors
        share_F = features_F * np.exp(state[1:])
        price = 1.0 + float(share_F.sum())
        time = log(min(max(seconds, 1e-9), 1e9))
        if np.isnan(state[0]):
            state[0] = time - log(price)  # the first time only says the order of magnitude
            return
        errors[0, 0] += WANDERS * self._noise
        errors.flat[len(state) + 1 :: len(state) + 1] += DRIFTS
        slope = np.array([1.0, *(share_F / price)])
        shared = errors @ slope
        variance = float(slope @ shared) + self._noise
        bound = max(OUTLIER, 3 * variance**0.5)
        surprise = min(max(time - float(state[0]) - log(price), -bound), bound)
        state += shared * (surprise / variance)
        errors -= np.outer(shared, shared) / variance  # in this order it stays symmetric to the last bit
        noise_share = self._noise / variance
        self._noise += 0.02 * noise_share * (surprise**2 * noise_share - self._noise)
        self._noise = max(self._noise, NOISE[1])
