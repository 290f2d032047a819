"""An engine that writes what a test says, block by block: for texts that no tiny model would write."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedTokenizerFast

from orthrus.decode.options import Options
from orthrus.decode.output import Stats

FAILS = "@fails@"
"""A text with this in it ends its row with an error."""


@dataclass
class Row:
    """What a loop sees of a row."""

    id: int
    token_ids: list[int]
    left: int
    stats: Stats = field(default_factory=Stats)
    finish_reason: str | None = None
    error: Exception | None = None
    cached: int = 0


class Scripted:
    """Answer each prompt with a text, in blocks of some tokens of which the last one is the bonus.

    After `pause_after` steps the next one waits, with `paused` set, until `go_on` is.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        reply: Callable[[str], str],
        *,
        block: int = 5,
        plain: bool = False,
        pause_after: int | None = None,
    ) -> None:
        """Prepare; `reply` is given the prompt as text."""
        self._left = pause_after
        self.paused, self.go_on = threading.Event(), threading.Event()
        self._tokenizer, self._reply, self._block, self._plain = tokenizer, reply, 1 if plain else block, plain
        self._rows: dict[int, Row] = {}
        self._next = 0
        self.prompts: list[str] = []

    @property
    def busy(self) -> bool:
        """True while a row is in flight."""
        return bool(self._rows)

    def add(self, prompt_ids: Sequence[int], options: Options, *, tokenizer: Any = None, index: int = 0) -> int:
        """Begin a row."""
        prompt = self._tokenizer.decode(prompt_ids)
        self.prompts.append(prompt)
        text = self._reply(prompt)
        self._next += 1
        self._rows[self._next] = Row(self._next, self._tokenizer(text)["input_ids"], options.max_new_tokens)
        return self._next

    def abort(self, id: int) -> bool:
        """End a row."""
        return self._rows.pop(id, None) is not None

    def step(self) -> list[Any]:
        """Write each row's next block."""
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                self.paused.set()
                assert self.go_on.wait(60)
        made = []
        for row in list(self._rows.values()):
            if FAILS in self._tokenizer.decode(row.token_ids):
                row.finish_reason, row.error = "error", ValueError("this row cannot go on")
                del self._rows[row.id]
                made.append(SimpleNamespace(row=row, token_ids=[], accepted=0, first=False, kept=None))
                continue
            tokens = row.token_ids[: min(self._block, row.left)]
            del row.token_ids[: len(tokens)]
            row.left -= len(tokens)
            accepted = 0 if self._plain else len(tokens) - 1
            drafted, forwards = (0, 1) if self._plain else (max(7, accepted), 2)
            row.stats.record(drafted=drafted, accepted=accepted, emitted=len(tokens), forwards=forwards)
            if row.left == 0 or not row.token_ids:
                row.finish_reason = "length" if row.left == 0 else "stop"
                del self._rows[row.id]
            made.append(SimpleNamespace(row=row, token_ids=tokens, accepted=accepted, first=False, kept=None))
        return made
