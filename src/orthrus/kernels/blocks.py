"""Linear layers in blocks of 32 inputs, in 4 bits or 8, for decoding on CPUs: the arithmetic of GGUF's Q4_1 and Q8_0.

Each block of a weight has a scale, and in 4 bits a least number, in float16; each block of a row a scale in float32.
Products within a block are added up as integers, blocks one after another in float32. What a row gives therefore does
not depend on the other rows, nor on the number of threads, nor on the processor. One operator of our own multiplies
(`blocks.cpp`), which is compiled when it is asked for.
"""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from orthrus.kernels import compiled
from orthrus.kernels.rounded import RoundedLinear, biases_of, refuse_gradients
from orthrus.kernels.shared import Shared

SIZE: Final = 32
"""Inputs of a block."""

_TILE, _SIDE = 16, 4  # outputs, and inputs of each, that lie side by side
_SHIFT = 128  # added to codes of 8 bits
_LARGEST = torch.finfo(torch.float16).max


class Blocks(NamedTuple):
    """A rounded weight: codes `[out, in / 32, 32]` in uint8, `scale` and `least` `[out, in / 32]` in float16.

    It is `scale * code + least`, or `scale * (code - 128)` where there is no least number.
    """

    code: Tensor
    scale: Tensor
    least: Tensor | None

    def numbers(self) -> Tensor:
        code, scale = self.code.float(), self.scale.float()[..., None]
        wide = scale * (code - _SHIFT) if self.least is None else scale * code + self.least.float()[..., None]
        return wide.flatten(1)


def quantised(weight: Tensor, bits: int) -> Blocks:
    """Round a weight `[out, in]` to blocks by their least and greatest number (4 bits) or magnitude (8 bits).

    Numbers that a GGUF file's blocks stand for give these very blocks.
    """
    wide = weight.detach().float().reshape(len(weight), -1, SIZE)
    if bits == 4:
        low = wide.amin(-1)
        least, scale = low.half(), ((wide.amax(-1) - low) / 15).half()
        code = (wide - least.float()[..., None]) / _divisor(scale)
        return Blocks(code.round_().clamp_(0, 15).to(torch.uint8), scale, least)
    scale = (wide.abs().amax(-1) / 127).half()
    code = (wide / _divisor(scale)).round_().clamp_(-127, 127)
    return Blocks(code.add_(_SHIFT).to(torch.uint8), scale, None)


def _divisor(scale: Tensor) -> Tensor:
    wide = scale.float()[..., None]
    return torch.where(wide == 0, 1, wide)


def packed(blocks: Blocks) -> Tensor:
    """Return blocks as the operator reads them, `[out / 16, in / 32, 320 or 544]` in uint8; outputs are filled up."""
    outputs, count, _ = blocks.code.shape
    missing = -outputs % _TILE
    code = pad(blocks.code, (0, 0, 0, 0, 0, missing)).view(-1, _TILE, count, SIZE // _SIDE, _SIDE)
    code = code.permute(0, 2, 3, 1, 4).flatten(2)
    if blocks.least is not None:
        low, high = code.chunk(2, -1)
        code = low | high << 4
    halves = [each for each in (blocks.scale, blocks.least) if each is not None]
    tiles = [pad(each, (0, 0, 0, missing)).view(-1, _TILE, count).transpose(1, 2).contiguous() for each in halves]
    return torch.cat([code, *(each.view(torch.uint8) for each in tiles)], -1)


def unpacked(weight: Tensor, outputs: int) -> Blocks:
    tiles, count, size = weight.shape
    four = size < SIZE * _TILE
    code = weight[..., : SIZE * _TILE // (1 + four)]
    halves = weight[..., code.shape[-1] :].contiguous().view(torch.float16).view(tiles, count, -1, _TILE)
    if four:
        code = torch.cat([code & 15, code >> 4], -1)
    code = code.view(tiles, count, SIZE // _SIDE, _TILE, _SIDE).permute(0, 3, 1, 2, 4).reshape(-1, count, SIZE)
    scale, *least = [each.transpose(1, 2).reshape(-1, count)[:outputs] for each in halves.unbind(2)]
    return Blocks(code[:outputs], scale, least[0] if least else None)


class _Shared(Shared["BlockLinear"]):
    """The product of layers that read the same input."""

    def __init__(self, layers: Sequence["BlockLinear"]) -> None:
        super().__init__(layers)
        self.operator = operator()

    def product(self, input: Tensor) -> Tensor:
        refuse_gradients(input, "int4")
        if self.packed is None:
            self.pack()
        if input.dtype != torch.float32:
            return self.operator(input.float(), self.packed, sum(self.sizes), self.bias).to(input.dtype)
        return self.operator(input, self.packed, sum(self.sizes), self.bias)

    def pack(self) -> None:
        """Let the layers' weights lie one behind another."""
        self.bias = biases_of(self.layers)
        if len(self.layers) == 1:
            self.packed = self.layers[0].weight.detach()
            return
        with torch.inference_mode(False), torch.no_grad():
            self.packed = torch.cat([layer.weight for layer in self.layers])
            for layer, part in zip(
                self.layers, torch.split(self.packed, [len(layer.weight) for layer in self.layers]), strict=True
            ):
                layer.weight.data = part


class BlockLinear(RoundedLinear):
    """A linear layer with weights in blocks of 4 bits or 8, as the operator reads them (`packed`).

    Layers that read the same input keep theirs one behind another.
    """

    precision, shared = "int4", _Shared

    def __init__(self, layer: nn.Linear, bits: int) -> None:
        """Round a layer's weights, whose inputs come in blocks (`fits`)."""
        super().__init__(layer, packed(quantised(layer.weight, bits)))

    def dequantised(self) -> Tensor:
        return unpacked(self.weight, self.out_features).numbers()

    @classmethod
    def joins(cls, layers: Sequence[RoundedLinear]) -> bool:
        """Tell whether layers of one input have one product: none but the last fills outputs up."""
        alike = super().joins(layers) and len({layer.weight.shape[-1] for layer in layers}) == 1
        return alike and not any(layer.out_features % _TILE for layer in layers[:-1])


def pack(model: nn.Module) -> None:
    """Let layers of one input lie one behind another now: recordings take weights that move later for others."""
    for layer in model.modules():
        shared = layer._shared if isinstance(layer, BlockLinear) else None
        if isinstance(shared, _Shared) and shared.packed is None:
            shared.pack()


def fits(layer: nn.Linear) -> bool:
    """Tell whether a layer's inputs come in blocks, and no number of its blocks leaves float16's range."""
    weight = layer.weight.detach()
    if layer.in_features % SIZE or not weight.numel():
        return False
    least, greatest = weight.aminmax()
    return bool(least >= -_LARGEST and greatest <= _LARGEST)


def operator() -> Callable[..., Tensor]:
    """Return the operator, which is compiled where it is not yet; raises ConfigError where that cannot be."""
    return compiled.required("linear_blocks", by="dtype int4")
