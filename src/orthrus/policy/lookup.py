"""Drafts that a text supplies itself: what followed when its last few tokens were last written.

They cost no pass, so a cycle is one verify pass (prompt lookup decoding; Saxena, 2023).
"""

from collections.abc import Iterable, Sequence
from typing import Literal

NGRAM = 3
"""Tokens of the shortest match."""

LONG = 8
"""Tokens of a long match: what followed there hardly ever fails to follow here. A shorter one may be chance."""

Match = Literal["short", "long"]
"""How many of the text's last tokens were written before what would be copied: at least `NGRAM`, at least `LONG`."""


class Lookup:
    """An index over one text, grown with it: where each run of `NGRAM` tokens was last continued."""

    __slots__ = ("_next", "_source", "_text")

    def __init__(self, token_ids: Iterable[int] = ()) -> None:
        self._text: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}
        self._source: int | None = None
        self.extend(token_ids)

    def __len__(self) -> int:
        """Return the number of tokens indexed."""
        return len(self._text)

    @property
    def matched(self) -> int:
        """How many of the text's last tokens, `LONG` at most, were written before what would be copied; 0: nothing."""
        if self._source is None:
            return 0
        text, ahead = self._text, len(self._text) - self._source
        count = NGRAM
        while count < min(LONG, self._source) and text[-count - 1] == text[-count - 1 - ahead]:
            count += 1
        return count

    @property
    def match(self) -> Match | None:
        """How long the match is; None where there is nothing to copy."""
        if self._source is None:
            return None
        return "long" if self.matched >= LONG else "short"

    def extend(self, token_ids: Iterable[int]) -> None:
        """Append tokens to the text."""
        text, places = self._text, self._next
        for token in token_ids:
            if len(text) >= NGRAM:
                places[tuple(text[-NGRAM:])] = len(text)
            text.append(token)
        self._source = places.get(tuple(text[-NGRAM:]))

    def drafts(self, count: int) -> list[int]:
        """Return the tokens expected next; a copy that reaches the text's end goes round from where it began.

        Without anything found, the last token is repeated: a guess like any other.
        """
        text = self._text
        source = len(text) - 1 if self._source is None else self._source
        copied = text[source : source + count]
        while len(copied) < count:
            copied += copied[: count - len(copied)]
        return copied

    def agreement(self, token_ids: Sequence[int]) -> int:
        """Return how many of the tokens that the text goes on with a copy would have had right."""
        pairs = zip(self.drafts(len(token_ids)), token_ids, strict=True)
        return next((count for count, (copied, written) in enumerate(pairs) if copied != written), len(token_ids))
