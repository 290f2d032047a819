"""One key/value cache with a scratch tail: preallocated, a length per row, never copied.

Both views write past a row's length; only `commit` moves the length, so drafts and rejected keys are simply
overwritten by the next pass. Slots are numbered by position. Live rows stand at the front, so a pass over them is
a view of the buffers. Layers with a recurrent state keep that in place of keys (`orthrus.model.states`).

Shapes: R rows of the cache, B rows of a pass, Q query rows, S slots, H key/value heads, D head dimension.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orthrus.errors import CacheFull
from orthrus.kernels.attention import can_split
from orthrus.model.layer_states import LayerPass, Span
from orthrus.model.room import require_memory
from orthrus.model.states import RecurrentStates


@dataclass(frozen=True, kw_only=True, slots=True)
class PassSlots:
    """Where the next pass reads and writes: rows `first … last-1`, and what it looks at of them.

    Attributes:
        row_B1: the rows on the device.
        slot_BQ: slots its keys are written to.
        start: the first slot, where slots are known on the host to be `start … start+Q-1` in every row.
        span: one past the last slot any of its queries may look at.
        position_BQ: positions in the text, which differ from the slots in trees and blocks; None where nobody asks.
    """

    first: int
    last: int
    row_B1: Tensor
    slot_BQ: Tensor
    start: int | None
    span: int
    position_BQ: Tensor | None = None


class KeyStore:
    """One layer's keys and values, `[R, S, H, D]`, allocated for the heads and dtype of the first ones."""

    def __init__(self, rows: int, capacity: int, key_BHQD: Tensor, value_BHQD: Tensor, *, kernel: bool) -> None:
        def buffer(like_BHQD: Tensor) -> Tensor:
            heads, size = like_BHQD.shape[1], like_BHQD.shape[3]
            if kernel:
                return like_BHQD.new_zeros(rows, capacity, heads, size)
            return like_BHQD.new_zeros(rows, heads, capacity, size).transpose(1, 2)  # torch's kernels read it faster

        self.keys, self.values = buffer(key_BHQD), buffer(value_BHQD)
        self._kernel = kernel

    def update(self, key_BHQD: Tensor, value_BHQD: Tensor, current: PassSlots, columns: slice) -> tuple[Tensor, Tensor]:
        """Write some columns of a pass; return views `[B, H, span, D]` of all in reach."""
        rows, keys, values = slice(current.first, current.last), self.keys, self.values
        if current.start is not None:
            slots = slice(current.start + columns.start, current.start + columns.stop)
            keys[rows, slots], values[rows, slots] = key_BHQD.transpose(1, 2), value_BHQD.transpose(1, 2)
        elif self._kernel:
            from orthrus.kernels.split_attention import write

            with torch.cuda.device_of(keys):  # type: ignore[no-untyped-call]
                write(keys, values, key_BHQD, value_BHQD, current.row_B1, current.slot_BQ[:, columns])
        else:
            keys[current.row_B1, current.slot_BQ[:, columns]] = key_BHQD.transpose(1, 2).to(keys.dtype)
            values[current.row_B1, current.slot_BQ[:, columns]] = value_BHQD.transpose(1, 2).to(values.dtype)
        return keys[rows, : current.span].transpose(1, 2), values[rows, : current.span].transpose(1, 2)

    def copy(self, source: int, target: int, length: int) -> None:
        for buffer in (self.keys, self.values):
            buffer[target, :length] = buffer[source, :length]

    def swap(self, one: int, other: int, length: int) -> None:
        for buffer in (self.keys, self.values):
            buffer[[one, other], :length] = buffer[[other, one], :length]

    def move(self, row_B1: Tensor, source_BM: Tensor, target_BM: Tensor) -> None:
        """Copy a few slots within rows."""
        for buffer in (self.keys, self.values):
            buffer[row_B1, target_BM] = buffer[row_B1, source_BM]

    def wipe(self, row: int) -> None:
        for buffer in (self.keys, self.values):
            buffer[row] = 0

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


