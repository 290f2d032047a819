"""Int8 layers: integers alone decide what a row gives; models of them decode, copy, save and refuse as they should."""

import copy
import pickle
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import orthrus
from orthrus.checkpoints.integers import to_integers
from orthrus.checkpoints.load import dtype_of, load, put_on, ready
from orthrus.decode.engine import Engine
from orthrus.decode.exact import finding_for
from orthrus.decode.options import Options
from orthrus.errors import ConfigError, OrthrusError, UnsupportedModel
from orthrus.kernels import fbgemm, int8
from orthrus.kernels.int8 import (
    Int8Linear,
    by_onednn,
    in_parts,
    is_exact,
    quantise,
    quantised,
    rounded,
)
from orthrus.kernels.rounded import rounded_to
from orthrus.model.attach import attach, detach
from orthrus.model.fingerprint import identity, key_of, precision_of, quantization_of, twin_tensors
from orthrus.model.twin import require_gradients
from orthrus.policy import steps
from tests.decode.drive import BLOCK, decode, dual
from tests.families import tiny

pytestmark = pytest.mark.skipif(not is_exact(), reason="needs VNNI instructions and oneDNN, or FBGEMM")
FORMS = {
    "oneDNN": ({"by_fbgemm": False, "by_onednn": True}, int8.by_onednn()),
    "FBGEMM": ({"by_fbgemm": True, "by_onednn": False}, fbgemm.is_exact(127)),
    "in two parts": ({"by_fbgemm": False, "by_onednn": False}, fbgemm.is_exact()),
}

PROMPTS = [[5, 6, 7], [*range(30, 43)], [8], [9, 10, 11, 12, 13], [*range(60, 70)]]
PLANS = ("full", "fixed:3", "tree:6", "onepass", "lookup", "auto")
WIDTHS = (1, 2, 3, 5, 8, 16, 17, 32)
ROUNDINGS = pytest.mark.parametrize("rounding", [{}, {"smooth": True}], ids=["plain", "smooth"])


@pytest.fixture(
    autouse=True,
    params=[name for name, (_, works) in FORMS.items() if works],
)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every form that this processor computes exactly."""
    for name, serves in FORMS[request.param][0].items():
        monkeypatch.setattr(int8, name, lambda serves=serves: serves)


def group(*outputs: int, inputs: int = 72, bias: bool = False, smooth: bool = False) -> nn.Module:
    """Int8 layers of one input, multiplied as one."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(inputs, out, bias=bias) for out in outputs))
    factor = torch.rand(inputs) + 0.5 if smooth else None
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    quantise(model, [layers], factors=dict.fromkeys(layers, factor))
    return model


def products(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([layer(x) for layer in model.children()], dim=-1)


def specification(model: nn.Module, x: Tensor) -> Tensor:
    """The slow version: a row's integers by definition, products summed in 64 bits, then scales and bias."""
    parts = []
    for layer in model.children():
        assert isinstance(layer, Int8Linear)
        wide = x.float() if layer.factor is None else x.float() * layer.factor
        most = wide.abs().amax(-1, keepdim=True)
        weight = layer.weight.long().T
        if int8.rounds_inputs():
            row = (wide * torch.tensor(127.0).div(most)).round().nan_to_num(0).long()
            wide = (row @ weight).float() * (layer.scale / 127) * most
        else:
            wide = wide * torch.tensor(64.0).div(most)
            coarse = wide.round()
            both = [part.round().nan_to_num(0).long() @ weight for part in (coarse, (wide - coarse) * 128)]
            coarse, fine = [sums.float() * (layer.scale / 64) for sums in both]
            wide = (coarse + fine / 128) * most
        parts.append(wide if layer.bias is None else wide + layer.bias)
    return torch.cat(parts, dim=-1).to(x.dtype)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [(40,), (48, 24, 24), (130, 130)])
