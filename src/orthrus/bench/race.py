"""Contenders, timed against each other on one batch of prompts, again and again, in turning order."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Final, NamedTuple, TypeAlias

from orthrus.decode.exact import Exact
from orthrus.decode.rows import Row

Clock: TypeAlias = Callable[[], float]


class Contender(NamedTuple):
    """One way to decode: one of `contenders.MODES`, or a peer's label, with a plan and (our own) how exact.

    Of llama.cpp, `plan` is the label of its weights, None for the file that the backbone came from.
    """

    mode: str
    plan: str | None = None
    exact: Exact | None = None

    @property
    def name(self) -> str:
        return " ".join(filter(None, self[:2]))

    @property
    def label(self) -> str:
        return f"{self.name} exact" if self.exact == "token" else self.name


PLAIN: Final = Contender("ar", None, "distribution")
"""Plain decoding, which others are compared with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a contender wrote to one prompt.

    Attributes:
        stats: counts and ratios under the names of `orthrus.decode.output`; peers have `emitted`, `forwards`
            and `tokens_per_forward` only, llama.cpp `drafted`, `accepted`, `first_token_seconds` and its weights too.
        proposed_per_position, accepted_at_position: how often slot j was drafted, how often its draft was emitted.
    """

    token_ids: list[int]
    stats: Mapping[str, Any]
    proposed_per_position: list[int] = field(default_factory=list)
    accepted_at_position: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, row: Row, **more: float) -> "Answer":
        """Return what the engine wrote; `more` goes to the statistics."""
        return cls(
            token_ids=row.token_ids,
            stats=row.stats.to_dict() | more,
            proposed_per_position=row.stats.proposed_per_position,
            accepted_at_position=row.stats.accepted_at_position,
        )

    @classmethod
    def counted(cls, token_ids: list[int], forwards: int, **more: Any) -> "Answer":
        """Return what somebody else wrote, in so many passes; `more` goes to the statistics."""
        stats = {"emitted": len(token_ids), "forwards": forwards, "tokens_per_forward": len(token_ids) / forwards}
        return cls(token_ids=token_ids, stats=stats | more)


Decoder: TypeAlias = Callable[[Sequence[Sequence[int]], int], list[Answer]]
"""Answer all prompts of one batch, given as token ids, with at most so many new tokens each."""


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
    pairs = enumerate(zip_longest(left, right))
    return next((index for index, (one, other) in pairs if one != other), None)
