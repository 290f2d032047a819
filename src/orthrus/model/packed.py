"""Linear layers for decoding on CPUs: weights laid out once, the way oneDNN's kernels read them.

A plain linear layer hands its weights to the matrix product as they are stored, and the kernel rearranges them anew in
every pass; for the few rows of a decoding pass that takes as long as the product. Knows layers; knows no pass.
"""

import psutil
import torch
from torch import Tensor, nn

_DTYPES = (torch.float32, torch.bfloat16)

_ROWS = 16  # what the layout is made for; any number of rows can be multiplied


class PackedLinear(nn.Linear):
    """A linear layer that multiplies by a packed copy of its weights where no gradient is asked for.

    The copy is made at the first use, and again once the weights have changed. Results are those of `nn.Linear` up to
    rounding, as between any two kernels. Anywhere but on the CPU, and under autocast, it is `nn.Linear`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return `input @ weight.T + bias`."""
        weight = self.weight
        if (
            torch.is_grad_enabled()
            or weight.device.type != "cpu"
            or input.dtype != weight.dtype
            or weight.dtype not in _DTYPES
            or weight.is_inference()
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled("cpu")
            or (weight.dtype == torch.float32 and input.numel() == self.in_features)  # one row has nothing to gain
        ):
            return super().forward(input)
        state = (weight.data_ptr(), weight._version)
        if self.__dict__.get("_packed_state") != state:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS)
            self.__dict__ |= {"_packed": packed, "_packed_state": state}
        out: Tensor = torch.ops.mkldnn._linear_pointwise(input, self.__dict__["_packed"], self.bias, "none", [], "")
        return out

    def __getstate__(self) -> dict[str, object]:
        """Leave the packed weights out of copies, which make their own."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_packed")}


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