@ROUNDINGS
def test_results_are_the_slow_specification_s_bit_for_bit(
    outputs: tuple[int, ...], bias: bool, dtype: torch.dtype, rounding: dict[str, Any]
) -> None:
    """Alone and as one with neighbours, for every shape of input; rows of zeros too."""
    model = group(*outputs, bias=bias, **rounding)
    for shape in ((1,), (7,), (1, 1), (2, 16)):
        x = torch.randn(*shape, 72, dtype=dtype) * torch.logspace(-3, 3, shape[-1])[:, None].to(dtype)
        x[..., -1, :] = 0 if shape[-1] > 1 else x[..., -1, :]
        found = products(model, x)
        assert found.dtype == dtype
        assert torch.equal(found, specification(model, x))


@pytest.mark.parametrize("inputs", [72, 1536])
@ROUNDINGS
def test_a_row_has_the_same_bits_at_every_width_and_number_of_threads(inputs: int, rounding: dict[str, Any]) -> None:
    """Whoever is multiplied with it, in float32 and from the input on."""
    model, x = group(96, 33, inputs=inputs, **rounding), torch.randn(32, inputs)
    expected = torch.cat([products(model, row[None]) for row in x])
    for count in (1, 2):
        with threads(count):
            for width in WIDTHS:
                assert torch.equal(products(model, x[-width:]), expected[-width:])
                assert torch.equal(products(model, x[:width][None])[0], expected[:width])


def test_a_row_is_rounded_to_the_nearest_of_255_integers() -> None:
    """The largest magnitude is 127, of either sign; nothing is off by more than a half."""
    x = torch.randn(5, 300) * torch.logspace(-30, 30, 5)[:, None]
    row, most = rounded(x)
    assert torch.equal(most, x.abs().amax(-1, keepdim=True))
    wanted = x.double() / most * 127
    assert float((row.double() - 128 - wanted).abs().max()) <= 0.5 + 1e-4
    assert row.min() >= 1


def test_rows_next_to_nothing_are_rounded_as_parts_of_the_least_magnitude() -> None:
    """Below it 127 divided by a magnitude would be infinite."""
    x = torch.tensor([[1e-37, -3e-37, 0.0], [0.0, 0.0, 0.0]])
    row, most = rounded(x)
    found = (row.double() - 128) * most / 127
    assert float((found - x.double()).abs().max()) <= float(most.max()) / 254
    assert float(most.max()) < 2e-36
    assert in_parts(x)[0].isfinite().all()


def test_two_parts_leave_little_of_a_row_out() -> None:
    """A 16,384th of its largest magnitude at most, and no integer is beyond what multiplies exactly."""
    x = torch.randn(5, 300) * torch.logspace(-30, 30, 5)[:, None]
    parts, most = in_parts(x)
    assert parts.abs().max() <= fbgemm.LARGEST
    coarse, fine = parts.round().double() / 64
    assert float(((coarse + fine / 128) * most - x.double()).abs().div(most).max()) <= 1 / 16384 + 1e-6


@ROUNDINGS
def test_what_is_not_finite_stays_so(rounding: dict[str, Any]) -> None:
    """And leaves its neighbours alone."""
    model, x = group(40, **rounding), torch.randn(3, 72)
    expected = products(model, x)
    for bad in (torch.nan, torch.inf):
        x[1, 5] = bad
        found = products(model, x)
        assert not found[1].isfinite().any()
        assert torch.equal(found[::2], expected[::2])


def test_results_are_near_those_of_the_weights() -> None:
    """All rounding together moves random products by about a hundredth."""
    torch.manual_seed(0)
    plain, x = nn.Linear(512, 256), torch.randn(16, 512)
    layer = Int8Linear(plain)
    with torch.inference_mode():
        error = (layer(x) - plain(x)).norm() / plain(x).norm()
    assert 0.002 < error < 0.02
    torch.testing.assert_close(layer.dequantised(), plain.weight.detach(), rtol=0, atol=float(layer.scale.max()) * 0.51)


def in_int8() -> PreTrainedModel:
    """A tiny model with a view, in int8."""
    return ready(dual(), compile=False, pack=None, integers="int8")


