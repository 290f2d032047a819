"""Which row of a cache holds the keys of a prompt's start: the rows' texts, compared with it all at once."""

from collections.abc import Callable, Collection, Sequence
from typing import Final

import numpy as np

BLOCK: Final = 16
"""Tokens between the places inside a prompt where recurrent states are kept."""


class Prefixes:
    """The text of each row of a cache, and where texts agree."""

    def __init__(self, rows: int, capacity: int) -> None:
        self.lengths = [0] * rows
        self._texts = np.full((rows, capacity), -1, np.int32)  # -1, which is no token, past their ends

    def extend(self, row: int, token_ids: Sequence[int]) -> None:
        """Append tokens to a row's text."""
        start = self.lengths[row]
        self.lengths[row] += len(token_ids)
        self._texts[row, start : self.lengths[row]] = token_ids

    def cut(self, row: int, length: int) -> None:
        """Forget a row's text but for its first tokens."""
        self.lengths[row] = min(self.lengths[row], length)
        self._texts[row, length:] = -1

    def swap(self, one: int, other: int) -> None:
        """Exchange the texts of two rows."""
        self.lengths[one], self.lengths[other] = self.lengths[other], self.lengths[one]
        self._texts[[one, other]] = self._texts[[other, one]]

    def longest(
        self, token_ids: Sequence[int], *, prefer: int, resumable: Callable[[int, int], int] | None = None
    ) -> tuple[int, int]:
        """Return the row with most tokens in common at the start, and how many; among equals the preferred one.

        Args:
            token_ids: the text.
            prefer: a row.
            resumable: from a row and the tokens in common, how many of these a text can go on from; all by default.
        """
        same = np.zeros((len(self._texts), len(token_ids) + 1), bool)  # one more column, where all texts differ
        np.equal(self._texts[:, : len(token_ids)], np.array(token_ids, np.int32), out=same[:, :-1])
        common = same.argmin(axis=1).tolist()
        if resumable is not None:
            common = [resumable(row, length) for row, length in enumerate(common)]
        best = max(range(len(common)), key=lambda row: (common[row], row == prefer, -row))
        return best, common[best]


def resume_lengths(prompt: int, shared: Collection[int]) -> set[int]:
    """Return after how many tokens of a prompt others likely go on: they need a recurrent state there.

    At its end (more completions of it), a block border 8 to 23 tokens before (a chat's next turn, where the template
    writes the opening of an answer otherwise once it has ended), and the last border of what it shares with each other.

    Args:
        prompt: its tokens, without the last one, which is the first anchor.
        shared: how many of them others begin with.
    """
    before_the_end = max(prompt - BLOCK // 2, 0)
    return {prompt, *(length // BLOCK * BLOCK for length in (before_the_end, *shared))} - {0}
