"""Contenders timed against each other on one batch of prompts, one after another, again and again.

Interleaving spreads whatever else the machine does evenly over all of them; turning the order gives none of them the
best place.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from orthrus.bench.contenders import Answer, Contender, Decoder

Clock: TypeAlias = Callable[[], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Laps:
    """What one contender did with one batch: each round's seconds and answers to the prompts."""

    seconds: list[float]
    answers: list[list[Answer]]

    def tokens(self, index: int) -> list[list[int]]:
        """Return each round's tokens for the prompt at that place in the batch."""
        return [answers[index].token_ids for answers in self.answers]


def race(
    decoders: Mapping[Contender, Decoder],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    rounds: int,
    turn: int,
    clock: Clock,
    on_lap: Callable[[], None],
) -> dict[Contender, Laps]:
    """Let all contenders answer a batch `rounds` times; the order moves on with each round and `turn`."""
    order = list(decoders)
    laps = {contender: Laps(seconds=[], answers=[]) for contender in order}
    for round in range(rounds):
        first = (turn + round) % len(order)
        for contender in order[first:] + order[:first]:
            start = clock()
            answers = decoders[contender](prompts, max_new_tokens)
            laps[contender].seconds.append(clock() - start)
            laps[contender].answers.append(answers)
            on_lap()
    return laps


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """Return the first position at which two texts differ (an end counts); None when they are equal."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))
