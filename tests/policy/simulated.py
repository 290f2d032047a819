"""Policies at work without a model and without time: simulated drafts, a simulated clock."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache

from orthrus.policy.acceptance import RowOutcome, Source
from orthrus.policy.lookup import Match
from orthrus.policy.policy import Policy
from orthrus.policy.steps import Kind, Step, parse

BLOCK = 16

Price = Callable[[Step, bool], float]
"""What a step takes, and whether it has to draft first."""

Machine = Callable[[float], float]
"""What a step takes at the moment that usually takes so many seconds."""

Accept = Callable[[int], int]
"""How many drafts would be right from this position of the text on."""


def policy(plan: str = "auto") -> Policy:
    """A policy that has learned nothing yet."""
    return Policy(parse(plan), block=BLOCK)


def simulate(
    accept: Accept,
    *,
    price: Price,
    tokens: int,
    plan: str = "auto",
    chooser: Policy | None = None,
    copy: Accept | None = None,
    match: Match | None = None,
    ready: int = 0,
    tree_gain: float = 0.0,
) -> tuple[float, list[Step]]:
    """Decode with a policy until so many tokens are written; returns the seconds it took, and the steps.

    Args:
        accept: how many of the view's drafts would be right.
        price: what steps take.
        tokens: to write.
        plan: of a new policy.
        chooser: a policy to go on with.
        copy: how many tokens of a copy would be right, in a text with such a `match` everywhere.
        match: its length.
        ready: drafts that the pass over the prompt has made.
        tree_gain: chance that a tree keeps one draft more where the chain inside breaks off.
    """
    chooser = chooser or policy(plan)
    row, more = chooser.new_row(), geometric(tree_gain, seed=2)
    row.match, row.ready = match, ready
    seconds, done, steps = 0.0, 0, []
    while done < tokens:
        step = chooser.choose([row])
        drew = step.drafts > 0 and not step.lookup and not row.serves(step)
        source = copy if step.lookup else accept
        kept = min(source(done), step.drafts) if source else 0
        inside = (kept, step.drafts) if step.nodes else None
        kept += min(more(done), 1) if step.nodes and kept < step.drafts else 0
        outcome = RowOutcome(
            source="text" if step.lookup else "view" if step.drafts else None,
            drafted=step.drafts,
            kept=kept,
            drew=drew,
            chain=inside,
            copy_kept=min(copy(done), kept + 1) if copy else None,
        )
        took = price(step, drew)
        chooser.learn(step, [outcome], took)
        row.ready = 0
        seconds += took
        done += kept + 1
        steps.append(step)
    return seconds, steps


def by_rows(one: Callable[[int], float], more: Mapping[Kind, float] | None = None) -> Price:
    """Price steps by what a pass over so many rows takes, and by what each kind takes beyond its passes."""

    def price(step: Step, drew: bool = True) -> float:
        beyond = (more or {}).get(step.kind, 0.0)
        if step.kind == "plain":
            return beyond + one(1)
        draft = one(step.drafts + 1) if drew and not step.lookup else 0.0
        return beyond + draft + one(1 + (step.nodes or step.drafts))

    return cache(price)


def measured(milliseconds: Mapping[int, float]) -> Price:
    """Price passes by the positions they read, as measured; on the line in between and beyond."""
    known = sorted(milliseconds.items())

    def one(rows: int) -> float:
        after = next((i for i, (x, _) in enumerate(known) if x >= rows), len(known) - 1)
        (x0, y0), (x1, y1) = known[max(after - 1, 0)], known[max(after, 1)]
        return y0 + (y1 - y0) * (rows - x0) / (x1 - x0)

    return by_rows(one)


def linear(wide: float) -> Price:
    """Price passes so that one of 16 rows costs `wide` one-row passes, in proportion in between."""
    return by_rows(lambda rows: 1 + (wide - 1) * (rows - 1) / 15)


class Moody:
    """A machine with bad moments: they come at random, last some steps, and make each take half as long again."""

    def __init__(self, *, share: float, steps: int, seed: int) -> None:
        self.share, self.steps = share, steps
        self.rng, self.left, self.slow = random.Random(seed), 0.0, False

    def __call__(self, seconds: float) -> float:
        if self.left <= 0:
            self.slow = self.rng.random() < self.share
            self.left = self.rng.expovariate(1 / self.steps) if self.slow else 1.0
        self.left -= 1
        return seconds * (1.5 if self.slow else 1.0) * math.exp(abs(self.rng.gauss(0, 0.05)))


class Shared:
    """A machine that is used by others: its pace wanders over moments, seconds and minutes, each by 8 %.

    In the manner of what the bundled model's steps go through on a shared machine with two cores.
    """

    def __init__(self, seed: int) -> None:
        self.rng, self.parts = random.Random(seed), {3: 0.0, 20: 0.0, 100: 0.0}

    def __call__(self, seconds: float) -> float:
        for steps, level in self.parts.items():
            kept = math.exp(-1 / steps)
            self.parts[steps] = kept * level + self.rng.gauss(0, 0.08 * math.sqrt(1 - kept**2))
        return seconds * math.exp(sum(self.parts.values()) + abs(self.rng.gauss(0, 0.11)))


def geometric(rate: float, seed: int = 0) -> Accept:
    """Drafts that are each right with the same chance; where they are at one rate, they are at a higher one."""
    rng, drawn = random.Random(seed), list[float]()

    def accept(place: int) -> int:
        drawn.extend(rng.random() for _ in range(place + 64 - len(drawn)))
        return next((i for i, chance in enumerate(drawn[place : place + 63]) if chance >= rate), 63)

    return cache(accept)


def best(accept: Accept, price: Price, tokens: int) -> float:
    """Return what the best step of all costs, taken always: plain, or a chain of any length."""
    return min(fixed(Step(drafts), accept, price, tokens) for drafts in range(BLOCK))


def fixed(step: Step, accept: Accept, price: Price, tokens: int) -> float:
    """Return what always taking one step would cost."""
    seconds, done = 0.0, 0
    while done < tokens:
        done += min(accept(done), step.drafts) + 1
        seconds += price(step, True)
    return seconds


def simulate_rows(
    accept: Accept, *, price: Callable[[int, Step, bool], float], rows: Sequence[int], chooser: Policy, ready: int = 0
) -> list[tuple[Step, float, int]]:
    """Decode with so many rows in each step; returns the steps, the seconds they took and the tokens they wrote.

    Args:
        accept: how many of the view's drafts would be right at a position; rows are far apart.
        price: what a step over so many rows takes, and whether it has to draft first.
        rows: how many there are in each step.
        chooser: the policy.
        ready: drafts that the pass over the prompts has made.
    """
    states = [chooser.new_row() for _ in range(max(rows))]
    for state in states:
        state.ready = ready
    at = [2000 * row for row in range(max(rows))]
    made = []
    for count in rows:
        step = chooser.choose(states[:count])
        source: Source | None = "text" if step.lookup else "view" if step.drafts else None
        outcomes, drew = [], source == "view" and not all(state.serves(step) for state in states[:count])
        for row in range(count):
            kept = min(accept(at[row]), step.drafts) if source == "view" else 0
            at[row] += kept + 1
            inside = (kept, step.drafts) if step.nodes else None
            outcomes.append(RowOutcome(source, step.drafts, kept, drew=drew, chain=inside))
            states[row].ready = 0
        took = price(count, step, drew)
        chooser.learn(step, outcomes, took)
        made.append((step, took, sum(outcome.kept + 1 for outcome in outcomes)))
    return made
