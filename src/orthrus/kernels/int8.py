"""Linear layers in 8-bit integers for decoding on CPUs: inputs and weights are rounded, sums of products are exact.

Each row of the input has a scale of its own and so has each output; products are added up as integers, which does not
round. What a row gives therefore does not depend on the other rows, nor on the number of threads. One operator of our
own rounds and multiplies where it is compiled; elsewhere FBGEMM multiplies, or oneDNN where it has tiles (AMX): of
integers, all give the same bits. Where sums of 8-bit integers saturate, inputs come in two parts of 7 bits each. How
inputs are rounded best is observed elsewhere (`orthrus.kernels.smoothing`).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from orthrus.errors import ConfigError
from orthrus.kernels import fbgemm
from orthrus.kernels.compiled import instructions, linear_int8
from orthrus.kernels.native import has_tiles
from orthrus.kernels.recorded import is_recording, operator, recordable
from orthrus.kernels.rounded import RoundedLinear, biases_of, refuse_gradients, replace
from orthrus.kernels.shared import Shared

_LARGEST: Final = 127
_MOST_INPUTS: Final = (2**31 - 1) // (_LARGEST * 255)
"""Beyond so many, sums of products may not fit into 32 bits."""

# Added to a float32 number below 2**22 this rounds it to an integer, whose sum with 128 is in the lowest byte.
_ROUND: Final = torch.tensor(2.0**23 + 128)
_FULL: Final = torch.tensor(float(_LARGEST))
_PARTS: Final = torch.tensor(float(fbgemm.LARGEST))
_BLOCK, _SIDE = 16, 4  # outputs, and inputs of each, that lie side by side for our own operator
_OWN_TYPES: Final = (torch.float32, torch.bfloat16)
_TINY: Final = torch.finfo(torch.float32).tiny
_LEAST: Final = _TINY * _LARGEST  # by far less than which 127 cannot be divided in float32

_product, _prepack = operator("onednn", "qlinear_pointwise"), operator("onednn", "qlinear_prepack")

_RECORDED = """
def product(row, weight, scale, zero):
    return torch.ops.onednn.qlinear_pointwise(
        row, 1.0, 128, weight, scale, zero, None, 1.0, 0, torch.float32, "none", [], "")
"""


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight `[out, in]` to int8 and one float32 scale `[out]` each, whose product is nearest to it."""
    wide = weight.detach().float()
    scale = wide.abs().amax(-1).clamp_min_(_TINY * _LARGEST) / _LARGEST
    return (wide / scale[:, None]).round_().to(torch.int8), scale


