"""Weights as FBGEMM reads them on x86 CPUs: in 16 bits, multiplied in float32, or in 8, multiplied as integers.

Torch keeps them in objects that are no tensors.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from threading import Lock
from typing import Any, Final

import torch
from torch import Tensor

from orthrus.kernels.recorded import bound, is_recording, operator

LARGEST: Final = 64
"""Of the integers that 8-bit weights are multiplied by without VNNI: pairs of products then fit into 16 bits."""

_ROWS: Final = 1024  # of a weight that are looked at together

_one_at_a_time = Lock()  # torch has one engine for all threads

_RECORDED = """
def product(input, weight: __torch__.torch.classes.quantized.LinearPackedParamsBase):
    return torch.ops.quantized.{}
"""

_HALF: Final = "linear_dynamic_fp16"
_EIGHT: Final = "linear_with_input_q_dq_qweight_dq_output_fp32"
_half, _pack_half = operator("quantized", _HALF), operator("quantized", "linear_prepack_fp16")
_eight, _pack_eight = operator("quantized", _EIGHT), operator("quantized", "linear_prepack")


class Weights:
    """Weights `[out, in]` that give the products of an input `[..., rows, in]`, both in float32.

    `itemsize` are bytes that each weight is read in; `largest` is the integer that weights of 8 bits are multiplied by.
    """

    dtype: Final = torch.float32

    def __init__(self, packed: object, *, largest: int = 0) -> None:
        self._packed, self.largest, self.itemsize = packed, largest, 1 if largest else 2

    def __call__(self, input: Tensor) -> Tensor:
        """Return `input @ weight.T`; weights of 8 bits round inputs to integers up to `largest`."""
        if is_recording():
            return self._recorded(input)
        assert _half is not None
        assert _eight is not None
        if not self.largest:
            out: Tensor = _half(input, self._packed)
        else:
            out = _eight(input, 1.0, self._zero, self._packed)
        return out

    @property
    def _zero(self) -> int:
        return -(-self.largest // 64) * 64  # a power of 2, to which all integers can be added in 8 bits

    @cached_property
    def _recorded(self) -> Callable[..., Tensor]:
        call = f"{_EIGHT}(input, 1.0, {self._zero}, weight)" if self.largest else f"{_HALF}(input, weight)"
        return bound(_RECORDED.format(call), self._packed)


def in_half(weight: Tensor) -> Weights | None:
    """Return a weight in 16 bits; None where they do not hold it as well as bfloat16 would.

    float16 has more digits than bfloat16 and a smaller range: what is tiny beside a row's largest number may round.
    """
    weight = weight.detach()
    if _pack_half is None or not all(map(_fits_half, torch.split(weight, _ROWS))):
        return None
    with _engine():
        return Weights(_pack_half(weight.float().contiguous(), None))


def _fits_half(weight: Tensor) -> bool:
    wide = weight.float()
    lost = (wide.half().float() - wide).abs().amax(-1)
    return bool((lost <= wide.abs().amax(-1) * 2**-12).all())


def in_eight(weight: Tensor, scale: Tensor, largest: int = LARGEST) -> Weights:
    """Return a weight of integers from -127 to 127 `[out, in]`, times a scale `[out]` in float32.

    It is multiplied by integers up to `largest`, at most 127.
    """
    assert _pack_eight is not None
    with _engine(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of such tensors' future
        zero = torch.zeros(len(scale), dtype=torch.long)
        quantised = torch._make_per_channel_quantized_tensor(weight, scale.double(), zero, 0)
        return Weights(_pack_eight(quantised, None), largest=largest)


def can_half() -> bool:
    """Tell whether weights can be read in 16 bits here."""
    return _half is not None and _pack_half is not None and _is_here()


@cache
def is_exact(largest: int = LARGEST) -> bool:
    """Tell whether products of weights in 8 bits with integers up to this one are exact here."""
    if _eight is None or _pack_eight is None or not hasattr(torch, "_make_per_channel_quantized_tensor"):
        return False
    if not _is_here():
        return False
    weight = torch.tensor([127, -127], dtype=torch.int8)[:, None].expand(2, 64).contiguous()
    rows = torch.tensor([[largest], [-largest]]).expand(2, 64).float().contiguous()
    try:
        sums = in_eight(weight, torch.ones(2), largest)(rows)
    except RuntimeError:
        return False
    return torch.equal(sums, rows @ weight.float().T)


def _is_here() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines


@contextmanager
def _engine() -> Iterator[None]:
    engines: Any = torch.backends.quantized
    with _one_at_a_time:
        before = engines.engine
        engines.engine = "fbgemm"
        try:
            yield
        finally:
            engines.engine = before
