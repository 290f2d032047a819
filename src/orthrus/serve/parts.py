"""An answer's text taken apart as it comes: content, reasoning (`<think>`) and tool calls (`<tool_call>`).

Everything that is not a well-formed call stays content, as the model wrote it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from orthrus.serve.calls import Functions, Reader, reader_for
from orthrus.serve.transcript import Piece, append, overlap, split

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"

State = Literal["content", "reasoning", "call"]


@dataclass(slots=True)
class Call:
    """A tool call, or what a delta adds to it: the first delta of a call has its name."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class Parts:
    """What some pieces of text turned out to be."""

    content: list[Piece] = field(default_factory=list)
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)


class Splitter:
    """Take one choice's pieces apart.

    `thinks` says whether `<think>` opens a thought, `thinking` whether the prompt has opened one already; `tools` are
    functions that `<tool_call>` may call, None where it is text; with `single` the answer is `done` with its first
    call.
    """

    def __init__(
        self, *, thinks: bool = False, thinking: bool = False, tools: Functions | None = None, single: bool = False
    ) -> None:
        self._single = single
        self._opens: dict[str, State] = {THINK: "reasoning"} if thinks else {}
        self._opens |= {} if tools is None else {CALL: "call"}
        self._state: State = "reasoning" if thinking else "content"
        self._held: list[Piece] = []
        self._trims = thinking
        self._functions: Functions = tools or {}
        self._called: list[Piece] = []  # of the call at hand
        self._reader: Reader | None = None
        self.calls = 0
        self.done = False

    def push(self, pieces: Iterable[Piece], *, last: bool = False) -> Parts:
        """Return what has become clear; with `last`, everything."""
        parts = Parts()
        for piece in pieces:
            append(self._held, piece)
        while self._advance(parts, last=last):
            pass
        return parts

    def _advance(self, parts: Parts, *, last: bool) -> bool:
        """Take what stands before the next tag; returns whether there was one."""
        text = "".join(piece.text for piece in self._held)
        tags = {"content": list(self._opens), "reasoning": [END_THINK], "call": [END_CALL]}[self._state]
        first = min(((at, tag) for tag in tags if (at := text.find(tag)) >= 0), default=None)
        if first is None:
            end = len(text) if last else len(text) - max((overlap(text, tag) for tag in tags), default=0)
            taken, self._held = split(self._held, end)
            self._take(parts, taken, closed=False, last=last)
            return False
        at, tag = first
        taken, rest = split(self._held, at)
        _, self._held = split(rest, len(tag))
        self._take(parts, taken, closed=self._state != "content", last=last)
        self._state = self._opens.get(tag, "content")
        self.done = self.done or (self._single and self.calls > 0)
        self._trims = self._reader is None or not self._reader.failed
        self._called, self._reader = [], None
        return not self.done

    def _take(self, parts: Parts, pieces: list[Piece], *, closed: bool, last: bool) -> None:
        if self._state == "call":
            self._take_call(parts, pieces, closed=closed, last=last)
            return
        if self._trims:  # line breaks beside a tag belong to the format
            text = "".join(piece.text for piece in pieces)
            pieces = split(pieces, len(text) - len(text.lstrip()))[1]
            self._trims = not pieces
        if self._state == "reasoning":
            parts.reasoning += "".join(piece.text for piece in pieces)
        else:
            parts.content.extend(pieces)

    def _take_call(self, parts: Parts, pieces: list[Piece], *, closed: bool, last: bool) -> None:
        self._called += pieces
        text = "".join(piece.text for piece in pieces)
        reader = self._reader = self._reader or reader_for(text, self._functions, closed=closed)
        name, arguments = (None, "") if reader is None else reader.push(text, closed=closed)
        named = reader is not None and reader.named
        if (reader is not None and reader.failed) or (last and not closed and not named):
            tag = self._called[0] if self._called else Piece("", 0, "bonus")
            end = [tag._replace(text=END_CALL)] if closed else []
            parts.content += [tag._replace(text=CALL), *self._called, *end]
            return
        if name is not None:
            parts.calls.append(Call(self.calls, name, arguments))
            self.calls += 1
        elif arguments:
            parts.calls.append(Call(self.calls - 1, None, arguments))


def joined(calls: Sequence[Call]) -> list[Call]:
    made: dict[int, Call] = {}
    for call in calls:
        whole = made.setdefault(call.index, Call(call.index, call.name))
        whole.arguments += call.arguments
    return list(made.values())