def scaled(input: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows `[..., in]` in float32 by a scale that makes `largest` of each row's largest magnitude, and those.

    Of rows that are all but zero, `_LEAST` stands for the largest magnitude.
    """
    wide = input.float()
    most = wide.abs().amax(-1, keepdim=True).clamp_min_(_LEAST)
    return wide * (largest / most), most


def rounded(input: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows `[..., in]` to integers from -127 to 127, kept as uint8 with 128 added.

    Returns them and each row's largest magnitude `[..., 1]` in float32, which 127 stands for. Rows that are not finite
    have a magnitude that is not.
    """
    wide, most = scaled(input, _FULL)
    shifted = wide.add_(_ROUND)
    # The other way to the same integers takes longer, but can be recorded.
    integer = shifted.to(torch.int32) if is_recording() else shifted.view(torch.int32)
    return integer.to(torch.uint8), most


def in_parts(input: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows `[..., in]` to 64ths of their largest magnitude, and what is left to 128ths of those.

    Returns both as integers in float32 `[2, ..., in]`, and each row's largest magnitude `[..., 1]`.
    """
    wide, most = scaled(input, _PARTS)
    coarse = wide.round()
    return torch.stack([coarse, wide.sub_(coarse).mul_(2 * fbgemm.LARGEST).round_()]), most


class _Shared(Shared["Int8Linear"]):
    """The product of layers that read the same input, with their weights as the kernel reads them."""

    own: Callable[..., Tensor] | None = None

    def product(self, input: Tensor) -> Tensor:
        refuse_gradients(input, "int8")
        if self.packed is None:
            self.pack()
        if self.own is not None:
            narrow = input if input.dtype in _OWN_TYPES else input.float()
            return self.own(narrow, self.packed, self.zero, self.scale, self.factor, self.bias).to(input.dtype)
        smooth = input if self.factor is None else input * self.factor
        if not isinstance(self.packed, fbgemm.Weights):
            row, most = rounded(smooth)
            wide = multiplied(row, self.packed, self.scale, self.zero)
        elif self.packed.largest == _LARGEST:
            row, most = scaled(smooth, _FULL)
            wide = self.packed(row.round_())  # whose own rounding adds 128 first
        else:
            parts, most = in_parts(smooth)
            coarse, fine = self.packed(parts)
            wide = coarse.add_(fine, alpha=1 / (2 * fbgemm.LARGEST))
        wide = wide.mul_(most)
        return (wide if self.bias is None else wide.add_(self.bias)).to(input.dtype)

    def pack(self) -> None:
        weight = torch.cat([layer.weight.detach() for layer in self.layers])
        scale = torch.cat([layer.scale for layer in self.layers])
        self.factor = self.layers[0].factor
        self.bias = biases_of(self.layers)
        largest = _LARGEST if rounds_inputs() else fbgemm.LARGEST
        self.scale, self.own = scale / largest, own_operator()
        if self.own is not None and weight.shape[1] % _SIDE == 0:
            self.zero = weight.sum(1, dtype=torch.int32) * (largest + largest % 2)  # 128 or 64
            self.packed = in_blocks(weight)
        elif not rounds_inputs() or by_fbgemm():
            self.packed, self.own = fbgemm.in_eight(weight, self.scale, largest), None
        else:
            assert _prepack is not None
            self.zero = torch.zeros(len(weight), dtype=torch.int32)
            self.packed, self.own = _prepack(weight, None), None


class Int8Linear(RoundedLinear):
    """A linear layer with weights `[out, in]` in 8-bit integers.

    Inputs are multiplied by `factor` `[in]`, where there is one, and the weights divided by it before they are rounded.
    """

    precision, shared = "int8", _Shared
    scale: Tensor
    factor: Tensor | None

    def __init__(self, layer: nn.Linear, factor: Tensor | None = None) -> None:
        weight, scale = quantised(layer.weight if factor is None else layer.weight / factor)
        super().__init__(layer, weight)
        self.register_buffer("scale", scale)
        self.register_buffer("factor", None if factor is None else factor.clone())

    def dequantised(self) -> Tensor:
        dense = self.weight.float() * self.scale[:, None]
        return dense if self.factor is None else dense * self.factor


def in_blocks(weight: Tensor) -> Tensor:
    """Return a weight `[out, in]` in blocks `[out / 16, in / 4, 16, 4]`; outputs are filled up with zeros."""
    outputs, inputs = weight.shape
    filled = pad(weight, (0, 0, 0, -outputs % _BLOCK))
    return filled.view(-1, _BLOCK, inputs // _SIDE, _SIDE).transpose(1, 2).contiguous()


def own_operator() -> Callable[..., Tensor] | None:
    """Return the operator of our own where it is compiled and has the bits of the others here."""
    name = instructions()
    if name is None or (name != "avx2") != rounds_inputs():
        return None
    own = linear_int8()
    return own if own is not None and _agrees(own) else None


@cache
def _agrees(own: Callable[..., Tensor]) -> bool:
    """Tell whether an operator has the plain way's bits, with tiles and without: not all compilers keep to IEEE 754."""
    largest = _LARGEST if rounds_inputs() else fbgemm.LARGEST
    weight = (torch.arange(72 * 64) * 37 % 255 - _LARGEST).view(72, 64).to(torch.int8)
    input, factor = torch.arange(25 * 64).view(25, 64).float().sin(), torch.linspace(0.5, 2, 64, dtype=torch.float32)
    scale, bias = (torch.linspace(low, 1, 72, dtype=torch.float32) / largest for low in (0.1, -1))
    if rounds_inputs():
        row, most = rounded(input * factor)
        parts = row[None].double() - 128
    else:
        parts, most = in_parts(input * factor)
    sums = [(part.double() @ weight.double().T).float() * scale for part in parts]
    wide = sums[0] if len(sums) == 1 else sums[0] + sums[1] / (2 * fbgemm.LARGEST)
    zero = weight.sum(1, dtype=torch.int32) * (largest + largest % 2)
    expected, blocks = wide * most + bias, in_blocks(weight)
    return all(torch.equal(own(input[:R], blocks, zero, scale, factor, bias), expected[:R]) for R in (3, 25))


def multiplied(row: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return products of rounded rows, with 128 added, and packed weights, times the weights' scales, in float32."""
    assert _product is not None
    if is_recording():
        return recordable(_RECORDED)(row, weight, scale, zero)
    wide: Tensor = _product(row, 1.0, 128, weight, scale, zero, None, 1.0, 0, torch.float32, "none", [], "")
    return wide


def is_exact() -> bool:
    """Tell whether int8 layers compute exactly on this CPU."""
    return rounds_inputs() or fbgemm.is_exact()


def rounds_inputs() -> bool:
    """Tell whether products of 8-bit integers are added exactly here: without VNNI instructions, sums saturate.

    Then inputs have 8 bits, and otherwise two parts of 7.
    """
    return by_fbgemm() or by_onednn()


def by_fbgemm() -> bool:
    """Tell whether FBGEMM adds such products exactly, and no tiles make oneDNN the faster."""
    return not has_tiles() and fbgemm.is_exact(_LARGEST)


@cache
def by_onednn() -> bool:
    """Tell whether oneDNN adds such products exactly."""
    if _product is None or _prepack is None or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    weight = torch.tensor([_LARGEST, -_LARGEST], dtype=torch.int8)[:, None].expand(2, 64).contiguous()
    row, one, zero = torch.full((1, 64), 255, dtype=torch.uint8), torch.ones(2), torch.zeros(2, dtype=torch.int32)
    try:
        sums = multiplied(row, _prepack(weight, None), one, zero)
    except RuntimeError:
        return False
    largest = float(_LARGEST * _LARGEST * 64)
    return bool(torch.equal(sums, torch.tensor([[largest, -largest]])))


def require() -> None:
    """Check that int8 layers compute on this CPU; raises ConfigError where they do not."""
    if not is_exact():
        raise ConfigError(
            "dtype int8 requires a CPU that adds products of integers exactly, by VNNI instructions and a torch with "
            "oneDNN, or on x86 a torch with FBGEMM; found neither: choose bfloat16 or float32"
        )


def quantise(
    model: nn.Module,
    groups: Sequence[Sequence[nn.Linear]],
    *,
    factors: Mapping[nn.Linear, Tensor | None] = MappingProxyType({}),
) -> None:
    """Replace a model's linear layers by int8 ones, in place; their floating-point weights are let go.

    Layers of a group read the same input, one after another in this order, and round it alike: times one of `factors`.
    """

    def form(layer: nn.Linear) -> Int8Linear | None:
        return Int8Linear(layer, factors.get(layer)) if layer.in_features <= _MOST_INPUTS else None

    replace(model, groups, form)
