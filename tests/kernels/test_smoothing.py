"""How inputs are rounded: channels are evened where that helps, as a pass is observed to need it."""

import pytest
import torch
from torch import Tensor, nn

from orthrus.kernels.int8 import Int8Linear, rounds_inputs
from orthrus.kernels.smoothing import factor_for, observed


def error(layer: nn.Linear, factor: Tensor | None, x: Tensor) -> float:
    """How far a rounded layer is off, relative to what it gives."""
    with torch.inference_mode():
        return float((Int8Linear(layer, factor)(x) - layer(x)).norm() / layer(x).norm())


@pytest.mark.skipif(not rounds_inputs(), reason="inputs are taken in two parts here, which need no factors")
def test_channels_that_are_always_large_are_divided() -> None:
    """Which leaves less than half of the error, on rows that were not observed."""
    torch.manual_seed(0)
    layer, size = nn.Linear(256, 64, bias=False), torch.ones(256)
    size[::50] = 20.0
    factor = factor_for(torch.randn(64, 256) * size, [layer.weight])
    assert factor is not None
    assert factor[0] < factor[1] / 3
    x = torch.randn(64, 256) * size
    assert error(layer, factor, x) < error(layer, None, x) / 2


def test_rows_with_large_elements_anywhere_are_rounded_as_they_come() -> None:
    """No factor evens them."""
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 64, bias=False), torch.randn(64, 256)
    x[torch.arange(64), torch.randint(256, (64,))] = 60.0
    assert factor_for(x, [layer.weight]) is None


def test_a_channel_that_was_silent_is_not_blown_up() -> None:
    """Nor do rows of zeros or rows that are not finite count; without others inputs are rounded plainly."""
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 8), torch.randn(16, 64)
    x[:, 3] = 0
    factor = factor_for(x, [layer.weight])
    assert factor is not None
    assert factor[3] < 12 * factor.median()
    worse = torch.cat([x, torch.zeros(1, 64), torch.full((1, 64), torch.inf)])
    again = factor_for(worse, [layer.weight])
    assert again is not None
    assert torch.equal(again, factor)
    assert factor_for(torch.zeros(2, 64), [layer.weight]) is None


def test_layers_of_one_input_round_it_alike_and_those_not_called_are_left_out() -> None:
    """By the weights of all; the pass sees one thread, and no hook stays."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(16, 8), nn.Linear(16, 24), nn.Linear(16, 4), nn.Linear(16, 4)])
    first, second, other, idle = model
    x, threads = torch.randn(1, 5, 16), []

    def run() -> None:
        threads.append(torch.get_num_threads())
        for layer in (first, second, other):
            layer(x)

    found = observed(model, [[first, second]], run)
    assert found[first] is found[second]
    assert idle not in found
    assert threads == [1]
    assert not any(layer._forward_pre_hooks for layer in model)
    expected = factor_for(x, [first.weight, second.weight])
    assert expected is not None
    assert torch.equal(found[first], expected)
    assert not torch.equal(found[other], expected)
