"""Packed linear layers give what plain ones give, follow their weights, and come and go without a trace."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from orthrus.model import packed
from orthrus.model.attach import attach, detach
from orthrus.model.packed import PackedLinear, is_packed, pack, pays, unpack
from tests.families import tiny


def layer(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 32, bias=bias)).to(dtype)


@pytest.mark.parametrize("rows", [(1,), (1, 1), (3, 16), (200,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_results_are_those_of_plain_layers(
    dtype: torch.dtype, within: float, bias: bool, rows: tuple[int, ...]
) -> None:
    """For any number of rows, with and without a bias, up to rounding."""
    model = layer(dtype, bias=bias)
    x = torch.randn(*rows, 48, dtype=dtype)
    expected = model(x)
    pack(model)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected, rtol=0, atol=within)


def test_changed_weights_are_packed_again() -> None:
    """In place, loaded, or replaced: the next product is by the new weights."""
    model, x = layer(), torch.randn(4, 48)
    pack(model)

    def check() -> None:
        with torch.inference_mode():
            own = nn.functional.linear(x, model[0].weight, model[0].bias)
            torch.testing.assert_close(model(x), own, rtol=0, atol=1e-5)

    check()
    with torch.no_grad():
        model[0].weight.mul_(2)
    check()
    model.load_state_dict({"0.weight": torch.randn(32, 48), "0.bias": torch.zeros(32)})
    check()
    model[0].weight.data = torch.randn(32, 48)
    check()


def test_gradients_are_those_of_plain_layers() -> None:
    """Where gradients are wanted a packed layer is a plain one."""
    model, x = layer(), torch.randn(4, 48)
    expected = torch.autograd.grad(model(x).sum(), model.parameters())
    pack(model)
    for found, wanted in zip(torch.autograd.grad(model(x).sum(), model.parameters()), expected, strict=True):
        assert torch.equal(found, wanted)


def test_copies_pack_for_themselves() -> None:
    """A copied or pickled layer multiplies by its own weights, whatever becomes of the first."""
    model, x = layer(), torch.randn(4, 48)
    pack(model)
    with torch.inference_mode():
        before = model(x)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        model[0].weight.zero_()
    with torch.inference_mode():
        for other in copies:
            torch.testing.assert_close(other(x), before, rtol=0, atol=0)


def test_unpacking_leaves_plain_layers() -> None:
    """Classes and attributes are what they were; subclasses of linear layers are never touched."""

    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4))
    pack(model)
    assert is_packed(model)
    assert [type(m) for m in model] == [PackedLinear, Own]
    with torch.inference_mode():
        model(torch.randn(2, 4))
    unpack(model)
    assert not is_packed(model)
    assert [type(m) for m in model] == [nn.Linear, Own]
    assert not [name for name in vars(model[0]) if "packed" in name]


def test_detaching_a_view_unpacks() -> None:
    """What remains after `detach` is the backbone as it was, bit for bit."""
    model, ids = tiny("qwen3"), torch.arange(5)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        attach(model)
        pack(model)
        model(ids)
        detach(model)
        assert torch.equal(model(ids).logits, expected)


def test_what_cannot_be_packed_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other precisions, a processor without bfloat16, a torch without oneDNN: plain products, and nothing to gain."""

    def check(model: nn.Sequential) -> None:
        x = torch.randn(4, 48, dtype=model[0].weight.dtype)
        expected = model(x)
        assert not pays(model)
        pack(model)
        with torch.inference_mode():
            assert torch.equal(model(x), expected)

    check(layer(torch.float16))
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        check(layer(torch.bfloat16))
        assert pays(layer(torch.float32))
    for missing in ("_product", "_reorder"):
        with monkeypatch.context() as patch:
            patch.setattr(packed, missing, None)
            check(layer())
    assert packed._operator("_no_such_operator") is None


def test_packing_waits_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that would take more than half of the free memory is not made by itself."""
    size = layer()[0].weight.nbytes
    for free, expected in ((2 * size, False), (2 * size + 2, True)):
        monkeypatch.setattr(packed.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert pays(layer()) is expected
