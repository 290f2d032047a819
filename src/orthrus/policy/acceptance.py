"""How often drafts are kept, by where they come from, and how many tokens to expect of the next ones.

Each row counts for itself; the count over all rows is its prior.

Shapes: B rows, S sources, M slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from orthrus.policy.lookup import Match
from orthrus.policy.steps import Step

Source = Literal["view", "ahead", "text"]
"""Where drafts come from: the view; the view, one pass earlier and without the anchor; the row's own text."""

VIEW, SHORT, LONG = range(3)
"""Rows of a table of counts: copies are counted by the length of their match."""

GUESS: Final = np.array([(0.5, 2.0), (0.5, 2.0), (0.8, 8.0)])
"""Acceptance rate before any draft was judged, and the trials it counts for: long matches mostly go on."""
FADE: Final = 0.97
"""What a row's counts keep from one step to the next; those over all rows keep it for five times as many."""


class Acceptance:
    """Count how often the draft in each slot was tried, and kept, given that all before it were; old steps fade.

    Args:
        slots: drafts a step makes at most.
        fade: what counts keep from one step to the next.
    """

    __slots__ = ("counts", "fade")

    def __init__(self, slots: int, fade: float = FADE) -> None:
        self.counts: NDArray[np.float64] = np.zeros((2, len(GUESS), slots))  # tried or kept, source, slot
        self.fade = fade

    def learn(self, outcome: "RowOutcome", match: Match | None, share: float = 1.0) -> None:
        """Add what a step did to a row whose text had such a match; counts fade by this share of a step."""
        kept, drafted = outcome.chain or (outcome.kept, outcome.drafted)
        if outcome.source == "view":
            self._add(VIEW, drafted, kept, share)
        elif outcome.source == "text" and match is not None:
            self._add(SHORT if match == "short" else LONG, drafted, kept, share)
        else:
            self.counts *= self.fade**share  # the text moves on without a draft
        if outcome.copy_kept is not None and outcome.source != "text" and match is not None:
            self._add(SHORT if match == "short" else LONG, outcome.kept + 1, outcome.copy_kept, share)

    def _add(self, source: int, drafted: int, kept: int, share: float) -> None:
        counts_2M = self.counts[:, source]
        counts_2M *= self.fade**share
        counts_2M[0, : min(kept + 1, drafted)] += 1
        counts_2M[1, :kept] += 1


@dataclass(slots=True)
class RowState:
    """What the policy goes by in one row.

    Attributes:
        acceptance: how often this row's drafts were kept.
        match: how much of the text's end was written before; None where there is nothing to copy.
        ready: drafts that an earlier pass has made for this row.
        blind: whether that pass did not know the anchor.
    """

    acceptance: Acceptance
    match: Match | None = None
    ready: int = 0
    blind: bool = False

    def serves(self, step: Step) -> bool:
        """Tell whether the ready drafts take the place of the step's own draft pass."""
        usable = step.kind in ("chain", "onepass") or (step.kind == "tree" and not self.blind)
        return usable and step.drafts <= self.ready


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """What one step did to one row.

    Attributes:
        source: where its drafts came from; None for a plain step.
        drafted: drafts in a chain, or in the longest path of a tree; an exact first token counts as one.
        kept: drafts accepted, so that the step has written `kept + 1` tokens.
        drew: whether this step made its drafts in a pass of their own.
        chain: after a tree, how many drafts of the chain inside it were kept, and how many there are.
        copy_kept: how many of the new tokens a copy would have had right; None where there was none to make.
    """

    source: Source | None = None
    drafted: int = 0
    kept: int = 0
    drew: bool = False
    chain: tuple[int, int] | None = None
    copy_kept: int | None = None


def expected(rows: Sequence[RowState], usual: Acceptance) -> NDArray[np.float64]:
    """Return the tokens `[B, 2, M + 1]` to expect of each row by the number of drafts: the view's, or those of a copy.

    A slot that a row hardly ever tried is as good as in `usual`, the counts over all rows, at odds that the row's other
    slots tell. A row with nothing to copy gets one token.
    """
    tried_SM, kept_SM = usual.counts
    overall_S = _rate(kept_SM.sum(1), tried_SM.sum(1), *GUESS.T)
    usual_SM = _rate(kept_SM, tried_SM, overall_S[:, None])
    tried_BSM, kept_BSM = np.array([row.acceptance.counts for row in rows]).swapaxes(0, 1)
    odds_BSM = _odds(tried_BSM, kept_BSM, usual_SM)[..., None] * usual_SM
    rate_BSM = _rate(kept_BSM, tried_BSM, odds_BSM / (1 - usual_SM + odds_BSM))
    reached_BSM = np.ones((*rate_BSM.shape[:2], rate_BSM.shape[2] + 1))  # the bonus, then the drafts before it
    np.cumprod(rate_BSM, axis=2, out=reached_BSM[:, :, 1:])
    token_BSM: NDArray[np.float64] = reached_BSM.cumsum(axis=2)
    for b, row in enumerate(rows):
        if row.match != "short":
            token_BSM[b, SHORT] = token_BSM[b, LONG] if row.match else 1.0
    return token_BSM[:, :LONG]


def _odds(
    tried_BSM: NDArray[np.float64], kept_BSM: NDArray[np.float64], usual_SM: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return by what factor `[B, S]` the odds of each row's drafts differ from the usual, in all slots alike.

    One step of Newton's method towards the most likely logarithm, whose prior is a standard normal distribution.
    """
    surprise_BS = (kept_BSM - tried_BSM * usual_SM).sum(2)
    certainty_BS = (tried_BSM * (usual_SM * (1 - usual_SM))).sum(2) + 1
    factor_BS: NDArray[np.float64] = np.exp(surprise_BS / certainty_BS)
    return factor_BS


def _rate(
    kept: NDArray[np.float64],
    tried: NDArray[np.float64],
    prior: NDArray[np.float64] | float,
    trust: NDArray[np.float64] | float = 2.0,
) -> NDArray[np.float64]:
    """Return a share as counted, and some more trials that went as the prior says."""
    return (kept + trust * prior) / (tried + trust)
