"""Recurrent states of a cache's rows, which layers of the gated delta rule keep in place of keys.

Each row has one state per layer and the last inputs of its short convolution. A pass leaves both alone; it keeps what
each of its AR rows would add, its *terms*. The next pass over a row first folds as many of them as the row has grown
by. So whatever acceptance keeps of a pass, and whatever is taken back of it, costs one product and no copy of a state.
The terms of a tree's accepted path are moved to its start, as keys are. Only the passes that read a prompt, of which
all is kept, write states, and these stand aside until they are committed.

Shapes: R rows of the cache, B rows of a pass, T tokens, K terms that fit, G key heads, H value heads, N key dimension,
D value dimension, C channels and V = W - 1 kept inputs of the convolution.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from orthrus.errors import DecodingError
from orthrus.model import delta


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """What a pass does with states.

    Attributes:
        rows: the contiguous rows it runs over.
        kept: AR rows that may be committed later, the first ones behind those that are read.
        read: how many of each row's will be committed for certain; None for none.
        in_order: whether the rule is applied token by token.
    """

    rows: slice
    kept: int
    read: tuple[int, ...] | None = None
    in_order: bool = False


class LayerStates:
    """One layer's states and the terms behind them, allocated for the shapes of the first ones.

    Attributes:
        tail_RVC: inputs of the convolution before each row's state.
        input_RKC: those of its terms.
        state_RHND: the states, float32.
        terms: keys, corrections and decays, `[R, K, …]`, float32.
        next: tail and states that a pass over a prompt leaves, until they are committed.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.tail_RVC = self.input_RKC = self.state_RHND = torch.empty(0)
        self.terms = delta.Terms(torch.empty(0), torch.empty(0), torch.empty(0))
        self.next: tuple[Tensor, Tensor] | None = None

    def tails(self, rows: slice, like_BTC: Tensor, width: int) -> Tensor:
        """Return the inputs before each row's state."""
        if not self.tail_RVC.numel():
            self.tail_RVC = like_BTC.new_zeros(self._rows, width - 1, like_BTC.shape[2])
        return self.tail_RVC[rows]

    def states(self, rows: slice, like: delta.Inputs) -> Tensor:
        """Return each row's state."""
        if not self.state_RHND.numel():
            (*_, H, D), N = like.value_BTHD.shape, like.key_BTGN.shape[3]
            self.state_RHND = like.value_BTHD.new_zeros(self._rows, H, N, D)
        return self.state_RHND[rows]

    def keep_inputs(self, rows: slice, input_BKC: Tensor) -> None:
        """Write the inputs of terms."""
        if not input_BKC.shape[1]:
            return
        self.input_RKC = self._grown(self.input_RKC, input_BKC)
        self.input_RKC[rows, : input_BKC.shape[1]] = input_BKC

    def keep_terms(self, rows: slice, terms: delta.Terms) -> None:
        """Write terms behind the states."""
        if not terms.decay_BTH.shape[1]:
            return
        self.terms = delta.Terms(*(self._grown(*pair) for pair in zip(self.terms, terms, strict=True)))
        for buffer, new in zip(self.terms, terms, strict=True):
            buffer[rows, : new.shape[1]] = new

    def fold(self, rows: slice, counts: list[int], *, in_order: bool) -> None:
        """Add the first terms of each row to its state."""
        picked_BT, count_B1 = _first(counts, self.state_RHND.device)
        first = slice(0, picked_BT.shape[1])
        terms = delta.Terms(*(buffer[rows, first] for buffer in self.terms))
        fold = delta.fold_in_order if in_order else delta.fold
        self.state_RHND[rows] = fold(self.state_RHND[rows], terms, picked_BT)
        self.tail_RVC[rows] = delta.tails(self.tail_RVC[rows], self.input_RKC[rows, first], count_B1)[:, 0]

    def settle(self, rows: slice) -> None:
        """Take over what a pass over a prompt has left."""
        if self.next is not None:
            self.tail_RVC[rows], self.state_RHND[rows] = self.next
            self.next = None

    def buffers(self) -> list[Tensor]:
        """Return all tensors, the rows first in each."""
        return [self.tail_RVC, self.state_RHND, *self.term_buffers()]

    def term_buffers(self) -> list[Tensor]:
        """Return those of terms; none until a pass has left some."""
        return [buffer for buffer in (self.input_RKC, *self.terms) if buffer.numel()]

    def _grown(self, buffer: Tensor, new_BKX: Tensor) -> Tensor:
        """Return the buffer with room for so many terms a row."""
        missing = new_BKX.shape[1] - (buffer.shape[1] if buffer.numel() else 0)
        if missing <= 0:
            return buffer
        more = new_BKX.new_zeros(self._rows, missing, *new_BKX.shape[2:])
        return torch.cat([buffer, more], dim=1) if buffer.numel() else more


