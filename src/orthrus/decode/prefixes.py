"""Which row of a cache holds the keys of a prompt's start: an index over blocks of tokens.

A text is a path of whole blocks through a tree of dictionaries, so looking a prompt up takes a step per block however
many rows there are. Only behind the last whole block in common are tokens compared one by one.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

BLOCK: Final = 16
"""Tokens per block."""


@dataclass(slots=True, eq=False)
class _Node:
    """One block behind those before it, and the rows whose texts begin with all of them."""

    before: "_Node | None"
    tokens: tuple[int, ...]
    next: "dict[tuple[int, ...], _Node]" = field(default_factory=dict)
    rows: set[int] = field(default_factory=set)


class Prefixes:
    """The text of each row of a cache, and where texts agree."""

    def __init__(self, rows: int) -> None:
        self.texts: list[list[int]] = [[] for _ in range(rows)]
        self._root = _Node(None, ())
        self._root.rows.update(range(rows))
        self._paths: list[list[_Node]] = [[] for _ in range(rows)]

    def extend(self, row: int, token_ids: Iterable[int]) -> None:
        """Append tokens to a row's text."""
        text, path = self.texts[row], self._paths[row]
        text.extend(token_ids)
        for start in range(len(path) * BLOCK, len(text) - BLOCK + 1, BLOCK):
            before, tokens = path[-1] if path else self._root, tuple(text[start : start + BLOCK])
            node = before.next.setdefault(tokens, _Node(before, tokens))
            node.rows.add(row)
            path.append(node)

    def cut(self, row: int, length: int) -> None:
        """Forget a row's text but for its first tokens."""
        del self.texts[row][length:]
        path = self._paths[row]
        while len(path) > length // BLOCK:
            node = path.pop()
            node.rows.discard(row)
            if not node.rows and node.before is not None:
                del node.before.next[node.tokens]

    def swap(self, one: int, other: int) -> None:
        """Exchange the texts of two rows."""
        for path, old, new in ((self._paths[one], one, other), (self._paths[other], other, one)):
            for node in path:
                if not (old in node.rows and new in node.rows):
                    node.rows ^= {old, new}
        self.texts[one], self.texts[other] = self.texts[other], self.texts[one]
        self._paths[one], self._paths[other] = self._paths[other], self._paths[one]

    def longest(
        self, token_ids: Sequence[int], *, prefer: int, resumable: Callable[[int, int], int] | None = None
    ) -> tuple[int, int]:
        """Return the row with most tokens in common at the start, and how many; among equals the preferred one.

        Args:
            token_ids: the text.
            prefer: a row.
            resumable: from a row and the tokens in common, how many of these a text can go on from; all by default.
        """
        path = [self._root]
        while (after := path[-1].next.get(_block(token_ids, len(path) - 1))) is not None:
            path.append(after)
        best, deeper = (0, True, -prefer), set[int]()
        for depth in reversed(range(len(path))):
            start = depth * BLOCK
            for row in path[depth].rows - deeper:
                common = start + _common(self.texts[row][start : start + BLOCK], token_ids[start : start + BLOCK])
                best = max(best, (common if resumable is None else resumable(row, common), row == prefer, -row))
            if best[0] >= start:  # those above have less in common
                break
            deeper = path[depth].rows
        return -best[2], best[0]


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


def _block(token_ids: Sequence[int], number: int) -> tuple[int, ...]:
    return tuple(token_ids[number * BLOCK : (number + 1) * BLOCK])


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two texts have in common at their start."""
    most = min(len(one), len(other))
    return most if one[:most] == other[:most] else next(i for i in range(most) if one[i] != other[i])
