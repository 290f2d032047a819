"""Recurrent layers in training: a pass over packed rows, then blocks that start at any token of these rows.

Each class is a `Recurrence` of one layer in one pass (`orthrus.model.mixer`); `orthrus.model.delta` has the arithmetic.

Shapes: B rows, T tokens, A anchors of blocks of K tokens, C channels, W width of the convolution, G key heads,
H value heads, N key dimension, D value dimension.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from orthrus.model import delta
from orthrus.model.mixer import mix, mixes


class OverRows:
    """Read packed rows, each document from an empty state; keep `inputs_BTC` and `scan` for the blocks."""

    inputs_BTC: Tensor
    scan: delta.Scan

    def __init__(self, document_BT: Tensor) -> None:
        self.document_BT = document_BT

    def convolve(self, input_BTC: Tensor, weight_CW: Tensor, path_BTM: Tensor | None) -> Tensor:
        """Convolve inside documents."""
        self.inputs_BTC = input_BTC
        windows_BTWC = delta.windows(_nothing(input_BTC, weight_CW), input_BTC, document_BT=self.document_BT)
        return delta.convolve(windows_BTWC, weight_CW)

    def rule(self, inputs: delta.Inputs, path_BTM: Tensor | None, *, both_ways: bool = False) -> Tensor:
        """Read each document from an empty state."""
        B, _, H, D = inputs.value_BTHD.shape
        state_BHND = inputs.value_BTHD.new_zeros(B, H, inputs.key_BTGN.shape[-1], D)
        output_BTHD, self.scan = delta.scan(inputs, state_BHND, self.document_BT)
        return output_BTHD


class OverBlocks:
    """Read consecutive blocks, each from the state before its anchor."""

    def __init__(self, rows: OverRows, anchor_BA: Tensor) -> None:
        self._rows = rows
        self._anchor_BA = anchor_BA

    def convolve(self, input_BTC: Tensor, weight_CW: Tensor, path_BTM: Tensor | None) -> Tensor:
        """Convolve each block, preceded by the tokens of its document before the anchor."""
        rows = self._rows
        nothing_BVC = _nothing(rows.inputs_BTC, weight_CW)
        before = delta.tails(nothing_BVC, rows.inputs_BTC, self._anchor_BA, rows.document_BT).flatten(0, 1)
        windows = delta.windows(before.to(input_BTC.dtype), self._blocks(input_BTC))
        return self._rows_again(delta.convolve(windows, weight_CW))

    def rule(self, inputs: delta.Inputs, path_BTM: Tensor | None, *, both_ways: bool = False) -> Tensor:
        """Read each block forwards from its state, and with `both_ways` also backwards from its end."""
        state = delta.states_at(self._rows.scan, self._anchor_BA).flatten(0, 1)
        blocks = delta.Inputs(*map(self._blocks, inputs))
        output, _ = delta.solve(blocks, state)
        if both_ways:
            output = output + delta.from_behind(blocks)
        return self._rows_again(output)

    def _blocks(self, each_BT: Tensor) -> Tensor:
        return each_BT.reshape(self._anchor_BA.numel(), -1, *each_BT.shape[2:])

    def _rows_again(self, each: Tensor) -> Tensor:
        return each.reshape(len(self._anchor_BA), -1, *each.shape[2:])


def documents_apart(model: nn.Module, document_BT: Tensor) -> AbstractContextManager[None]:
    """Let a backbone's recurrent layers start anew with every document of packed rows."""

    def apart(layer: nn.Module, hidden_states: Tensor, **_: object) -> Tensor:
        return mix(layer, hidden_states, OverRows(document_BT))

    return replaced([module for module in model.modules() if mixes(module)], lambda layer: partial(apart, layer))


@contextmanager
def replaced(layers: Sequence[nn.Module], forward: Callable[[nn.Module], Callable[..., Any]]) -> Iterator[None]:
    """Let layers run what `forward` makes for each of them, inside the block."""
    for layer in layers:
        # An attribute of the instance: found before the class's own, and gone when deleted.
        layer.forward = forward(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _nothing(input_BTC: Tensor, weight_CW: Tensor) -> Tensor:
    """Return the inputs before a text's first token."""
    return input_BTC.new_zeros(len(input_BTC), weight_CW.shape[1] - 1, input_BTC.shape[2])