def texts(model: PreTrainedModel, plan: str, *, batch: int) -> list[list[int]]:
    engine = Engine(model, rows=batch, capacity=96, plan=steps.parse(plan), exact="token")
    return [row.token_ids for row in decode(engine, PROMPTS, Options(max_new_tokens=6))]


def test_texts_equal_plain_decoding_under_every_plan() -> None:
    """Alone or eight rows at once, exact to the token: not one differs, and drafts were verified."""
    model = in_int8()
    expected = texts(model, "ar", batch=1)
    assert finding_for(model, width=BLOCK).holds
    for plan, batch in zip(PLANS, cycle((1, 8)), strict=False):
        assert texts(model, plan, batch=batch) == expected, (plan, batch)


def test_linear_layers_are_in_int8_and_nothing_else() -> None:
    """Those of the view too. Queries, keys and values are multiplied as one, gate and up too; the rest is float32."""
    model = ready(dual().to(torch.bfloat16), compile=False, pack=None, integers="int8")
    names = {name for name, module in model.named_modules() if type(module) is Int8Linear}
    assert {name.split(".")[-1] for name in names} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
    }
    assert {name.split(".")[-1] for name in names if ".diffusion." in name} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    kept = [p for name, p in model.named_parameters() if name.rpartition(".")[0] not in names]
    assert {p.dtype for p in kept} == {torch.float32}
    layer = model.model.layers[0]
    assert layer.mlp.gate_proj._shared is layer.mlp.up_proj._shared
    for half in (layer.self_attn.ar, layer.self_attn.diffusion):
        assert half.q_proj._shared is half.v_proj._shared
    assert (precision_of(model), quantization_of(model)) == ("int8", "orthrus int8")
    assert key_of(model) != key_of(dual())


def test_no_float_copy_of_the_weights_is_kept() -> None:
    """Those of a layer are let go as it is replaced, but for an embedding that is the head's too."""
    model = dual(tie_word_embeddings=True)
    layer = model.model.layers[0].mlp.up_proj
    quantise(model, [])
    assert layer._parameters == {}
    assert model.get_input_embeddings().weight.is_floating_point()
    assert type(model.lm_head) is Int8Linear


def test_memory_peaks_at_the_weights_and_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """While layers are rounded: float weights that anything still holds, and all integers made so far."""
    model = dual(num_hidden_layers=2).to(torch.bfloat16)
    weights = [weakref.ref(weight) for weight in model.parameters()]
    sizes = [weight.nbytes for weight in model.parameters()]
    made: list[Tensor] = []
    totals: list[int] = []

    def noted(weight: Tensor) -> tuple[Tensor, Tensor]:
        alive = sum(size for ref, size in zip(weights, sizes, strict=True) if ref() is not None)
        made.extend(quantised(weight))
        totals.append(alive + sum(tensor.nbytes for tensor in made))
        return made[-2], made[-1]

    monkeypatch.setattr(int8, "quantised", noted)
    to_integers(model, "int8")
    assert len(totals) == 2 * (7 + 4) + 1
    assert max(totals) <= sum(sizes) + max(sizes)
    assert totals[-1] < totals[0]


def test_copies_compute_alike_and_loaded_weights_are_followed() -> None:
    """Deep copies and pickles; a cast leaves scales as they are; `load_state_dict` is seen."""
    model, x = group(40, 24, bias=True, smooth=True), torch.randn(4, 72)
    expected = products(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).bfloat16().float()):
        torch.testing.assert_close(products(other, x), expected, rtol=0, atol=1e-3)
    assert torch.equal(products(copy.deepcopy(model), x), expected)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["0.weight"].neg_()
    model.load_state_dict(state)
    assert torch.equal(products(model, x), specification(model, x))
    assert not torch.equal(products(model, x), expected)


def test_weights_loaded_in_inference_mode_are_followed_too() -> None:
    """Quantised within inference mode and multiplied, then given other weights outside of it."""
    with torch.inference_mode():
        model, x = group(40, 24, smooth=True), torch.randn(4, 72)
        expected = products(model, x)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["0.weight"].neg_()
    model.load_state_dict(state)
    assert torch.equal(products(model, x)[:, :40], -expected[:, :40])
    assert torch.equal(products(model, x)[:, 40:], expected[:, 40:])


