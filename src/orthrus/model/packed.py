"""Linear layers for decoding on CPUs: weights laid out once, the way oneDNN's kernels read them.

A plain linear layer hands its weights to the matrix product as they are stored, and the kernel rearranges them anew in
every pass; for the few rows of a decoding pass that takes as long as the product. Knows layers; knows no pass.
"""

import psutil
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_DTYPES = (torch.float32, torch.bfloat16)

_ROWS = 16  # what the layout is made for; any number of rows can be multiplied


class PackedLinear(nn.Linear):
    """A linear layer that multiplies by a packed copy of its weights in inference mode, which decoding runs in.

    The copy is made at the first use, and again once the weights have changed. Results are those of `nn.Linear` up to
    rounding, as between any two kernels. Anywhere but on the CPU, and under autocast, it is `nn.Linear`.
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
        one_row = weight.dtype == torch.float32 and input.numel() == self.in_features  # has nothing to gain
        if self._packed is None or one_row or input.dtype != weight.dtype:
            return linear(input, weight, bias)
        out: Tensor = _product(input, self._packed, bias, "none", [], "")
        return out

    def __getstate__(self) -> dict[str, object]:
        """Leave the packed weights out of copies, which make their own."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_packed")}


_product = torch.ops.mkldnn._linear_pointwise.default


def _packed(weight: Tensor) -> Tensor | None:
    if weight.device.type != "cpu" or weight.dtype not in _DTYPES:
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS)
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
    """Tell whether packing helps here: weights of a kind that oneDNN packs, in the CPU's memory with room to spare."""
    weights = [module.weight for module in _of_class(model, nn.Linear)]
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and all(weight.device.type == "cpu" and weight.dtype in _DTYPES for weight in weights)
        and size < psutil.virtual_memory().available / 2
    )


def _of_class(model: nn.Module, kind: type[nn.Linear]) -> list[nn.Linear]:
    return [module for module in model.modules() if type(module) is kind]
