"""The frozen backbone's pass over packed rows, whose hidden states drafters train on.

Shapes: B rows, T positions, C hidden size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from orthrus.kernels import masks
from orthrus.model.attach import layers_of, windows_of
from orthrus.model.dual import View
from orthrus.train.recurrence import OverRows


class Frozen(NamedTuple):
    """The backbone's last hidden states `[B, T, C]`, and the outputs of the tapped layers."""

    hidden_BTC: Tensor
    tapped: list[Tensor]


class _Rows:
    """A stand-in for a cache: keys pass through, and recurrent layers start anew with every document."""

    def __init__(self, document_BT: Tensor) -> None:
        self._document_BT = document_BT

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key, value

    def recurrence(self, layer_idx: int) -> OverRows:
        return OverRows(self._document_BT)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


@torch.no_grad()
def read(
    model: PreTrainedModel, token_BT: Tensor, document_BT: Tensor, position_BT: Tensor, taps: Sequence[int]
) -> Frozen:
    """Run the AR view over packed documents, which do not see each other."""
    seen: dict[int, Tensor] = {}

    def keep(tap: int, output: Tensor | tuple[Tensor, ...]) -> None:
        seen[tap] = output[0] if isinstance(output, tuple) else output

    def hook(tap: int) -> "torch.utils.hooks.RemovableHandle":
        def call(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            keep(tap, output)

        return layers_of(model)[tap].register_forward_hook(call)

    layer_masks = masks.layer_masks(
        masks.packed(document_BT),
        query_position_BQ=position_BT,
        key_position_BS=position_BT,
        windows=windows_of(model),
        dtype=model.dtype,
    )
    hooks = [hook(tap) for tap in set(taps)]
    try:
        hidden: Tensor = model.base_model(
            input_ids=token_BT,
            position_ids=position_BT,
            attention_mask=layer_masks.full,
            past_key_values=_Rows(document_BT),
            use_cache=True,
            view=View(name="ar", masks=layer_masks),
        ).last_hidden_state
    finally:
        for one in hooks:
            one.remove()
    return Frozen(hidden, [seen[tap] for tap in taps])
