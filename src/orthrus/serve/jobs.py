"""Jobs and what happens to them: the words in which the loop speaks with everything around it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from orthrus.decode.options import Options
from orthrus.decode.output import Stats
from orthrus.errors import OrthrusError
from orthrus.serve.logprobs import Scored


class Overloaded(OrthrusError):
    """The queue is full: the request may be sent again later."""


class Draining(OrthrusError):
    """The server is shutting down and takes no more requests."""


class TimedOut(OrthrusError):
    """The request ran longer than the server allows."""


class Event(NamedTuple):
    """What one cycle added to one job, or how the job ended.

    Attributes:
        token_ids: the cycle's tokens: the backbone's first, where it gave one, accepted drafts, the bonus.
        first: whether there is such a first token.
        accepted, drafted: how many of them were drafts, and how many the cycle proposed.
        finish_reason: "stop" or "length" on the last event, otherwise None.
        stats: the job's statistics so far.
        error: why the job ended without a text; it is the last event.
        scored: the tokens' log probabilities, where the job asks for them.
        cached: tokens of the prompt that were not read, for their keys were there already.
    """

    token_ids: Sequence[int] = ()
    first: bool = False
    accepted: int = 0
    drafted: int = 0
    finish_reason: str | None = None
    stats: Stats | None = None
    error: Exception | None = None
    scored: Sequence[Scored] = ()
    cached: int = 0

    @property
    def last(self) -> bool:
        """True when no event follows."""
        return self.finish_reason is not None or self.error is not None


@dataclass(kw_only=True, eq=False, slots=True)
class Job:
    """One completion to write.

    Attributes:
        index: tells the choices of one request apart, so that each draws noise of its own.
        mode: the engine that decodes it, a key of the loop's engines.
        top: how many likeliest tokens each event tells beside its own, with log probabilities; None for none at all.
        deliver: called on the loop's thread with every event; must not block.
        deadline: the clock's time at which it ends with `TimedOut`; None for never.
        submitted, started, first, latest: when it was queued, joined a batch, gained its first and its last tokens.
        id: the engine's name for it.
        drafted, emitted: drafts proposed and tokens written so far.
    """

    prompt_ids: list[int]
    options: Options
    deliver: Callable[[Event], None]
    index: int = 0
    mode: str = "orthrus"
    top: int | None = None
    deadline: float | None = None
    submitted: float = 0.0
    started: float | None = None
    first: float | None = None
    latest: float | None = None
    id: int | None = None
    drafted: int = 0
    emitted: int = 0
    done: bool = False


class Watcher(Protocol):
    """Who is told what happens; called on the loop's thread."""

    def started(self, job: Job, now: float) -> None:
        """A job left the queue."""

    def advanced(self, job: Job, event: Event, now: float) -> None:
        """A job gained tokens."""

    def ended(self, job: Job, reason: str, stats: Stats | None, now: float) -> None:
        """A job ended: "stop", "length", "abort", "timeout" or "error"."""
