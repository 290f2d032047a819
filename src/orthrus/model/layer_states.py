"""One layer's recurrent states and what it computes with in one pass; shapes are those of `orthrus.model.states`."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthrus.model import delta


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """What a pass does with states.

    Attributes:
        kept: AR rows that may be committed later, the first ones behind those that are read.
        read: how many of each row's will be committed for certain; None for none.
        in_order: whether the rule is applied token by token.
        copied: behind how many tokens of each row's prompt a snapshot is taken; empty for none of any row.
    """

    rows: slice
    kept: int
    read: tuple[int, ...] | None = None
    in_order: bool = False
    copied: tuple[tuple[int, ...], ...] = ()

    def columns(self) -> list[list[int]]:
        """Return behind how many tokens states are computed: of all rows the end first, then snapshots, filled up."""
        assert self.read is not None
        most = max(map(len, self.copied), default=0)
        columns = [list(self.read)]
        for column in range(most):
            pairs = zip(self.read, self.copied, strict=True)
            columns.append([copied[column] if column < len(copied) else end for end, copied in pairs])
        return columns


class LayerStates:
    """One layer's states and the terms behind them, allocated for the shapes of the first ones.

    Attributes:
        tail_RVC: inputs of the convolution before each row's state.
        terms: keys, corrections and decays, `[R, K, …]`, float32.
        next: tails and states that a pass over a prompt leaves, a pair for each of the span's columns; until committed.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.tail_RVC = self.input_RKC = self.state_RHND = torch.empty(0)
        self.terms = delta.Terms(torch.empty(0), torch.empty(0), torch.empty(0))
        self.next: list[tuple[Tensor, Tensor]] = []

    def tails(self, rows: slice, like_BTC: Tensor, width: int) -> Tensor:
        if not self.tail_RVC.numel():
            self.tail_RVC = like_BTC.new_zeros(self._rows, width - 1, like_BTC.shape[2])
        return self.tail_RVC[rows]

    def states(self, rows: slice, like: delta.Inputs) -> Tensor:
        if not self.state_RHND.numel():
            (*_, H, D), N = like.value_BTHD.shape, like.key_BTGN.shape[3]
            self.state_RHND = like.value_BTHD.new_zeros(self._rows, H, N, D)
        return self.state_RHND[rows]

    def keep_inputs(self, rows: slice, input_BKC: Tensor) -> None:
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
        if self.next:
            self.tail_RVC[rows], self.state_RHND[rows] = self.next[0]
            self.next = []

    def buffers(self) -> list[Tensor]:
        return [self.tail_RVC, self.state_RHND, *self.term_buffers()]

    def over(self, buffers: Sequence[Tensor]) -> "LayerStates":
        """Return a stand-in over other tensors, in the order of `buffers`."""
        other = copy.copy(self)
        other.tail_RVC, other.state_RHND, other.input_RKC, *terms = buffers
        other.terms = delta.Terms(*terms)
        return other

    @property
    def room(self) -> int:
        """How many terms fit."""
        return self.input_RKC.shape[1] if self.input_RKC.numel() else 0

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


class LayerPass:
    """What one layer's mixer computes with in one pass: first for the AR rows, then for blocks behind them."""

    def __init__(self, layer: LayerStates, span: Span) -> None:
        self._layer = layer
        self._span = span
        self._input_BRC: Tensor | None = None
        self._tails: list[Tensor] = []
        self._terms: delta.Terms | None = None

    def convolve(self, input_BTC: Tensor, weight_CW: Tensor, path_BTM: Tensor | None) -> Tensor:
        """Return the short convolution of some rows' inputs, `[B, T, C]`, by a filter per channel.

        `path_BTM` says who is before whom, the rows of earlier calls first (`delta.solve`).
        """
        layer, span = self._layer, self._span
        tail_BVC = layer.tails(span.rows, input_BTC, weight_CW.shape[1])
        window_BTWC = delta.windows(tail_BVC, input_BTC, path_BTM, self._input_BRC)
        if self._input_BRC is None:
            self._input_BRC = input_BTC
            layer.keep_inputs(span.rows, self._kept(input_BTC))
            if span.read is not None:
                ends = [torch.tensor(counts, device=input_BTC.device)[:, None] for counts in span.columns()]
                self._tails = [delta.tails(tail_BVC, input_BTC, end_B1)[:, 0] for end_B1 in ends]
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
            states = []
            for counts in span.columns():
                picked_BT, count_B1 = _first(counts, state_BHND.device)
                if in_order:
                    folded = terms.part(slice(0, picked_BT.shape[1]))
                    states.append(delta.fold_in_order(state_BHND, folded, picked_BT))
                else:
                    states.append(delta.states_at(scanned, count_B1)[:, 0])
            layer.next = list(zip(self._tails, states, strict=True))
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


def _first(counts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return which terms are among the first `counts[i]` of each row, `[B, K]`, and the counts `[B, 1]`."""
    count_B1 = torch.tensor(counts, device=device)[:, None]
    return torch.arange(max(counts), device=device) < count_B1, count_B1