class ScratchCache:
    """Hold keys and values of `rows` sequences of at most `capacity` positions each.

    Buffers are `[R, S, H, D]` per layer, allocated when a layer first writes (its heads and dtype are known then).
    Raises CacheFull before anything is written when a pass would run past the capacity, or when so many `layers` of
    them take more than the memory that is free.
    """

    def __init__(self, *, rows: int, capacity: int, device: torch.device | str = "cpu", layers: int = 1) -> None:
        self._layers = layers
        self.rows = rows
        self.capacity = capacity
        self.device = torch.device(device)
        self.lengths = [0] * rows
        self.length_R = torch.zeros(rows, dtype=torch.long, device=self.device)
        self._row_R1 = torch.arange(rows, device=self.device)[:, None]
        self._kernel = can_split(self.device)
        self.stores: dict[int, KeyStore] = {}
        self.states = RecurrentStates(rows)
        none = torch.empty(0, 0, dtype=torch.long)
        self.current = PassSlots(first=0, last=0, row_B1=none, slot_BQ=none, start=None, span=0)
        self.rounded = range(0)  # layers that keep keys and values in bfloat16
        self.recordings: Any = None  # `model.compiled` keeps passes over these very buffers here

    def begin(
        self,
        rows: slice,
        slot_BQ: Tensor,
        *,
        end: int,
        start: int | None = None,
        position_BQ: Tensor | None = None,
        kept: int | None = None,
        read: Sequence[int] | None = None,
        in_order: bool = False,
    ) -> None:
        """Say where the next pass reads and writes; every layer's `update` then writes there.

        Args:
            rows: the contiguous rows the pass runs over.
            slot_BQ: slots (= positions) its keys are written to.
            end: one past the last slot any of its queries may look at, known on the host.
            start: the first slot, where slots are known on the host to be `start … start+Q-1` in every row; writing
                them is a plain copy then.
            position_BQ: positions in the text, for drafters that read hidden states.
            kept: how many of the pass's rows may be committed, the first ones behind those that are read; None for all.
            read: how many of each row's will be committed for certain.
            in_order: whether recurrent states are computed token by token.

        Raises:
            CacheFull: the pass would run past the capacity; nothing was written.
            DecodingError: a recurrent state at a row's length is not known.
        """
        self.require(end)
        counts = None if read is None else tuple(read)
        span = Span(rows=rows, kept=slot_BQ.shape[1] if kept is None else kept, read=counts, in_order=in_order)
        self.states.begin(span, self.lengths[rows])
        self.current = PassSlots(
            first=rows.start,
            last=rows.stop,
            row_B1=self._row_R1[rows],
            slot_BQ=slot_BQ,
            start=start,
            span=end,
            position_BQ=position_BQ,
        )

    def require(self, end: int) -> None:
        """Raise CacheFull where a pass that ends before this slot does not fit."""
        if end > self.capacity:
            raise CacheFull(
                f"the pass needs {end} cache positions, the cache has {self.capacity} "
                f"(rows are {max(self.lengths)} long at most): ask for fewer tokens or a larger capacity"
            )

    def update(
        self, key_BHQD: Tensor, value_BHQD: Tensor, layer_idx: int, *_: Any, columns: slice | None = None, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one layer's keys and values into the pass's slots; return views `[B, H, span, D]` of all in reach."""
        store = self.stores.get(layer_idx)
        if store is None:
            if layer_idx in self.rounded:
                key_BHQD, value_BHQD = key_BHQD.bfloat16(), value_BHQD.bfloat16()
            if self.empty:
                position = sum(x.shape[1] * x.shape[3] * x.element_size() for x in (key_BHQD, value_BHQD))
                needed = self._layers * self.rows * self.capacity * position
                require_memory(needed, self.device, rows=self.rows, capacity=self.capacity)
            store = KeyStore(self.rows, self.capacity, key_BHQD, value_BHQD, kernel=self._kernel)
            self.stores[layer_idx] = store
        return store.update(key_BHQD, value_BHQD, self.current, columns or slice(0, self.current.slot_BQ.shape[1]))

    def part(self, columns: slice) -> "CachePart":
        """Return what stands in for this cache where only some query rows of the pass write."""
        return CachePart(self, columns=slice(*columns.indices(self.current.slot_BQ.shape[1])))

    def recurrence(self, layer_idx: int) -> LayerPass:
        """Return what one layer with a recurrent state computes with in the pass that has begun."""
        return self.states.layer(layer_idx)

    def commit(self, rows: slice, counts: list[int]) -> None:
        """Keep `counts[i]` more positions of each row; what lies past them stays scratch."""
        self.states.commit(rows, self.lengths[rows], counts)
        lengths = [length + n for length, n in zip(self.lengths[rows], counts, strict=True)]
        if len(set(counts)) == 1:  # nothing has to be sent to the device
            self.lengths[rows] = lengths
            self.length_R[rows] += counts[0]
        else:
            self._write_lengths(rows, lengths)

    def set_length(self, row: int, length: int) -> None:
        """Say how many positions of a row are valid (0 empties it, a smaller one forgets its end)."""
        self.states.cut(row, length)
        self.lengths[row] = length
        self.length_R[row] = length

    def set_lengths_of(self, rows: slice, lengths: list[int]) -> None:
        """Say how many positions of several rows are valid, in one transfer."""
        for row, length in zip(range(rows.start, rows.stop), lengths, strict=True):
            self.states.cut(row, length)
        self._write_lengths(rows, lengths)

    def _write_lengths(self, rows: slice, lengths: list[int]) -> None:
        self.lengths[rows] = lengths
        self.length_R[rows] = torch.tensor(lengths, dtype=torch.long).to(self.device, non_blocking=True)

    def mark(self) -> Callable[[], None]:
        """Return a function that takes all rows back to the lengths that they have now."""
        lengths, rewind = list(self.lengths), self.states.mark(list(self.lengths))

        def back() -> None:
            rewind()
            self._write_lengths(slice(0, self.rows), lengths)

        return back

    def pretend(self, rows: slice, lengths: list[int]) -> None:
        """Take whatever stands in rows for texts of these lengths, as benchmarks do."""
        self._write_lengths(rows, lengths)
        self.states.pretend(rows, lengths)

    def swap_rows(self, one: int, other: int) -> None:
        """Exchange the valid positions of two rows (a few times per completion, never per cycle).

        And the one behind: the pass that reads a prompt's end leaves the anchor's keys there.
        """
        lengths = self.lengths[one], self.lengths[other]
        end = max(lengths) + 1
        for store in self.stores.values():
            store.swap(one, other, end)
        self.states.swap(one, other)  # terms past a row's length, too: a pass that is not committed yet has left them
        self.lengths[one], self.lengths[other] = self.length_R[one], self.length_R[other] = lengths[1], lengths[0]

    def wipe(self, row: int) -> None:
        """Empty a row and overwrite its keys and values: zeros, where NaN behind a mask would still spread."""
        self.set_length(row, 0)
        for store in self.stores.values():
            store.wipe(row)
        self.states.wipe(row)

    def copy_start(self, source: int, target: int, length: int) -> None:
        """Copy the first positions of one row to another, whose length is the caller's to set (once per request).

        Of layers with a recurrent state, `length` must be one of those `RecurrentStates.resumable`.
        """
        for store in self.stores.values():
            store.copy(source, target, length)
        self.states.copy(source, target)

    def move_slots(self, rows: slice, source_BM: Tensor, target_BM: Tensor) -> None:
        """Copy a few slots within each row, as a tree's accepted path needs; `[B, M]` slots each."""
        row_B1 = self._row_R1[rows]
        for store in self.stores.values():
            store.move(row_B1, source_BM, target_BM)
        length_B1 = self.length_R[rows, None]
        self.states.move(row_B1, source_BM - length_B1, target_BM - length_B1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the longest row (Hugging Face asks when it is given no position ids; passes here always are)."""
        return max(self.lengths)

    @property
    def empty(self) -> bool:
        """True until a pass has allocated the buffers."""
        return not self.stores

    @property
    def keys(self) -> list[Tensor]:
        """Every layer's keys, `[R, S, H, D]`, to look at."""
        return [self.stores[layer].keys for layer in sorted(self.stores)]

    @property
    def values(self) -> list[Tensor]:
        """Every layer's values, `[R, S, H, D]`, to look at."""
        return [self.stores[layer].values for layer in sorted(self.stores)]

    @property
    def nbytes(self) -> int:
        return sum(store.nbytes for store in self.stores.values()) + self.states.nbytes


class CachePart:
    """What stands in for a cache where some layers, numbered from 0, or some query rows of a pass have their own part.

    Args:
        cache: the cache; what is written is seen by all of it.
        first: the first of the layers, behind the backbone's for a drafter's own.
        columns: the query rows that write; all by default.
    """

    def __init__(self, cache: ScratchCache, first: int = 0, *, columns: slice | None = None) -> None:
        self._cache, self._first, self._columns = cache, first, columns

    def update(self, key_BHQD: Tensor, value_BHQD: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write one layer's keys and values, as `ScratchCache.update` does."""
        return self._cache.update(key_BHQD, value_BHQD, self._first + layer_idx, columns=self._columns)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the longest row."""
        return self._cache.get_seq_length(layer_idx)
