"""What drafts are worth: how often they were kept lately, in a row and in general, and what to expect of the next.

A row's chains, drafts made ahead, and copies of each kind (`lookup.Copy`) have figures of their own; trees are measured
by the chain inside them, which every tree's verdict judges too. Knows steps and numbers; deciding is `planner`'s.

Shapes: B rows, W ways to draft, M slots.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from orthrus.policy.lookup import Copy
from orthrus.policy.steps import STOPS, Step

Way = Literal["chain", "ahead"] | Copy

WAYS: tuple[Way, ...] = ("chain", "ahead", *get_args(Copy))
"""How drafts come about, in the order of arrays; "ahead": a fused pass made them without knowing the token before."""

CHAIN, AHEAD, COPY = range(3)
"""Where chains and drafts made ahead stand in arrays, and the first kind of copy; of each row its own once told."""

_TRIED, _KEPT = 0, 1
_DIGITS = 8
_FIRM = 8.0
"""Trials that a guess counts as which rests on many others."""

_GUESS = np.array([0.8 if way == "echo" else 0.5 for way in WAYS])
_TRUST = np.array([_FIRM if way == "echo" else 2.0 for way in WAYS])
"""How likely a draft of each way is before any was tried, and how many trials that counts as: guesses, of echoes a
firmer one, since a text that repeats itself mostly goes on to."""

_SPREAD = 1.0
"""Standard deviation of the logarithm of the odds between texts."""


class Record:
    """How often each slot's draft was tried and kept, given that all before it were; by the way it came about.

    Arrays: `counts[tried or kept, W, M]`, and of fused passes `hits[tried or met, shape, stops]`: how often acceptance
    stopped where they had drafted ahead, by the binary digits of a chain's drafts, then those of a tree's nodes, and
    by `STOPS`. Old cycles fade. Cycles are counted when `counts` is asked for: between two passes the first few steps
    of anything take longest, and not every cycle is decided anew.
    """

    __slots__ = ("_counts", "_told", "fade", "hits")

    def __init__(self, *, slots: int, fade: float = 0.95) -> None:
        self._counts: NDArray[np.float64] = np.zeros((2, len(WAYS), slots))
        self._told: list[tuple[int, int, int] | None] = []
        self.hits: NDArray[np.float64] = np.zeros((2, 2 * _DIGITS, len(STOPS)))
        self.fade = fade

    @property
    def counts(self) -> NDArray[np.float64]:
        """How often each slot's draft was tried, and kept: `[2, W, M]`."""
        for told in self._told:
            if told is None:
                self._counts *= self.fade
                continue
            way, drafts, accepted = told
            tried_kept = self._counts[:, way]
            tried_kept *= self.fade
            tried, kept = tried_kept[_TRIED, : min(accepted + 1, drafts)], tried_kept[_KEPT, :accepted]
            tried += 1
            kept += 1
        self._told.clear()
        return self._counts

    def relax(self) -> None:
        """Forget a little, as text moves on that no draft was tried on."""
        self._told.append(None)

    def add(self, way: Way, *, drafts: int, accepted: int) -> None:
        """Add one cycle."""
        self._told.append((WAYS.index(way), drafts, accepted))

    def to_record(self) -> dict[str, Any]:
        """Return all figures, as JSON values."""
        return {name: np.round(a, 4).tolist() for name, a in (("counts", self.counts), ("hits", self.hits))}

    def restore(self, record: Mapping[str, Any]) -> None:
        """Take up figures of `to_record`; raises KeyError or ValueError for others."""
        counts, hits = (np.array(record[name], dtype=float) for name in ("counts", "hits"))
        if counts.shape != self._counts.shape or hits.shape != self.hits.shape:
            raise ValueError(f"records of shapes {self._counts.shape} and {self.hits.shape} are required")
        self._counts, self.hits = counts, hits

    def stopped(self, step: Step, rank: int) -> None:
        """Add where a fused pass' acceptance stopped: at its stop number `rank` by likelihood, or at none of them.

        What would have been met with fewer stops is known as well, and with more of them if it was met.
        """
        shape, asked = divmod(cell(step), len(STOPS))
        told = slice(0, asked + 1 if rank >= step.stops else len(STOPS))
        tried_met = self.hits[:, shape, told]
        tried_met *= self.fade
        tried_met[_TRIED] += 1
        tried_met[_KEPT] += np.array(STOPS[told]) > rank


def cell(step: Step) -> int:
    """Return a one-pass step's place in the flattened `[shapes, stops]` of what was met."""
    shape = min((step.nodes or step.drafts).bit_length(), _DIGITS - 1) + (_DIGITS if step.nodes else 0)
    return shape * len(STOPS) + bisect_right(STOPS, step.stops) - 1


