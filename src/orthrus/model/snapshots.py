"""Copies of recurrent states at a few lengths of each row's text, from which other texts with the same start go on.

A copy is never written to, so rows share it. Rows are numbered as in the cache.
"""

from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Final

from torch import Tensor

MOST: Final = 3
"""Snapshots per row at most."""

Snapshot = Mapping[int, tuple[Tensor, Tensor]]
"""By layer: the inputs of the convolution `[V, C]` and the state `[H, N, D]`."""


class Snapshots:
    """Hold at most `MOST` snapshots for each row, by the number of tokens that the state has read."""

    def __init__(self, rows: int) -> None:
        self._asked: list[frozenset[int]] = [frozenset()] * rows
        self._kept: list[dict[int, Snapshot]] = [{} for _ in range(rows)]

    def ask(self, row: int, lengths: Collection[int]) -> None:
        """Ask for snapshots at these lengths, `MOST` of them, in place of those asked for before."""
        self._asked[row] = few(lengths)

    def due(self, row: int, length: int, read: int) -> tuple[int, ...]:
        """Return which tokens of a pass, counted from its start, a row is to have a snapshot behind."""
        due = (asked - length for asked in self._asked[row] if asked not in self._kept[row])
        return tuple(sorted(count for count in due if 0 < count <= read))

    def keep(self, row: int, length: int, snapshot: Snapshot) -> None:
        """Keep a snapshot; of too many one goes."""
        kept = {**self._kept[row], length: snapshot}
        self._kept[row] = {length: kept[length] for length in few(kept)}

    def longest(self, row: int, length: int) -> int:
        """Return the most tokens, `length` at most, that a row has a snapshot behind; 0 for none."""
        return max((kept for kept in self._kept[row] if kept <= length), default=0)

    def at(self, row: int, length: int) -> Snapshot | None:
        """Return a row's snapshot behind so many tokens."""
        return self._kept[row].get(length)

    def cut(self, row: int, length: int) -> None:
        self._kept[row] = {kept: snapshot for kept, snapshot in self._kept[row].items() if kept <= length}

    def copy(self, source: int, target: int) -> None:
        self._kept[target] = dict(self._kept[source])

    def swap(self, one: int, other: int) -> None:
        asked, kept = self._asked, self._kept
        asked[one], asked[other] = asked[other], asked[one]
        kept[one], kept[other] = kept[other], kept[one]

    @property
    def nbytes(self) -> int:
        """Bytes of all snapshots, shared ones once."""
        layers = {id(layer): layer for kept in self._kept for snapshot in kept.values() for layer in snapshot.values()}
        return sum(tail_VC.nbytes + state_HND.nbytes for tail_VC, state_HND in layers.values())


def few(lengths: Collection[int]) -> frozenset[int]:
    """Return `MOST` of these lengths: those closest behind another go, whose texts then read least again."""
    kept = sorted(lengths)
    while len(kept) > MOST:
        gaps = [after - before for before, after in pairwise([0, *kept])]
        del kept[gaps.index(min(gaps))]
    return frozenset(kept)
