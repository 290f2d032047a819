"""Weights as FBGEMM reads them: exact where that is said, close where it is not, recorded to the bit."""

from collections.abc import Callable
from threading import Thread

import pytest
import torch
from torch import Tensor

from orthrus.kernels import fbgemm
from orthrus.kernels.fbgemm import Weights, in_eight, in_half
from orthrus.kernels.recorded import record

pytestmark = pytest.mark.skipif(not fbgemm.can_half(), reason="needs a torch with FBGEMM")

SHAPES = [(96, 72), (33, 71), (5, 513), (130, 1536)]
WIDTHS = (1, 2, 3, 5, 8, 16, 17, 32)


def half(weight: Tensor) -> Weights:
    packed = in_half(weight.bfloat16())
    assert packed is not None
    return packed


def eight(weight: Tensor, largest: int = fbgemm.LARGEST) -> Weights:
    return in_eight(127 * weight.sign().to(torch.int8), torch.ones(len(weight)), largest)


@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_weights_in_16_bits_are_those_of_float32(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape).bfloat16()
    packed = half(weight)
    for width in WIDTHS:
        x = torch.randn(1, width, shape[1])
        torch.testing.assert_close(packed(x), x @ weight.float().T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(packed(x[:, ::2]), x[:, ::2] @ weight.float().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("largest", [fbgemm.LARGEST, 127])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_integers_are_exact(shape: tuple[int, int], largest: int) -> None:
    """The largest too, which saturate where rows have eight bits and there is no VNNI."""
    if not fbgemm.is_exact(largest):
        pytest.skip("no exact products of such integers here")
    packed = eight(torch.randn(shape), largest)
    weight = torch.stack([packed(row) for row in torch.eye(shape[1])[:, None]], -1)[0]
    for most in (3, largest):
        x = torch.randint(-most, most + 1, (32, shape[1])).float()
        x[0], x[1] = most, -most * weight[0].sign()
        expected = (x.long() @ weight.long().T).float()
        for width in WIDTHS:
            assert torch.equal(packed(x[:width]), expected[:width])


@pytest.mark.parametrize("form", [half, eight])
def test_recordings_have_the_same_bits(form: Callable[[Tensor], Weights]) -> None:
    packed = form(torch.randn(40, 72))
    recorded = record(lambda x: packed(x + 1) * 2, (torch.zeros(2, 72),))
    x = torch.randint(-60, 60, (5, 72)).float()
    expected = packed(x + 1) * 2
    assert torch.equal(recorded(x), expected)


def test_packing_leaves_torch_s_engine_as_it_was() -> None:
    before = torch.backends.quantized.engine
    half(torch.randn(4, 8))
    eight(torch.randn(4, 8))
    assert torch.backends.quantized.engine == before


def test_threads_pack_in_turn() -> None:
    """Or the one that ends last would leave the other's engine behind."""
    other = Thread(target=half, args=(torch.randn(4, 8),))
    with fbgemm._engine():
        other.start()
        other.join(0.2)
        assert other.is_alive()
    other.join()