_NOWHERE: Final = 1 << 62


class LayerPass:
    """What one layer's mixer computes with in one pass: first for the AR rows, then for blocks behind them."""

    def __init__(self, layer: LayerStates, span: Span) -> None:
        self._layer = layer
        self._span = span
        self._input_BRC: Tensor | None = None
        self._tail_BVC = torch.empty(0)
        self._terms: delta.Terms | None = None

    def convolve(self, input_BTC: Tensor, weight_CW: Tensor, path_BTM: Tensor | None) -> Tensor:
        """Return the short convolution of some rows' inputs, `[B, T, C]`.

        Args:
            input_BTC: the inputs.
            weight_CW: a filter per channel.
            path_BTM: who is before whom, the rows of earlier calls first (`delta.solve`).
        """
        layer, span = self._layer, self._span
        tail_BVC = layer.tails(span.rows, input_BTC, weight_CW.shape[1])
        window_BTWC = delta.windows(tail_BVC, input_BTC, path_BTM, self._input_BRC)
        if self._input_BRC is None:
            self._input_BRC = input_BTC
            layer.keep_inputs(span.rows, self._kept(input_BTC))
            if span.read is not None:
                _, count_B1 = _first(span.read, input_BTC.device)
                self._tail_BVC = delta.tails(tail_BVC, input_BTC, count_B1)[:, 0]
        return delta.convolve(window_BTWC, weight_CW)

    def rule(self, inputs: delta.Inputs, path_BTM: Tensor | None, *, both_ways: bool = False) -> Tensor:
        """Return what some rows read of the states, `[B, T, H, D]`, under the same relation.

        Where blocks read `both_ways`, also what those behind them write (`delta.from_behind`).
        """
        layer, span = self._layer, self._span
        state_BHND = layer.states(span.rows, inputs)
        if self._terms is not None:
            out_BTHD, _ = delta.solve(inputs, state_BHND, path_BTM, self._terms)
            T = out_BTHD.shape[1]
            block_BTT = None if path_BTM is None else path_BTM[:, :, -T:]
            return out_BTHD + delta.from_behind(inputs, block_BTT) if both_ways else out_BTHD
        in_order = span.in_order and path_BTM is None
        if in_order:
            out_BTHD, terms = delta.in_order(inputs, state_BHND)
        elif span.read is None:
            out_BTHD, terms = delta.solve(inputs, state_BHND, path_BTM)
        else:
            out_BTHD, scanned = delta.scan(inputs, state_BHND)
            terms = scanned.terms
        if span.read is not None:
            picked_BT, count_B1 = _first(span.read, state_BHND.device)
            folded = terms.part(slice(0, picked_BT.shape[1]))
            if in_order:
                after_BHND = delta.fold_in_order(state_BHND, folded, picked_BT)
            else:
                after_BHND = delta.states_at(scanned, count_B1)[:, 0]
            layer.next = self._tail_BVC, after_BHND
        layer.keep_terms(span.rows, delta.Terms(*(self._kept(tensor) for tensor in terms)))
        self._terms = terms
        return out_BTHD

    def _kept(self, tensor_BTX: Tensor) -> Tensor:
        """Return what belongs to the rows that may be committed later."""
        if self._span.read is None:
            return tensor_BTX[:, : self._span.kept]
        first_B1 = _first(self._span.read, tensor_BTX.device)[1]
        index_BK = first_B1 + torch.arange(self._span.kept, device=tensor_BTX.device)
        return tensor_BTX[torch.arange(len(first_B1), device=tensor_BTX.device)[:, None], index_BK]


