"""The frozen backbone's pass over packed rows, and what it shares with the passes that are trained on it.

Shapes: B rows, T positions, C hidden size, Q queries, S keys.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from orthrus.kernels import attention, masks
from orthrus.model.attach import layers_of, windows_of
from orthrus.model.dual import View
from orthrus.train.recurrence import OverRows


class Frozen(NamedTuple):
    """The backbone's last hidden states `[B, T, C]`, and the outputs of the tapped layers."""

    hidden_BTC: Tensor
    tapped: list[Tensor]


class PackedKeys:
    """A stand-in for a cache: keys pass through, and recurrent layers start anew with every document."""

    def __init__(self, document_BT: Tensor) -> None:
        self._document_BT = document_BT

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key, value

    def recurrence(self, layer_idx: int) -> Any:
        """Return what a recurrent layer reads packed rows by."""
        return OverRows(self._document_BT)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: passes are given their positions."""
        return 0


@torch.no_grad()
def read(
    model: PreTrainedModel,
    token_BT: Tensor,
    document_BT: Tensor,
    position_BT: Tensor,
    taps: Sequence[int] = (),
    *,
    keys: PackedKeys | None = None,
) -> Frozen:
    """Run the AR view over packed documents, which do not see each other; `keys` stands in for its cache."""
    seen: dict[int, Tensor] = {}

    def keep(tap: int, _: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen[tap] = output[0] if isinstance(output, tuple) else output

    layers = layers_of(model)
    allowed = masks_of(model, masks.packed(document_BT), position_BT, position_BT)
    view = View(name="ar", masks=allowed)
    with ExitStack() as hooks:
        for tap in set(taps):
            hooks.enter_context(layers[tap].register_forward_hook(partial(keep, tap)))
        hidden = run(model, {"input_ids": token_BT}, position_BT, keys or PackedKeys(document_BT), view)
    return Frozen(hidden, [seen[tap] for tap in taps])


def run(model: PreTrainedModel, inputs: Mapping[str, Tensor], position: Tensor, keys: PackedKeys, view: View) -> Tensor:
    """Run one view over tokens at these positions; returns its last hidden states."""
    assert view.masks is not None
    full = view.masks.full
    hidden: Tensor = model.base_model(
        **inputs,
        position_ids=position,
        # The model's own mask, which a view's replaces: any mask that is one already saves it making its own.
        attention_mask=full.groups[0].additive[None, None] if isinstance(full, masks.InBlocks) else full,
        past_key_values=keys,
        use_cache=True,
        view=view,
    ).last_hidden_state
    return hidden


def plain(
    model: PreTrainedModel,
    token_BT: Tensor,
    position_BT: Tensor,
    allowed_BTT: Tensor,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Run a model without a view; returns its last hidden states. The mask is in the pass's dtype unless given one."""
    mask = masks.additive(allowed_BTT, dtype or dtype_on(token_BT.device, model.dtype))
    hidden: Tensor = model.base_model(
        input_ids=token_BT, position_ids=position_BT, attention_mask=mask[:, None], use_cache=False
    ).last_hidden_state
    return hidden


def masks_of(
    model: PreTrainedModel, allowed_BQS: Tensor, query_BQ: Tensor, key_BS: Tensor, *, block: int = 1
) -> masks.LayerMasks:
    """Make a pass's masks for a model with a view; see `pass_masks`."""
    dense = model.config._attn_implementation != attention.NAME
    windows = windows_of(model)
    return pass_masks(allowed_BQS, query_BQ, key_BS, windows=windows, dtype=model.dtype, block=block, dense=dense)


def pass_masks(
    allowed_BQS: Tensor,
    query_BQ: Tensor,
    key_BS: Tensor,
    *,
    windows: Iterable[int],
    dtype: torch.dtype,
    block: int,
    trained: bool = False,
    dense: bool = False,
) -> masks.LayerMasks:
    """Make the masks of a training pass: FlexAttention's on CUDA; it has no backward pass on CPUs.

    Args:
        block: length of the pass's blocks; 1 for the backbone's own pass.
        trained: whether the earlier keys get gradients too.
        dense: for attention functions of others, on CPUs.
    """
    positions = {"query_position_BQ": query_BQ, "key_position_BS": key_BS}
    if allowed_BQS.is_cuda:
        return masks.block_masks(allowed_BQS, windows=windows, **positions)
    dtype = dtype_on(allowed_BQS.device, dtype)
    if dense:
        return masks.layer_masks(allowed_BQS, windows=windows, dtype=dtype, **positions)
    return masks.in_blocks(allowed_BQS, block=block, windows=windows, dtype=dtype, trained=trained, **positions)


def dtype_on(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return autocast's dtype where it is on, else the given one."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype
