"""Packed linear layers give what plain ones give, follow their weights, and come and go without a trace."""

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from orthrus.kernels import fbgemm, native, packed, watched
from orthrus.kernels.native import multiplies
from orthrus.kernels.packed import AsIs, Copy, PackedLinear, copy_for, kernels_of, pack, pays, tune, unpack
from orthrus.kernels.recorded import operator
from orthrus.model.attach import attach, detach
from tests.families import tiny


@pytest.fixture(autouse=True)
def everything_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with AVX-512, unless a test says otherwise; whether it has products in 16 bits is the processor's own."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")


def layer(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 32, bias=bias)).to(dtype)


@pytest.mark.parametrize("rows", [(), (1,), (1, 1), (3, 16), (200,)])
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


def test_what_packing_asks_of_torch_is_there() -> None:
    """Private parts of torch 2.13: a version without them is right and slower, and this is where to look."""
    assert packed._product is not None
    assert packed._reorder is not None
    assert watched._holders is not None


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
    model[0].weight.data += 1
    check()
    with torch.inference_mode():
        model[0].weight[0] = 3
    check()
    held = model[0].weight.data[2:]
    for value in (1.0, 2.0):
        held.fill_(value)
        check()
    array = model[0].weight.detach().numpy()
    del held
    for value in (1.0, 2.0):
        array[:] = value
        check()
    del array
    check()
    assert model[0]._shared.copy is not None


def test_weights_that_keep_no_count_are_not_copied() -> None:
    """Inference tensors do not count what is written to them; layers made of them are plain."""
    with torch.inference_mode():
        model = layer()
        pack(model)
        x = torch.randn(4, 48)
        model(x)
        model[0].weight.fill_(1)
        assert torch.equal(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))


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
    assert kernels_of(model) == {AsIs()}
    assert [type(m) for m in model] == [PackedLinear, Own]
    with torch.inference_mode():
        model(torch.randn(2, 4))
    unpack(model)
    assert not kernels_of(model)
    assert [type(m) for m in model] == [nn.Linear, Own]
    assert not [name for name in vars(model[0]) if "copy" in name]


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


def processor(patch: pytest.MonkeyPatch, *, vectors: str, halves: bool, reads: bool = False) -> None:
    """Pretend to be another: with these vector instructions, with products in 16 bits or FBGEMM, or neither."""
    patch.setattr(fbgemm, "can_half", lambda: reads)
    patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        patch.setattr(torch.ops.mkldnn, name, lambda: halves)


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("vectors", "halves", "reads", "dtype", "small", "large"),
    [
        ("AVX512", True, False, F32, Copy(F32, "oneDNN"), Copy(F32, "oneDNN")),
        ("AVX512", True, False, BF16, Copy(BF16, "oneDNN"), Copy(BF16, "oneDNN")),
        ("AVX512", True, False, F16, Copy(F16, "oneDNN"), Copy(F16, "oneDNN")),
        ("AVX512", False, False, BF16, Copy(F32, "oneDNN"), Copy(F32, "oneDNN")),
        ("AVX2", False, False, F32, None, Copy(F32, "oneDNN")),
        ("AVX2", False, False, BF16, Copy(F32, "torch"), Copy(F32, "oneDNN")),
        ("AVX2", False, False, F16, Copy(F32, "torch"), Copy(F32, "oneDNN")),
        ("AVX2", True, False, BF16, None, Copy(BF16, "oneDNN")),
        ("AVX2", False, True, BF16, Copy(F16, "FBGEMM"), Copy(F16, "FBGEMM")),
        ("AVX2", False, True, F16, Copy(F16, "FBGEMM"), Copy(F16, "FBGEMM")),
        ("AVX2", False, True, F32, None, Copy(F32, "oneDNN")),
        ("AVX512", True, True, BF16, Copy(BF16, "oneDNN"), Copy(BF16, "oneDNN")),
    ],
)
def test_the_copy_is_what_the_processor_reads_best(
    monkeypatch: pytest.MonkeyPatch,
    vectors: str,
    halves: bool,
    reads: bool,
    dtype: torch.dtype,
    small: Copy | None,
    large: Copy | None,
) -> None:
    """In float16 or float32 where it cannot multiply in 16 bits; packed with AVX-512, or where there is much to do."""
    processor(monkeypatch, vectors=vectors, halves=halves, reads=reads)
    assert copy_for(torch.empty(1024, 511, dtype=dtype)) == small
    assert copy_for(torch.empty(1024, 512, dtype=dtype)) == large
    assert pays(layer(dtype)) is (small is not None)


@pytest.mark.parametrize("vectors", ["AVX512", "AVX2"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_16_bit_products_they_are_made_in_float32(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bias: bool, vectors: str
) -> None:
    """And rounded once, for several rows; one row is multiplied as it is."""
    processor(monkeypatch, vectors=vectors, halves=False)
    model = layer(dtype, bias=bias)
    weights = [None if w is None else w.detach().clone() for w in (model[0].weight, model[0].bias)]
    pack(model)
    multiply, widths = packed._multiply, []

    def watched(input: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
        widths.append(input.numel() // 48)
        return multiply(input, *others)

    monkeypatch.setattr(packed, "_multiply", watched)
    for rows in ((2,), (1, 16), (1,), (1, 1)):
        x = torch.randn(*rows, 48, dtype=dtype)
        wide = nn.functional.linear(x.float(), *[None if w is None else w.float() for w in weights])
        with torch.inference_mode():
            found = model(x)
        assert found.dtype == dtype
        if x.numel() == 48:
            assert torch.equal(found, nn.functional.linear(x, *weights))
        elif vectors == "AVX2":
            assert torch.equal(found, wide.to(dtype))
        else:
            torch.testing.assert_close(found.float(), wide, rtol=2**-7, atol=1e-5)
    assert widths == [2, 16]


@pytest.mark.skipif(not fbgemm.can_half(), reason="needs a torch with FBGEMM")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_16_bit_products_weights_are_read_in_16_bits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bias: bool
) -> None:
    """For one row too; products are those of float32, rounded once."""
    processor(monkeypatch, vectors="AVX2", halves=False, reads=True)
    model = layer(dtype, bias=bias)
    wide = copy.deepcopy(model).float()
    pack(model)
    for rows in ((2,), (1, 16), (1,), (1, 1), (3, 2), ()):
        x = torch.randn(*rows, 48, dtype=dtype)
        with torch.inference_mode():
            found, expected = model(x), wide(x.float())
        assert model[0]._shared.copy.itemsize == 2
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=1e-5)


@pytest.mark.skipif(not fbgemm.can_half(), reason="needs a torch with FBGEMM")
@pytest.mark.parametrize(("vectors", "laid_out"), [("AVX2", False), ("AVX512", True)])
@pytest.mark.parametrize("value", [1e6, 1e-7, torch.inf])
def test_weights_beyond_float16_are_copied_in_float32(
    monkeypatch: pytest.MonkeyPatch, value: float, vectors: str, laid_out: bool
) -> None:
    """Too large for it, or a row of numbers too small; laid out for oneDNN where that reads float32 faster."""
    processor(monkeypatch, vectors=vectors, halves=False, reads=True)
    model = layer(torch.bfloat16, bias=False)
    model[0].weight.data[3] = value
    wide = copy.deepcopy(model).float()
    pack(model)
    x = torch.rand(4, 48, dtype=torch.bfloat16)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), wide(x.float()).to(torch.bfloat16))
    assert model[0]._shared.copy.itemsize == 4
    assert model[0]._shared.copy.is_mkldnn is laid_out