class RecurrentStates:
    """Hold the states of `rows` rows; each row's stand at a number of tokens that they have read."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._layers: dict[int, LayerStates] = {}
        self._at = [0] * rows
        self._terms = [0] * rows
        self._span = Span(rows=slice(0, 0), kept=0)

    def begin(self, span: Span, lengths: list[int]) -> None:
        """Bring the states of a pass's rows to their lengths, and expect its terms.

        Raises:
            DecodingError: a row's state at this length is not known.
        """
        self._bring(span.rows, lengths, in_order=span.in_order)
        self._terms[span.rows] = [span.kept if span.read is None else 0] * len(lengths)
        self._span = span

    def layer(self, index: int) -> LayerPass:
        """Return what one layer computes with in the pass that has begun."""
        return LayerPass(self._layers.setdefault(index, LayerStates(self._rows)), self._span)

    def commit(self, rows: slice, lengths: list[int], counts: list[int]) -> None:
        """Keep so many more tokens than these lengths: terms of the rows' last passes, or what the last one has read.

        Raises:
            DecodingError: the last passes left no such terms.
        """
        if not self._layers:
            return
        span, ends = self._span, [length + n for length, n in zip(lengths, counts, strict=True)]
        if span.read is not None and span.rows == rows:
            if list(span.read) != counts:
                raise DecodingError(f"a pass that was to keep {list(span.read)} tokens must keep these, found {counts}")
            for layer in self._layers.values():
                layer.settle(rows)
            self.pretend(rows, ends)
            self._terms[rows] = [span.kept] * len(counts)
            self._span = replace(span, read=None)
            return
        kept = [end - at for end, at in zip(ends, self._at[rows], strict=True)]
        if any(n > terms for n, terms in zip(kept, self._terms[rows], strict=True)):
            raise DecodingError(f"passes left terms of {self._terms[rows]} tokens, found {kept} to be kept")
        self._terms[rows] = kept

    def resumable(self, row: int, length: int) -> int:
        """Return `length` where the state after so many tokens of a row's text is known, else 0."""
        held = self._at[row] <= length <= self._at[row] + self._terms[row]
        return length if held or not self._layers else 0

    def cut(self, row: int, length: int) -> None:
        """Forget the terms past a length. A row that has read more has no state from then on, until it is empty."""
        self._terms[row] = max(min(self._terms[row], length - self._at[row]), 0)

    def copy(self, source: int, target: int) -> None:
        """Give a row the state of another, and its terms."""
        for buffer in self.buffers():
            buffer[target] = buffer[source]
        self._at[target], self._terms[target] = self._at[source], self._terms[source]

    def swap(self, one: int, other: int) -> None:
        """Exchange two rows."""
        for buffer in self.buffers():
            buffer[[one, other]] = buffer[[other, one]]
        for numbers in (self._at, self._terms):
            numbers[one], numbers[other] = numbers[other], numbers[one]

    def move(self, row_B1: Tensor, source_BM: Tensor, target_BM: Tensor) -> None:
        """Copy a few terms within rows; both are counted from the row's length."""
        for buffer in [buffer for layer in self._layers.values() for buffer in layer.term_buffers()]:
            buffer[row_B1, target_BM] = buffer[row_B1, source_BM]

    def wipe(self, row: int) -> None:
        """Overwrite a row with zeros: the state of no text."""
        for buffer in self.buffers():
            buffer[row] = 0
        self._at[row] = self._terms[row] = 0

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

    @property
    def nbytes(self) -> int:
        """Bytes held by all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def _bring(self, rows: slice, lengths: list[int], *, in_order: bool) -> None:
        """Fold as many terms of each row as it has grown by."""
        counts = [self._count(row, length) for row, length in enumerate(lengths, start=rows.start)]
        self._at[rows] = [_NOWHERE] * len(counts)  # whatever interrupts the loop
        for layer in self._layers.values():
            layer.next = None
            if any(counts):
                layer.fold(rows, counts, in_order=in_order)
        self.pretend(rows, lengths)

    def _count(self, row: int, length: int) -> int:
        """Return how many terms bring a row to a length; an empty one begins anew."""
        if length == 0 and self._at[row] != 0:
            self.wipe(row)
        count = length - self._at[row]
        if 0 <= count <= self._terms[row] or not self._layers:
            return count
        raise DecodingError(
            f"a pass needs the recurrent state of row {row} after {length} tokens, found those after {self._at[row]} "
            f"to {self._at[row] + self._terms[row]} tokens: read the text from its start"
        )


def _first(counts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return which terms are among the first `counts[i]` of each row, `[B, K]`, and the counts `[B, 1]`."""
    count_B1 = torch.tensor(counts, device=device)[:, None]
    return torch.arange(max(counts), device=device) < count_B1, count_B1
