"""Recurrent states of a cache's rows, which layers of the gated delta rule keep in place of keys.

Each row has one state per layer and the last inputs of its short convolution. A pass leaves both alone; it keeps what
each of its AR rows would add, its *terms*. The next pass over a row first folds as many of them as the row has grown
by. So whatever acceptance keeps of a pass, or takes back of it, costs one product and no copy of a state. Only the
passes that read a prompt write states, and these stand aside until they are committed.

Shapes: R rows of the cache, B rows of a pass, T tokens, K terms that fit, G key heads, H value heads, N key dimension,
D value dimension, C channels and V = W - 1 kept inputs of the convolution.
"""

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import islice
from typing import Final

from torch import Tensor

from orthrus.errors import DecodingError
from orthrus.model.layer_states import LayerPass, LayerStates, Span
from orthrus.model.snapshots import Snapshots

_NOWHERE: Final = 1 << 62


class RecurrentStates:
    """Hold the states of `rows` rows; each row's stand at a number of tokens that they have read."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._layers: dict[int, LayerStates] = {}
        self._at = [0] * rows
        self._terms = [0] * rows
        self._snapshots = Snapshots(rows)
        self._span = Span(rows=slice(0, 0), kept=0)

    def begin(self, span: Span, lengths: list[int]) -> None:
        """Bring the states of a pass's rows to their lengths, and expect its terms.

        Raises DecodingError: a row's state at this length is not known.
        """
        self._bring(span.rows, lengths, in_order=span.in_order)
        if span.read is not None:
            reads = enumerate(zip(lengths, span.read, strict=True), start=span.rows.start)
            due = tuple(self._snapshots.due(row, length, read) for row, (length, read) in reads)
            span = replace(span, copied=due if any(due) else ())
        self._terms[span.rows] = [span.kept if span.read is None else 0] * len(lengths)
        self._span = span

    def layer(self, index: int) -> LayerPass:
        """Return what one layer computes with in the pass that has begun."""
        return LayerPass(self._layers.setdefault(index, LayerStates(self._rows)), self._span)

    def commit(self, rows: slice, lengths: list[int], counts: list[int]) -> None:
        """Keep so many more tokens than these lengths: terms of the rows' last passes, or what the last one has read.

        Raises DecodingError: the last passes left no such terms.
        """
        if not self._layers:
            return
        span, ends = self._span, [length + n for length, n in zip(lengths, counts, strict=True)]
        if span.read is not None and span.rows == rows:
            if list(span.read) != counts:
                raise DecodingError(f"a pass that was to keep {list(span.read)} tokens must keep these, found {counts}")
            self._copy_states(span, lengths)
            for layer in self._layers.values():
                layer.settle(rows)
            self.pretend(rows, ends)
            self._terms[rows] = [span.kept] * len(counts)
            self._span = replace(span, read=None, copied=())
            return
        kept = [end - at for end, at in zip(ends, self._at[rows], strict=True)]
        if any(n > terms for n, terms in zip(kept, self._terms[rows], strict=True)):
            raise DecodingError(f"passes left terms of {self._terms[rows]} tokens, found {kept} to be kept")
        self._terms[rows] = kept

    def ask(self, row: int, lengths: Collection[int]) -> None:
        """Ask for snapshots of a row's state at these lengths, while its prompt is read."""
        self._snapshots.ask(row, lengths)

    def resumable(self, row: int, length: int) -> int:
        """Return the most tokens of a row's text, `length` at most, whose state it has, or can get from a snapshot."""
        if not self._layers:
            return length
        live = min(length, self._at[row] + self._terms[row])
        return max(live if live >= self._at[row] else 0, self._snapshots.longest(row, length))

    def cut(self, row: int, length: int) -> None:
        """Forget what is past a length. A row that has read more needs a snapshot then, unless it is empty."""
        self._terms[row] = max(min(self._terms[row], length - self._at[row]), 0)
        self._snapshots.cut(row, length)

    def copy(self, source: int, target: int) -> None:
        """Give a row the state of another, its terms and its snapshots."""
        for buffer in self.buffers():
            buffer[target] = buffer[source]
        self._at[target], self._terms[target] = self._at[source], self._terms[source]
        self._snapshots.copy(source, target)

    def swap(self, one: int, other: int) -> None:
        for buffer in self.buffers():
            buffer[[one, other]] = buffer[[other, one]]
        for numbers in (self._at, self._terms):
            numbers[one], numbers[other] = numbers[other], numbers[one]
        self._snapshots.swap(one, other)

    def move(self, row_B1: Tensor, source_BM: Tensor, target_BM: Tensor) -> None:
        """Copy a few terms within rows; both are counted from the row's length."""
        for buffer in self.term_buffers():
            buffer[row_B1, target_BM] = buffer[row_B1, source_BM]

    def wipe(self, row: int) -> None:
        """Overwrite a row with zeros: the state of no text."""
        for buffer in self.buffers():
            buffer[row] = 0
        self._at[row] = self._terms[row] = 0
        self._snapshots.cut(row, 0)

    def pretend(self, rows: slice, lengths: list[int]) -> None:
        """Take whatever states there are for those of texts of these lengths (for benchmarks)."""
        self._at[rows], self._terms[rows] = lengths, [0] * len(lengths)

    def mark(self, lengths: list[int]) -> Callable[[], None]:
        """Return a function that brings all rows back to the lengths that they have now."""
        everyone = slice(0, self._rows)
        self._bring(everyone, lengths, in_order=False)
        kept = {index: (layer.tail_RVC.clone(), layer.state_RHND.clone()) for index, layer in self._layers.items()}

        def rewind() -> None:
            for index, (tail_RVC, state_RHND) in kept.items():
                self._layers[index].tail_RVC.copy_(tail_RVC)
                self._layers[index].state_RHND.copy_(state_RHND)
            self.pretend(everyone, lengths)

        return rewind

    def of(self, row: int) -> list[Tensor]:
        """Return a row's inputs of the convolution and state in each layer, without the terms behind them."""
        return [buffer[row] for layer in self._layers.values() for buffer in (layer.tail_RVC, layer.state_RHND)]

    def buffers(self) -> list[Tensor]:
        """Return the buffers of all layers, the rows first in each."""
        return [buffer for layer in self._layers.values() for buffer in layer.buffers()]

    def term_buffers(self) -> list[Tensor]:
        return [buffer for layer in self._layers.values() for buffer in layer.term_buffers()]

    @property
    def kept(self) -> int | None:
        """Terms that the pass that has begun leaves; None where there is no room for them yet."""
        if not self._layers:
            return 0
        fits = all(layer.room >= self._span.kept for layer in self._layers.values())
        return self._span.kept if fits else None

    def over(self, buffers: Sequence[Tensor], rows: slice, kept: int) -> "RecurrentStates":
        """Return a stand-in over other tensors, in the order of `buffers`, for a pass that leaves `kept` terms."""
        other, given = copy.copy(self), iter(buffers)
        counts = {index: len(layer.buffers()) for index, layer in self._layers.items()}
        other._layers = {i: self._layers[i].over(list(islice(given, count))) for i, count in counts.items()}
        other._span = replace(self._span, rows=rows, kept=kept)
        return other

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers()) + self._snapshots.nbytes

    def _bring(self, rows: slice, lengths: list[int], *, in_order: bool) -> None:
        """Fold as many terms of each row as it has grown by."""
        counts = [self._count(row, length) for row, length in enumerate(lengths, start=rows.start)]
        self._at[rows] = [_NOWHERE] * len(counts)  # whatever interrupts the loop
        for layer in self._layers.values():
            layer.next = []
            if any(counts):
                layer.fold(rows, counts, in_order=in_order)
        self.pretend(rows, lengths)

    def _copy_states(self, span: Span, lengths: list[int]) -> None:
        """Keep the snapshots that a pass over prompts, which began at these lengths, has computed."""
        for index, (length, copied) in enumerate(zip(lengths, span.copied, strict=False)):
            for column, count in enumerate(copied, start=1):
                snapshot: dict[int, tuple[Tensor, Tensor]] = {}
                for number, layer in self._layers.items():
                    if layer.next:
                        tail_BVC, state_BHND = layer.next[column]
                        snapshot[number] = tail_BVC[index].clone(), state_BHND[index].clone()
                self._snapshots.keep(span.rows.start + index, length + count, snapshot)

    def _count(self, row: int, length: int) -> int:
        """Return how many terms bring a row to a length, from a snapshot if need be; an empty one begins anew."""
        if length == 0 and self._at[row] != 0:
            self.wipe(row)
        live = self._at[row] <= length <= self._at[row] + self._terms[row]
        if not live and (snapshot := self._snapshots.at(row, length)) is not None:
            for index, (tail_VC, state_HND) in snapshot.items():
                self._layers[index].tail_RVC[row], self._layers[index].state_RHND[row] = tail_VC, state_HND
            self._at[row], self._terms[row] = length, 0
        count = length - self._at[row]
        if 0 <= count <= self._terms[row] or not self._layers:
            return count
        raise DecodingError(
            f"a pass needs the recurrent state of row {row} after {length} tokens, found those after {self._at[row]} "
            f"to {self._at[row] + self._terms[row]} tokens: read the text from its start"
        )
