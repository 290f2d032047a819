"""Which step comes next: the one with the most expected tokens for its price.

    speed of a step = tokens expected of it / its price in plain passes

Tokens come from `acceptance`, prices from `cost`. Prices are taken at the low end of what is likely: a step that might
be faster is tried, and its price becomes certain. Drafts that nobody makes teach nothing, so the view is tried after
every so many steps without it.

Shapes: B rows, S steps, M slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Final

import numpy as np
from numpy.typing import NDArray

from orthrus.policy.acceptance import FADE, Acceptance, RowOutcome, RowState, expected
from orthrus.policy.cost import Prices, features
from orthrus.policy.steps import Plan, Step, slots

OPTIMISM: Final = 0.7
"""Standard deviations that prices are taken below what is likely."""
WAIT: Final = (16, 128)
"""Steps without the view after which it is tried: at first, and at most; each trial in vain doubles them."""
TRIAL: Final = Step(3)
"""What is tried then."""


@dataclass(slots=True)
class Trees:
    """What trees of some size gave: sums over about the last fifty, and how many these were.

    Attributes:
        more: drafts kept beyond the chain inside, where that broke off.
        deep: lengths of the chains inside.
    """

    more: NDArray[np.float64]
    deep: NDArray[np.float64]

    @classmethod
    def of(cls, step: Step) -> "Trees":
        """Return a first guess, the least that was seen of trees: as wide as the block, and twice."""
        return cls(np.array([4.0 if step.nodes <= step.drafts else 5.6, 8.0]), np.array([0.6 * step.drafts, 1.0]))

    def learn(self, kept: int, chain: tuple[int, int]) -> None:
        """Learn from one tree, and what was kept of the chain inside."""
        if chain[0] < chain[1]:
            _average(self.more, max(kept - chain[0], 0))
        _average(self.deep, chain[1])

    def tokens(self, token_M: NDArray[np.float64], rows: int) -> float:
        """Return the tokens to expect over all rows, from those of chains.

        Trees are deep where the view is sure, so the chains inside give about as much as one draft more would on
        average. Where they break off, the tree goes on.
        """
        longest = len(token_M) - 1
        deep = min(float(self.deep[0] / self.deep[1]) + 1, longest)
        whole = int(deep)
        last, inside, after = (float(token_M[min(drafts, longest)]) for drafts in (whole - 1, whole, whole + 1))
        more, breaks = map(float, self.more)
        gain = (more + OPTIMISM * sqrt(more)) / breaks
        return inside + (deep - whole) * (after - inside) + gain * (rows - (inside - last))


@dataclass(slots=True)
class Experience:
    """What policies of one model learn together.

    Attributes:
        usual: acceptance over all rows.
        prices: by the number of rows.
        trees: what trees gave, by their nodes.
        idle: steps since the view drafted.
        wait: after how many of them it is tried.
    """

    usual: Acceptance
    prices: dict[int, Prices] = field(default_factory=dict)
    trees: dict[int, Trees] = field(default_factory=dict)
    idle: int = 0
    wait: int = WAIT[0]

    @classmethod
    def of(cls, block: int) -> "Experience":
        """Return that of a view for blocks of `block` of which nothing is known yet."""
        return cls(Acceptance(slots(block), FADE**0.2))


class Policy:
    """Choose each step of a plan, and learn from what came of it.

    Args:
        plan: what to choose among.
        block: longest block the view was trained for.
        experience: what policies of the same model have learned, and go on learning; a new one unless given.
    """

    def __init__(self, plan: Plan, *, block: int, experience: Experience | None = None) -> None:
        self.plan = plan
        self.block = block
        self.steps = plan.steps(block)
        self.scratch = plan.scratch(block)
        self.experience = experience or Experience.of(block)
        self._rows: Sequence[RowState] = ()
        self._trial = False
        self._feature_SF = np.stack([features(step, drew=True, block=block) for step in self.steps])
        self._given_SF = np.stack([features(step, drew=False, block=block) for step in self.steps])
        self._drafts_S = np.array([step.drafts for step in self.steps])
        self._copies_S = np.array([step.lookup for step in self.steps])
        for step in self.steps:
            if step.nodes:
                self.experience.trees.setdefault(step.nodes, Trees.of(step))

    @property
    def copies(self) -> bool:
        """Whether rows' matches are needed: a step may copy from the text."""
        return bool(self._copies_S.any())

    @property
    def prefill_drafts(self) -> int:
        """How many drafts the pass that reads a prompt should make for the first step; 0 for none."""
        if len(self.steps) == 1:
            return 0 if self.steps[0].lookup else self.steps[0].drafts
        return self.block - 1 if self.experience.idle == 0 else 0

    def new_row(self) -> RowState:
        """Return the state of a row of which nothing is known yet."""
        return RowState(Acceptance(slots(self.block)))

    def choose(self, rows: Sequence[RowState]) -> Step:
        """Return the next step of the live rows, the same for all of them."""
        self._rows, self._trial = rows, False
        if len(self.steps) == 1:
            return self.steps[0]
        token_S, price_S = self._tokens_and_prices(rows)
        speed_S = token_S / price_S
        best = int(speed_S.argmax())
        if not self._asks_view(self.steps[best]) and self.experience.idle >= self.experience.wait:
            most_S = len(rows) * (1 + self._drafts_S) / price_S  # were all drafts kept
            self._trial = bool(most_S[~self._copies_S].max() > speed_S[best])
        return min(TRIAL, Step(self.block - 1)) if self._trial else self.steps[best]

    def learn(self, step: Step, outcomes: Sequence[RowOutcome], seconds: float) -> None:
        """Learn from a step that was taken.

        Args:
            step: the step, `choose`'s or another.
            outcomes: what it did to each of the rows that `choose` was given last, in their order.
            seconds: how long it took.
        """
        if len(self.steps) == 1:
            return
        experience = self.experience
        prices = self._prices(len(outcomes))
        drew = {outcome.drew for outcome in outcomes}
        if len(drew) == 1:  # else only some rows needed a draft pass
            prices.observe(features(step, drew=drew == {True}, block=self.block), seconds)
        experience.idle = experience.idle + 1 if not self._asks_view(step) else 0
        if experience.idle == 0:
            kept, asked = sum(outcome.kept + 1 for outcome in outcomes), features(step, drew=True, block=self.block)
            vain = self._trial and kept < float(prices.of(asked[None])[0]) * len(outcomes)
            experience.wait = min(2 * experience.wait, WAIT[1]) if vain else WAIT[0]
        for row, outcome in zip(self._rows, outcomes, strict=True):
            row.acceptance.learn(outcome, row.match)
            experience.usual.learn(outcome, row.match, 1 / len(outcomes))
            if outcome.chain is not None:
                experience.trees[step.nodes].learn(outcome.kept, outcome.chain)

    def price(self, step: Step, rows: int, seconds: float) -> None:
        """Learn what a step over so many rows takes whose drafts take a pass of their own."""
        self._prices(rows).observe(features(step, drew=True, block=self.block), seconds)

    @staticmethod
    def _asks_view(step: Step) -> bool:
        return step.drafts > 0 and not step.lookup

    def _prices(self, rows: int) -> Prices:
        prices = self.experience.prices
        if rows not in prices:
            nearest = min(prices, key=lambda other: max(other, rows) / min(other, rows), default=None)
            like = None if nearest is None else prices[nearest]
            prices[rows] = Prices(like, times=rows / (nearest or 1))
        return prices[rows]

    def _tokens_and_prices(self, rows: Sequence[RowState]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the tokens `[S]` to expect of each step, over all rows, and its price."""
        view_M, copy_M = expected(rows, self.experience.usual).sum(0)
        copies_S = copy_M[self._drafts_S] if any(row.match for row in rows) else 0.0
        token_S = np.where(self._copies_S, copies_S, self._of_view(view_M, len(rows)))
        feature_SF = self._feature_SF
        if all(row.ready for row in rows):
            served_S = np.array([all(row.serves(step) for row in rows) for step in self.steps])
            feature_SF = np.where(served_S[:, None], self._given_SF, feature_SF)
            token_S = token_S - served_S * sum(not row.blind for row in rows)  # the first tokens are there already
        return token_S, self._prices(len(rows)).of(feature_SF, OPTIMISM)

    def _of_view(self, token_M: NDArray[np.float64], rows: int) -> NDArray[np.float64]:
        """Return the tokens of each step, from those of chains."""
        token_S: NDArray[np.float64] = token_M[self._drafts_S]
        for s, step in enumerate(self.steps):
            if step.nodes:
                token_S[s] = self.experience.trees[step.nodes].tokens(token_M[: step.drafts + 1], rows)
        return token_S


def _average(sum_and_count: NDArray[np.float64], value: float) -> None:
    """Add a value to a mean over about the last fifty."""
    sum_and_count *= 0.98
    sum_and_count += (value, 1.0)
