"""Linear layers for decoding on CPUs: weights laid out once, the way oneDNN's kernels read them.

A plain linear layer hands its weights to the matrix product as they are stored, and the kernel rearranges them anew in
every pass, which for the few rows of a decoding pass is a good part of its time. Knows layers; knows no pass.
"""

from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_DTYPES = (torch.float32, torch.bfloat16)

_ROWS = 16  # what the layout is made for; any number of rows can be multiplied


class PackedLinear(nn.Linear):
    """A linear layer that multiplies by a packed copy of its weights in inference mode, which decoding runs in.

    The copy is made at the first use, and again once the weights have changed; what is written into a weight's `.data`
    leaves no trace to tell by, and needs `unpack` and `pack`. Results are those of `nn.Linear` up to rounding, as
    between any two kernels. Where the copy cannot be made (`can_pack`), and under autocast, it is `nn.Linear`.
    """

    _packed: Tensor | None = None
    _packed_state: tuple[int, int] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Return `input @ weight.T + bias`."""
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        if not torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu"):
            return linear(input, weight, bias)
        state = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if state != self._packed_state:
            self._packed_state = state
            self._packed = _packed(weight)
        if _product is None or self._packed is None or input.dtype != weight.dtype:
            return linear(input, weight, bias)
        out: Tensor = _product(input, self._packed, bias, "none", [], "")
        return out

    def __getstate__(self) -> dict[str, object]:
        """Leave the packed weights out of copies, which make their own."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_packed")}


def _operator(name: str) -> Callable[..., Any] | None:
    found = getattr(torch.ops.mkldnn, name, None)  # a build of torch may come without oneDNN
    return None if found is None else found.default


_product, _reorder = _operator("_linear_pointwise"), _operator("_reorder_linear_weight")


def can_pack(weight: Tensor) -> bool:
    """Tell whether oneDNN packs such a weight here: on a CPU, in float32, or in bfloat16 where the CPU has it."""
    if _product is None or _reorder is None or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.device.type != "cpu" or weight.dtype not in _DTYPES:
        return False
    return weight.dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _packed(weight: Tensor) -> Tensor | None:
    if _reorder is None or not can_pack(weight):
        return None
    packed: Tensor = _reorder(weight.detach().contiguous(), _ROWS)
    return packed


def pack(model: nn.Module) -> None:
    """Let a model's linear layers multiply by packed weights from now on, in place; costs a second copy of them."""
    for module in _of_class(model, nn.Linear):
        module.__class__ = PackedLinear


def unpack(model: nn.Module) -> None:
    """Make packed layers plain ones again, and free their copies."""
    for module in _of_class(model, PackedLinear):
        module.__class__ = nn.Linear
        for name in ("_packed", "_packed_state"):
            module.__dict__.pop(name, None)


def is_packed(model: nn.Module) -> bool:
    """Tell whether a model's linear layers are packed."""
    return bool(_of_class(model, PackedLinear))


def pays(model: nn.Module) -> bool:
    """Tell whether packing helps here: all weights can be packed, and memory has room for them to spare."""
    weights = [module.weight for module in _of_class(model, nn.Linear)]
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    return all(map(can_pack, weights)) and size < psutil.virtual_memory().available / 2


def _of_class(model: nn.Module, kind: type[nn.Linear]) -> list[nn.Linear]:
    return [module for module in model.modules() if type(module) is kind]