def expected(records: Sequence[Record], prior: Record, *, slots: int) -> NDArray[np.float64]:
    """Return the tokens each way to draft is expected to give each row by its number of drafts, the bonus included.

    A slot that a row hardly ever tried is taken to be worth what it is in `prior`, at the odds that the row's other
    slots tell (`_odds`), and one hardly ever tried there what all slots are. Drafts made ahead are measured by a
    chain's: a slot hardly ever tried is worth what the chain's is, less what being ahead costs in `prior`; that says
    more than a trial or two. (It gains nothing, though `prior` may have it so: easy texts are given more of them.)

    Args:
        records: one for each row.
        prior: the record over all rows.
        slots: drafts to look at, at most as many as the records count.

    Returns:
        Array `[B, W, slots + 1]`, in the order of `WAYS`.
    """
    tried, kept = prior.counts
    usual_WM = rate(kept, tried, rate(kept.sum(1), tried.sum(1), _GUESS, _TRUST)[:, None])[:, :slots]
    counts = np.array([record.counts[:, :, :slots] for record in records])
    odds_BWM = _odds(counts, usual_WM)[..., None] * usual_WM
    rate_BWM = rate(counts[:, _KEPT], counts[:, _TRIED], odds_BWM / (1 - usual_WM + odds_BWM))
    chain_M = usual_WM[CHAIN]
    loss_M = np.minimum(rate(kept[AHEAD, :slots], tried[AHEAD, :slots], chain_M, _FIRM) / chain_M, 1.0)
    own_BM = rate_BWM[:, CHAIN] * loss_M
    rate_BWM[:, AHEAD] = rate(counts[:, _KEPT, AHEAD], counts[:, _TRIED, AHEAD], own_BM, _FIRM)
    tokens = np.ones((*rate_BWM.shape[:2], slots + 1))
    np.cumprod(rate_BWM, axis=2, out=tokens[:, :, 1:])
    whole: NDArray[np.float64] = tokens.cumsum(axis=2)
    return whole


def _odds(counts_B2WM: NDArray[np.float64], usual_WM: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return by what factor the odds of each row's drafts, `[B, W]`, differ from what is usual, in all slots alike.

    Some texts are easy to draft and others are not, so a few slots tell much about the rest. One step of Newton's
    method towards the most likely logarithm of that factor, which is taken to vary from text to text by `_SPREAD`.
    """
    tried, kept = counts_B2WM[:, _TRIED], counts_B2WM[:, _KEPT]
    surprise_BW = (kept - tried * usual_WM).sum(2)
    certainty_BW = (tried * (usual_WM * (1 - usual_WM))).sum(2) + _SPREAD**-2
    factor_BW: NDArray[np.float64] = np.exp(surprise_BW / certainty_BW)
    return factor_BW


class Rescue:
    """How many drafts more than the chain inside it a tree keeps where that breaks off; over all rows, old ones fade.

    Until seen, about the least that trees of 15 and 31 nodes kept on any prompts of results/nano-trees.jsonl.
    """

    def __init__(self, step: Step, *, fade: float = 0.98) -> None:
        usual = 0.5 if step.nodes <= step.drafts else 0.7
        self._more, self._breaks, self._fade = usual * _FIRM, _FIRM, fade

    @property
    def drafts(self) -> float:
        """Drafts kept beyond a chain that breaks off, as seen lately."""
        return self._more / self._breaks

    def to_record(self) -> tuple[float, float]:
        """Return drafts kept beyond, and chains that broke off."""
        return round(self._more, 4), round(self._breaks, 4)

    def restore(self, more: float, breaks: float) -> None:
        """Take up figures of `to_record`."""
        self._more, self._breaks = float(more), float(breaks)

    def add(self, kept: int, inside: int, length: int) -> None:
        """Add one cycle of one row: drafts kept of the tree and of the chain inside, and how long that is."""
        if inside < length:
            self._more = self._fade * self._more + kept - inside
            self._breaks = self._fade * self._breaks + 1


def usually_met(record: Record) -> NDArray[np.float64]:
    """Return the chance that a row stops where a fused pass has drafted ahead, `[shapes, stops]`.

    Unknown, it is taken to be one half for one stop point, and each further number of them to halve the misses.
    """
    tried, met = record.hits
    usual, before = np.zeros(tried.shape), np.zeros(len(tried))
    for column in range(len(STOPS)):
        usual[:, column] = before = rate(met[:, column], tried[:, column], (1 + before) / 2)
    return usual


def rate(
    kept: NDArray[np.float64],
    tried: NDArray[np.float64],
    prior: NDArray[np.float64] | float,
    more: NDArray[np.float64] | float = 2.0,
) -> NDArray[np.float64]:
    """Return a share as counted, with a few more trials that went as the prior says."""
    return (kept + more * prior) / (tried + more)