class Stopwatch:
    """Stands still but for products: by the copy and by the weights, of one row and of several, as long as it says."""

    def __init__(self, patch: pytest.MonkeyPatch, **seconds: int) -> None:
        self.now, self.products = 0, 0
        multiply, plain = packed._multiply, packed.linear

        def counted(name: str, product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            def of(input: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
                self.products += 1
                self.now += seconds[f"{name}_{'one' if input.numel() == input.shape[-1] else 'several'}"]
                return product(input, *others)

            return of

        patch.setattr(packed, "_tuned", {})
        patch.setattr(packed, "_multiply", counted("copy", multiply))
        patch.setattr(packed, "linear", counted("weights", plain))

    def __call__(self) -> float:
        return self.now


@pytest.mark.skipif(packed._product is None, reason="needs a torch with oneDNN")
@pytest.mark.parametrize(
    ("one", "several", "expected"),
    [
        (16, 16, set()),
        (16, 20, {AsIs(one=True)}),
        (20, 16, {AsIs(several=True)}),
        (18, 18, {AsIs()}),
        (40, 40, {AsIs()}),
    ],
)
def test_what_is_clearly_faster_is_taken(
    monkeypatch: pytest.MonkeyPatch, one: int, several: int, expected: set[AsIs]
) -> None:
    """The weights themselves where they take less than nine tenths of the copies' time; no copies if never used."""
    clock = Stopwatch(monkeypatch, copy_one=20, copy_several=20, weights_one=one, weights_several=several)
    model = layer()
    pack(model)
    tune(model, clock=clock)
    assert kernels_of(model) == expected
    chosen = next(iter(expected), AsIs(one=True, several=True))
    for rows, as_is in ((1, chosen.one), (5, chosen.several)):
        x, before = torch.randn(rows, 48), clock.now
        with torch.inference_mode():
            found = model(x)
        assert torch.equal(found, nn.functional.linear(x, model[0].weight, model[0].bias)) or not as_is
        if expected:
            assert clock.now - before == ((one if rows == 1 else several) if as_is else 20)


@pytest.mark.skipif(packed._product is None, reason="needs a torch with oneDNN")
def test_models_of_the_same_shapes_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that two loaded alike compute alike, whatever the moment; other shapes and threads are measured anew."""
    clock = Stopwatch(monkeypatch, copy_one=2, copy_several=2, weights_one=1, weights_several=4)
    first, second, other = layer(), layer(), nn.Sequential(nn.Linear(16, 32))
    for model in (first, second, other):
        pack(model)
    tune(first, clock=clock)
    measured = clock.products
    tune(second, clock=clock)
    assert clock.products == measured > 0
    assert kernels_of(second) == {AsIs(one=True)}
    tune(other, clock=clock)
    assert clock.products > measured
    unpacked = layer()
    tune(unpacked, clock=clock)
    assert not kernels_of(unpacked)


@pytest.mark.skipif(packed._product is None, reason="needs a torch with oneDNN")
def test_a_slow_machine_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way of each number of rows is tried once after the copies are made, where that takes seconds."""
    clock = Stopwatch(monkeypatch, copy_one=9, copy_several=9, weights_one=8, weights_several=7)
    model = layer()
    pack(model)
    tune(model, clock=clock)
    assert clock.now == 2 * (9 + 9 + 8 + 7)
    assert not kernels_of(model)


def test_where_no_copy_helps_layers_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other precisions, other devices, small products below AVX-512, a torch without oneDNN."""

    def check(model: nn.Sequential) -> None:
        x = torch.randn(4, 48, dtype=model[0].weight.dtype)
        expected = model(x)
        assert not pays(model)
        pack(model)
        with torch.inference_mode():
            assert torch.equal(model(x), expected)

    check(layer(torch.float64))
    assert not pays(layer().to("meta"))
    with monkeypatch.context() as patch:
        processor(patch, vectors="AVX2", halves=False)
        check(layer())
    for missing in ("_product", "_reorder"):
        with monkeypatch.context() as patch:
            processor(patch, vectors="AVX512", halves=False)
            assert pays(layer())
            patch.setattr(packed, missing, None)
            check(layer())
            assert copy_for(layer(torch.bfloat16)[0].weight) == Copy(torch.float32, "torch")
    assert operator("mkldnn", "_no_such_operator") is None
    assert not multiplies(torch.float64)


@pytest.mark.parametrize(
    ("abilities", "flags", "expected"),
    [
        ({"amx_tile": True}, "", True),
        ({"amx_tile": False}, "amx_tile", False),
        ({}, "fma amx_tile", True),
        ({}, "", False),
    ],
)
def test_tiles_are_known_by_flags_where_torch_does_not_tell(
    monkeypatch: pytest.MonkeyPatch, abilities: dict[str, bool], flags: str, expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities, raising=False)
    monkeypatch.setattr(native, "processor", lambda: {"flags": flags})
    assert native.has_tiles() is expected


def test_packing_waits_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that would take more than half of the free memory is not made by itself, whatever it is a copy of."""
    processor(monkeypatch, vectors="AVX512", halves=False)
    size = 4 * layer()[0].weight.numel()
    for free, expected in ((2 * size, False), (2 * size + 2, True)):
        monkeypatch.setattr(packed.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert pays(layer()) is pays(layer(torch.bfloat16)) is expected


@pytest.mark.skipif(packed._product is None, reason="needs a torch with oneDNN")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_read_the_same_input_have_one_product(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bias: bool
) -> None:
    """Whichever is called first with an input makes all, and a change of any weight is met."""
    own = {"halves": multiplies(torch.bfloat16), "reads": fbgemm.can_half()}
    processor(monkeypatch, vectors="AVX512", **own)
    layers = nn.ModuleList(nn.Linear(48, size, bias=bias, dtype=dtype) for size in (32, 16, 16)).requires_grad_(False)
    alone = copy.deepcopy(layers)
    pack(alone)
    pack(layers, [list(layers)])
    multiply, calls = packed._multiply, []
    monkeypatch.setattr(packed, "_multiply", lambda *args: calls.append(1) or multiply(*args))
    with torch.inference_mode():
        for change in (None, 0, 1, 2):
            if change is not None:
                for each in (layers, alone):
                    each[change].weight.data.mul_(2)
            for rows in ((1, 1), (3, 5)):
                x = torch.randn(*rows, 48, dtype=dtype)
                calls.clear()
                found = [layer(x) for layer in layers]
                assert len(calls) == 1
                for own, layer in zip(found, alone, strict=True):
                    torch.testing.assert_close(own, layer(x))
        torch.testing.assert_close(layers[1](x * 2), alone[1](x * 2))
