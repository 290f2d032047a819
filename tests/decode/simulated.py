"""Planners at work without a model and without time: simulated drafts, a simulated clock."""

import math
import random
from collections.abc import Callable, Mapping

from orthrus.decode.planner import Planner
from orthrus.decode.worth import Record
from orthrus.policy.steps import Kind, Step, parse

BLOCK = 16

SLOTS = 63
"""Drafts that records count, more than any step of these blocks makes."""

Price = Callable[[Step, bool], float]
"""What a step takes, and whether it has to draft first."""

Machine = Callable[[float], float]
"""What a step takes at the moment that usually takes so many seconds."""

Accept = Callable[[int], int]
"""How many drafts would be right from this place of the text on."""


def fresh(fade: float = 0.95) -> Record:
    """A record of nothing yet."""
    return Record(slots=SLOTS, fade=fade)


def simulate(
    accept: Accept,
    *,
    price: Price,
    tokens: int,
    plan: str = "auto",
    planner: Planner | None = None,
    ahead: Accept | None = None,
    surprise: float = 0.5,
    rescue: float = 0.0,
    room: int | None = None,
) -> tuple[float, list[Step]]:
    """Run a planner until so many tokens are out.

    `ahead` says how many of the drafts made ahead would be right, `accept` unless given; acceptance stops somewhere
    else than at the likeliest place with the chance `surprise`, and so on from each place to the next likely. Trees
    keep one draft more where the chain inside breaks off, with the chance `rescue`.
    """
    planner = planner or Planner(parse(plan), block=BLOCK)
    record, elsewhere, more = fresh(), geometric(surprise, seed=1), geometric(rescue, seed=2)
    seconds, done, ready, steps = 0.0, 0, 0, []
    while done < tokens:
        step = planner.choose([record], ready=ready, blind=True, room=room)
        drew = step.kind not in ("chain", "onepass") or not 0 < step.drafts <= ready or planner.draws
        kept = min((accept if drew or ahead is None else ahead)(done), step.drafts)
        rank = min(elsewhere(done), step.drafts, step.stops)
        ranks = [rank] if step.kind == "onepass" else None
        inside = [(kept, step.drafts)] if step.nodes else None
        kept += min(more(done), 1) if step.nodes and kept < step.drafts else 0
        took = price(step, drew)
        planner.observe(step, [record], [kept], took, drew=drew, ranks=ranks, inside=inside)
        ready = step.drafts if ranks and rank < step.stops else 0
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
        verified = step.scratch if step.kind == "onepass" else 1 + (step.nodes or step.drafts)
        return beyond + draft + one(verified)

    return price


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

    return accept


def fixed(step: Step, accept: Accept, price: Price, tokens: int) -> float:
    """Return what always taking one step would cost."""
    seconds, done = 0.0, 0
    while done < tokens:
        done += min(accept(done), step.drafts) + 1
        seconds += price(step, True)
    return seconds
