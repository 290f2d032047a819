"""Answers in the shapes of OpenAI's API, as plain values; tests read them back with the `openai` package's types."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from orthrus import __version__
from orthrus.decode.output import Stats
from orthrus.serve.transcript import Piece

FINGERPRINT: Final = f"orthrus-{__version__}"


@dataclass(kw_only=True)
class Delta:
    """What one event adds to one choice.

    Attributes:
        index: the choice.
        pieces: its new text.
        cycle, accepted, drafted, emitted: which cycle of the choice this was and what it gave.
        finish_reason: why the choice ended, on its last delta.
        stats: the choice's statistics so far.
    """

    index: int
    pieces: Sequence[Piece] = ()
    cycle: int = 0
    accepted: int = 0
    drafted: int = 0
    emitted: int = 0
    finish_reason: str | None = None
    stats: Stats | None = None

    @property
    def text(self) -> str:
        """The new text."""
        return "".join(piece.text for piece in self.pieces)

    def blocks(self) -> dict[str, Any]:
        """Return what the extension `orthrus.blocks` tells of a chunk."""
        return {
            "cycle": self.cycle,
            "accepted": self.accepted,
            "drafted": self.drafted,
            "emitted": self.emitted,
            "forwards": self.stats.forwards if self.stats else 0,
            "pieces": [{"text": p.text, "cycle": p.cycle, "source": p.source} for p in self.pieces],
        }


@dataclass(kw_only=True)
class Choice:
    """A choice put together from its deltas, for an answer in one piece."""

    index: int
    text: str = ""
    finish_reason: str | None = None
    stats: Stats = field(default_factory=Stats)

    def add(self, delta: Delta) -> None:
        """Append a delta."""
        self.text += delta.text
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.stats = delta.stats or self.stats


class Usage:
    """Tokens of a request, in OpenAI's names; what drafting did stands under `orthrus`."""

    def __init__(self, prompt_tokens: int) -> None:
        """Begin with the prompt (all prompts of the request)."""
        self.prompt_tokens = prompt_tokens
        self.emitted = self.accepted = self.drafted = 0
        self._parts: dict[int, Stats] = {}

    def add(self, delta: Delta) -> None:
        """Count a delta."""
        self.emitted += delta.emitted
        self.accepted += delta.accepted
        self.drafted += delta.drafted
        if delta.stats is not None:
            self._parts[delta.index] = delta.stats

    def to_dict(self) -> dict[str, Any]:
        """Return the usage so far."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.emitted,
            "total_tokens": self.prompt_tokens + self.emitted,
            "completion_tokens_details": {
                "accepted_prediction_tokens": self.accepted,
                "rejected_prediction_tokens": self.drafted - self.accepted,
            },
            "orthrus": Stats.total(self._parts.values()).to_dict() if self._parts else None,
        }


class Shape:
    """The envelope of one answer."""

    kind: str
    prefix: str

    def __init__(self, model: str) -> None:
        """Give the answer a name and a time."""
        self.head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the chunk that opens a choice, if this shape has one."""
        return None

    def chunk(self, delta: Delta) -> dict[str, Any]:
        """Return one chunk of a stream."""
        raise NotImplementedError

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """Return an answer in one piece."""
        raise NotImplementedError

    def last(self, usage: Usage) -> dict[str, Any]:
        """Return the chunk of `include_usage`: no choices, only the usage."""
        return {**self._chunk([]), "usage": usage.to_dict()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        raise NotImplementedError


class ChatShape(Shape):
    """`chat.completion` and `chat.completion.chunk`."""

    prefix = "chatcmpl"

    def opening(self, index: int) -> dict[str, Any]:
        """Return the chunk that names the assistant."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def chunk(self, delta: Delta) -> dict[str, Any]:
        """Return one chunk of a stream."""
        content = {"content": delta.text} if delta.text else {}
        return self._chunk(
            [{"index": delta.index, "delta": content, "logprobs": None, "finish_reason": delta.finish_reason}]
        )

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """Return an answer in one piece."""
        made = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": None,
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        return {**self.head, "object": "chat.completion", "choices": made, "usage": usage.to_dict()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk", "choices": choices}


class TextShape(Shape):
    """`text_completion`, whole and in chunks; `echo` puts the prompt in front."""

    prefix = "cmpl"

    def __init__(self, model: str, echo: Sequence[str] | None = None) -> None:
        """Remember the prompt of each choice where it is to be repeated."""
        super().__init__(model)
        self._echo = echo

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the chunk with the prompt, where it is to be repeated."""
        return self._chunk([self._choice(index, self._echo[index], None)]) if self._echo else None

    def chunk(self, delta: Delta) -> dict[str, Any]:
        """Return one chunk of a stream."""
        return self._chunk([self._choice(delta.index, delta.text, delta.finish_reason)])

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """Return an answer in one piece."""
        made = [
            self._choice(c.index, (self._echo[c.index] if self._echo else "") + c.text, c.finish_reason)
            for c in choices
        ]
        return {**self._chunk(made), "usage": usage.to_dict()}

    @staticmethod
    def _choice(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "object": "text_completion", "choices": choices}
