"""The frozen backbone's pass over packed rows, whose hidden states drafters train on.

Shapes: B rows, T positions, C hidden size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from orthrus.kernels import masks
from orthrus.model.attach import layers_of, windows_of
from orthrus.model.dual import View


class Frozen(NamedTuple):
    """The backbone's last hidden states `[B, T, C]`, and the outputs of the tapped layers."""

    hidden_BTC: Tensor
    tapped: list[Tensor]


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
            use_cache=False,
            view=View(name="ar", masks=layer_masks),
        ).last_hidden_state
    finally:
        for one in hooks:
            one.remove()
    return Frozen(hidden, [seen[tap] for tap in taps])