def test_a_detached_backbone_stays_in_int8_and_takes_a_view_again() -> None:
    """It computes what it did; a new view is floating point."""
    model, ids = in_int8(), torch.arange(5)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        detach(model)
        assert torch.equal(model(ids).logits, expected)
    attach(model)
    assert {tensor.dtype for tensor in twin_tensors(model).values()} == {torch.float32}


def test_views_in_floating_point_are_saved_and_load_with_the_plain_backbone(tmp_path: Path) -> None:
    """The view to the bit, the identity of the plain backbone; views in int8 and whole models are refused."""
    plain, model = dual(), in_int8()
    assert identity(model) == identity(plain)
    with pytest.raises(UnsupportedModel, match="view in int8"):
        orthrus.save(model, tmp_path / "view")
    orthrus.save(plain, tmp_path / "plain")
    with pytest.warns(UserWarning, match="orthrus int8"):
        put_on(detach(model), tmp_path / "plain")
    orthrus.save(model, tmp_path / "view")
    backbone = tiny("qwen3")
    with pytest.warns(UserWarning, match="orthrus int8"):
        put_on(backbone, tmp_path / "view")
    for name, tensor in twin_tensors(plain).items():
        assert torch.equal(twin_tensors(backbone)[name], tensor)
    with pytest.raises(UnsupportedModel, match="orthrus int8"):
        orthrus.save(model, tmp_path / "official", format="official")
    with pytest.raises(UnsupportedModel, match=r"int8 are not saved: load the model in floating point$"):
        model.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_training_is_refused() -> None:
    """Gradients do not pass."""
    model = in_int8()
    with pytest.raises(UnsupportedModel, match="gradients"):
        require_gradients(model)
    layer = model.model.layers[0].mlp.up_proj
    with pytest.raises(UnsupportedModel, match="gradients"):
        layer(torch.zeros(1, 48, requires_grad=True))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"compile": True}, "compile"),
        ({"quantization_config": object()}, "quantization_config"),
        ({"device": "meta"}, "CPUs"),
    ],
)
def test_what_does_not_go_with_int8_is_refused_by_name(options: dict[str, Any], match: str) -> None:
    """Before anything is loaded."""
    with pytest.raises(ConfigError, match=match):
        load("nano", dtype="int8", **options)


def test_a_processor_whose_sums_saturate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those without VNNI instructions do, and a torch without oneDNN."""
    monkeypatch.setattr(int8, "by_onednn", by_onednn)
    monkeypatch.setattr(int8, "by_fbgemm", lambda: False)
    monkeypatch.setattr(fbgemm, "is_exact", lambda *_: False)
    by_onednn.cache_clear()
    product = int8._product
    assert product is not None
    try:
        monkeypatch.setattr(int8, "_product", lambda *args: product(*args).clamp(-(2**15), 2**15))
        with pytest.raises(ConfigError, match="VNNI"):
            dtype_of("int8", torch.device("cpu"))
        by_onednn.cache_clear()
        monkeypatch.setattr(int8, "_product", None)
        assert not is_exact()
    finally:
        by_onednn.cache_clear()


def test_layers_do_not_leave_the_cpu() -> None:
    """Moving them is an error, and they stay as they are."""
    model, x = group(40), torch.randn(2, 72)
    expected = products(model, x)
    with pytest.raises(OrthrusError, match="CPUs"):
        model.to("meta")
    assert torch.equal(products(model, x), expected)


def test_nano_loads_in_int8() -> None:
    """By name, and decodes."""
    model, tokenizer = load("nano", dtype="int8")
    assert rounded_to(model) == "int8"
    chat = [{"role": "user", "content": "What is 17 + 5?"}]
    (completion,) = orthrus.generate(model, tokenizer, [chat], mode="ar", max_new_tokens=4)
    assert len(completion.token_ids) == 4
