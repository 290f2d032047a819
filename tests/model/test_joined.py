"""Passes over rows of both views, through one attention module: the same results as through two."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import orthrus
from orthrus.decode.passes import Passes, Proposal
from orthrus.model.attach import duals
from orthrus.model.cache import ScratchCache
from orthrus.model.dual import DualAttention
from tests.decode.drive import dual
from tests.families import FAMILIES, tiny

ROWS = slice(0, 2)
SINKS = ("gpt_oss",)


def drafted(passes: Passes) -> Proposal:
    with torch.inference_mode():
        return passes.draft(ROWS, torch.tensor([7, 8]), 4)


def passes_of(family: str) -> Passes:
    return read(dual(family))


def read(model: PreTrainedModel) -> Passes:
    """Passes behind two texts."""
    passes = Passes(model, ScratchCache(rows=2, capacity=48))
    with torch.inference_mode():
        passes.prefill(ROWS, [[5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21]], chunk=64)
    return passes


@pytest.mark.parametrize("family", FAMILIES)
def test_one_call_gives_what_two_give(family: str) -> None:
    """Wherever rows lie inside a module: before heads or behind. One with weights of its own takes two calls."""
    passes = passes_of(family)
    joined = [layer.joined is not None for layer in duals(passes.model)]
    assert joined == [family not in SINKS] * len(joined)
    made = drafted(passes)
    for layer in duals(passes.model):
        layer.joined = None
    apart = drafted(passes)
    torch.testing.assert_close(made.logits_BMV, apart.logits_BMV, rtol=0, atol=2e-5)
    torch.testing.assert_close(made.first_B1V, apart.first_B1V, rtol=0, atol=2e-5)


def test_a_layer_that_takes_anothers_place_is_called() -> None:
    """As adapters and int8 layers do, in the original or in the twin."""
    passes = passes_of("qwen3")
    before = drafted(passes)
    calls: list[int] = []

    class Counted(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            calls.append(input.shape[1])
            return super().forward(input)

    layer = duals(passes.model)[0]
    for half in (layer.ar, layer.diffusion):
        assert half is not None
        half.q_proj.__class__ = Counted
        half.q_proj = copy.copy(half.q_proj)
    assert torch.equal(drafted(passes).logits_BMV, before.logits_BMV)
    assert calls == [1, 6], "the anchor; the anchor again, four masks and one that predicts nothing"


class Adapter(nn.Module):
    """A layer in a layer, as adapters are: what it does depends on how it is set."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.scale = base, 1.0

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self.scale * self.base(input)
        return out


class Positioned(nn.Module):
    """A layer that takes more than its input."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, input: Tensor, by: float = 2.0) -> Tensor:
        out: Tensor = by * self.base(input)
        return out


def another_forward(layer: DualAttention, half: str) -> None:
    module = getattr(layer, half)
    plain = module.forward
    module.forward = lambda *args, **kwargs: (2 * (out := plain(*args, **kwargs))[0], *out[1:])


def another_module(layer: DualAttention, half: str) -> None:
    module = copy.deepcopy(getattr(layer, half))
    with torch.no_grad():
        module.o_proj.weight.mul_(2.0)
    setattr(layer, half, module)


@pytest.mark.parametrize("change", [another_forward, another_module])
@pytest.mark.parametrize("half", ["ar", "diffusion"])
def test_a_forward_or_a_module_that_is_replaced_is_followed(
    half: str, change: Callable[[DualAttention, str], None]
) -> None:
    """While an engine decodes, in the original or in the twin: what was joined held the former ones."""
    passes = passes_of("qwen3")
    before = drafted(passes)
    change(duals(passes.model)[0], half)
    after = drafted(passes)
    assert before.first_B1V is not None
    assert after.first_B1V is not None
    assert torch.allclose(after.first_B1V, before.first_B1V, atol=1e-4) == (half == "diffusion")
    assert torch.allclose(after.logits_BMV, before.logits_BMV, atol=1e-4) == (half == "ar")


def test_an_adapter_that_is_set_otherwise_is_followed() -> None:
    """As by `disable_adapters`, after passes were made: the backbone's token is that of a pass of its own."""
    model = tiny("qwen3")
    adapters = [Adapter(layer.self_attn.v_proj) for layer in model.model.layers]
    for layer, adapter in zip(model.model.layers, adapters, strict=True):
        layer.self_attn.v_proj = adapter
    passes = read(orthrus.attach(model, attn_implementation="orthrus"))
    assert all(layer.joined is not None for layer in duals(model))
    for scale in (1.0, 3.0):
        for adapter in adapters:
            adapter.scale = scale
        with torch.inference_mode():
            alone = passes.verify(ROWS, torch.tensor([[7], [8]]))
        torch.testing.assert_close(drafted(passes).first_B1V, alone, rtol=0, atol=2e-5)


def test_layers_that_take_more_than_their_input_are_called_in_turn() -> None:
    model = tiny("qwen3")
    attention = model.model.layers[0].self_attn
    attention.q_proj = Positioned(attention.q_proj)
    attention.q_proj.register_forward_pre_hook(lambda _, args: (*args, 3.0))
    passes = read(orthrus.attach(model, attn_implementation="orthrus"))
    assert [layer.joined is None for layer in duals(model)][:2] == [True, False]
    drafted(passes)


def test_copies_join_their_own_layers() -> None:
    model = passes_of("qwen3").model
    other = copy.deepcopy(model)
    assert all(layer.joined is None for layer in duals(other))
    with torch.no_grad():
        for parameter in duals(other)[0].ar.parameters():
            parameter.zero_()
    Passes(other, ScratchCache(rows=1, capacity=16))
    assert all(layer.joined is not None for layer in duals(other))
