"""Answers in the shapes of OpenAI's API, as plain values; tests read them back with the `openai` package's types."""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from orthrus import __version__
from orthrus.decode.output import Stats
from orthrus.serve.jobs import Event
from orthrus.serve.logprobs import Scored, Spelling, chat_logprobs, text_logprobs
from orthrus.serve.parts import Call, Parts, joined

FINGERPRINT: Final = f"orthrus-{__version__}"


@dataclass(kw_only=True)
class Delta:
    """What one event adds to one choice; `cycle` is which of the choice's it was."""

    index: int
    event: Event
    parts: Parts
    scored: Sequence[Scored]
    cycle: int
    finish_reason: str | None

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.parts.content)

    @property
    def says(self) -> bool:
        """Whether a client learns anything from it."""
        parts = self.parts
        return bool(parts.content or parts.reasoning or parts.calls or self.scored or self.finish_reason)

    def blocks(self) -> dict[str, Any]:
        """Return what the extension `orthrus.blocks` tells of a chunk."""
        return {
            "cycle": self.cycle,
            "accepted": self.event.accepted,
            "drafted": self.event.drafted,
            "emitted": len(self.event.token_ids),
            "forwards": self.event.stats.forwards if self.event.stats else 0,
            "pieces": [piece._asdict() for piece in self.parts.content],
        }


@dataclass(kw_only=True)
class Choice:
    """A choice put together from its deltas, for an answer in one piece."""

    index: int
    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.reasoning += delta.parts.reasoning
        self.calls += delta.parts.calls
        self.scored += delta.scored
        self.finish_reason = delta.finish_reason or self.finish_reason


class Usage:
    """Tokens of a request, in OpenAI's names; what drafting did stands under `orthrus`."""

    def __init__(self, prompt_tokens: int, *, choices: int) -> None:
        """Begin with the tokens of all prompts of a request; each prompt has so many choices."""
        self.prompt_tokens = prompt_tokens
        self._choices = choices
        self._cached: dict[int, int] = {}
        self.emitted = self.accepted = self.drafted = 0
        self._parts: dict[int, Stats] = {}

    def add(self, delta: Delta) -> None:
        event = delta.event
        self.emitted += len(event.token_ids)
        self.accepted += event.accepted
        self.drafted += event.drafted
        if delta.index % self._choices == 0:  # a prompt's other choices read it from the first one's keys
            self._cached[delta.index] = event.cached
        if event.stats is not None:
            self._parts[delta.index] = event.stats

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.emitted,
            "total_tokens": self.prompt_tokens + self.emitted,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
            "completion_tokens_details": {
                "accepted_prediction_tokens": self.accepted,
                "rejected_prediction_tokens": self.drafted - self.accepted,
            },
            "orthrus": Stats.total(self._parts.values()).to_dict() if self._parts else None,
        }


class Shape(ABC):
    """The envelope of one answer."""

    prefix: str
    kind: str  # a chunk's "object"

    def __init__(self, model: str, spell: Callable[[int], Spelling] | None = None) -> None:
        """Give the answer a name and a time; `spell` is given where log probabilities are asked for."""
        self.spell = spell
        self.head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the chunk that opens a choice, if this shape has one."""
        return None

    @abstractmethod
    def chunk(self, delta: Delta) -> dict[str, Any]:
        """Return one chunk of a stream."""

    @abstractmethod
    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """Return an answer in one piece."""

    def last(self, usage: Usage) -> dict[str, Any]:
        """Return the chunk of `include_usage`: no choices, only the usage."""
        return {**self._chunk([]), "usage": usage.to_dict()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a chunk with these choices."""
        return {**self.head, "object": self.kind, "choices": choices}


class ChatShape(Shape):
    prefix, kind = "chatcmpl", "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any]:
        """Return the chunk that names the assistant."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def chunk(self, delta: Delta) -> dict[str, Any]:
        made: dict[str, Any] = {}
        if delta.parts.reasoning:
            made["reasoning_content"] = delta.parts.reasoning
        if delta.text:
            made["content"] = delta.text
        if delta.parts.calls:
            made["tool_calls"] = [_call_delta(call) for call in delta.parts.calls]
        return self._chunk([self._choice(delta.index, "delta", made, delta.scored, delta.finish_reason)])

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        made = [self._choice(c.index, "message", _message(c), c.scored, c.finish_reason) for c in choices]
        return {**self.head, "object": "chat.completion", "choices": made, "usage": usage.to_dict()}

    def _choice(
        self, index: int, name: str, value: dict[str, Any], tokens: Sequence[Scored], finish_reason: str | None
    ) -> dict[str, Any]:
        logprobs = chat_logprobs(tokens, self.spell) if self.spell and tokens else None
        return {"index": index, name: value, "logprobs": logprobs, "finish_reason": finish_reason}


def _message(choice: Choice) -> dict[str, Any]:
    made: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.reasoning:
        made["reasoning_content"] = choice.reasoning
    if choice.calls:
        made["content"] = choice.text or None
        made["tool_calls"] = [_whole_call(call) for call in joined(choice.calls)]
    return made


def _whole_call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _call_delta(call: Call) -> dict[str, Any]:
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {"index": call.index, **_whole_call(call)}


class TextShape(Shape):
    """`text_completion`, whole and in chunks; `echo` puts the prompt in front."""

    prefix, kind = "cmpl", "text_completion"

    def __init__(
        self, model: str, spell: Callable[[int], Spelling] | None = None, echo: Sequence[str] | None = None
    ) -> None:
        """Remember the prompt of each choice where it is to be repeated."""
        super().__init__(model, spell)
        self._echo = echo
        self._offsets: dict[int, int] = {}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the chunk with the prompt, where it is to be repeated."""
        return self._chunk([self._choice(index, self._echo[index], None)]) if self._echo else None

    def chunk(self, delta: Delta) -> dict[str, Any]:
        return self._chunk([self._choice(delta.index, delta.text, delta.finish_reason, delta.scored)])

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        made = [
            self._choice(c.index, (self._echo[c.index] if self._echo else "") + c.text, c.finish_reason, c.scored)
            for c in choices
        ]
        return {**self._chunk(made), "usage": usage.to_dict()}

    def _choice(
        self, index: int, text: str, finish_reason: str | None, tokens: Sequence[Scored] = ()
    ) -> dict[str, Any]:
        logprobs = None
        if self.spell and tokens:
            offset = self._offsets.get(index, 0)
            logprobs = text_logprobs(tokens, self.spell, offset)
            self._offsets[index] = offset + sum(len(self.spell(s.token).text) for s in tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
