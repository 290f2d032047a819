"""One choice's tokens as text: pieces that name their cycle and source, stop strings cut, half of one held back.

Knows no HTTP and no engine.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from orthrus.decode.text import TextStream
from orthrus.serve.jobs import Event

Source = Literal["draft", "bonus"]


class Piece(NamedTuple):
    """Text that one source wrote in one cycle."""

    text: str
    cycle: int
    source: Source


class Transcript:
    """Turn a job's events into text as OpenAI's API gives it: a stop string is not part of the text.

    `cycles` counts steps behind the prompt's own pass, which is number 0.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._stream = TextStream(tokenizer)
        self._stops = tuple(stops)
        self._held: list[Piece] = []
        self.stopped = False
        self.text = ""
        self.cycles = 0

    def push(self, event: Event) -> list[Piece]:
        """Return the pieces that may be shown by now; after the last event, all that is left."""
        self.cycles += event.stats is None or event.stats.forwards > 1
        pieces = self._held
        for index, token in enumerate(event.token_ids):
            source: Source = "draft" if 0 <= index - event.first < event.accepted else "bonus"
            append(pieces, Piece(self._stream.push(token), self.cycles, source))
        if event.finish_reason is not None:
            append(pieces, Piece(self._stream.finish(), self.cycles, "bonus"))
        whole = "".join(piece.text for piece in pieces)
        end = self._end(whole, last=event.finish_reason is not None)
        shown, self._held = split(pieces, end)
        if self.stopped:
            self._held = []
        self.text += whole[:end]
        return shown

    def _end(self, whole: str, *, last: bool) -> int:
        """Return how much of the unshown text may be shown."""
        if self.stopped:
            return 0
        hits = [at for stop in self._stops if (at := whole.find(stop)) >= 0]
        if hits:
            self.stopped = True
            return min(hits)
        if last:
            return len(whole)
        return len(whole) - max((overlap(whole, stop) for stop in self._stops), default=0)


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text with which a stop string begins, short of all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def append(pieces: list[Piece], piece: Piece) -> None:
    """Add a piece, joined to the last one where cycle and source are the same."""
    if not piece.text:
        return
    if pieces and pieces[-1][1:] == piece[1:]:
        pieces[-1] = piece._replace(text=pieces[-1].text + piece.text)
    else:
        pieces.append(piece)


def split(pieces: list[Piece], end: int) -> tuple[list[Piece], list[Piece]]:
    before: list[Piece] = []
    after: list[Piece] = []
    for piece in pieces:
        head, tail = piece.text[: max(end, 0)], piece.text[max(end, 0) :]
        end -= len(piece.text)
        if head:
            before.append(piece._replace(text=head))
        if tail:
            after.append(piece._replace(text=tail))
    return before, after
