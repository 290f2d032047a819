"""Layers in blocks: the operator has a slow specification's bits; models of them decode and refuse as they should."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import orthrus
from orthrus.checkpoints.integers import to_integers
from orthrus.checkpoints.load import load, ready
from orthrus.decode.exact import finding_for
from orthrus.errors import ConfigError, UnsupportedModel
from orthrus.kernels import compiled, int8
from orthrus.kernels.blocks import BlockLinear, Blocks, fits, packed, quantised, unpacked
from orthrus.kernels.compiled import instructions
from orthrus.kernels.int8 import Int8Linear
from orthrus.kernels.recorded import record
from orthrus.kernels.rounded import replace
from orthrus.model.attach import attach, detach
from orthrus.model.fingerprint import precision_of
from orthrus.zoo import WEIGHTS, weights_in
from tests.decode.drive import BLOCK, dual
from tests.kernels.conftest import Operator
from tests.kernels.test_int8 import WIDTHS, texts, threads

pytestmark = pytest.mark.skipif(
    instructions() is None or not compiled._compiler(), reason="needs Linux on an x86 CPU, and a compiler"
)
BITS = pytest.mark.parametrize("bits", [4, 8])


@pytest.fixture(scope="session")
def own(own: tuple[str, Operator]) -> Operator:
    """The operator, compiled for a set of instructions that this CPU has."""
    found: Operator = getattr(torch.ops.orthrus, f"linear_blocks_{own[0]}").default
    return found


@pytest.fixture
def use(own: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let layers have the operator."""
    monkeypatch.setattr(compiled, "required", lambda *_, **__: own)


def specification(x: Tensor, weight: Blocks, bias: Tensor | None) -> Tensor:
    """The slow version: a row's integers by definition, a block's products in 64 bits, then block after block."""
    wide = x.float().unflatten(-1, (-1, 32))
    most = wide.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny * 127)
    row = (wide * torch.tensor(127.0).div(most)[..., None]).round()
    scale, code = most / 127, weight.code.long() - (128 if weight.least is None else 0)
    total = row.sum(-1) * scale
    out = torch.zeros(len(x), len(code))
    for b in range(wide.shape[1]):
        sums = (row[:, b].nan_to_num(0).long() @ code[:, b].T).float()
        out = out + sums * (weight.scale[:, b].float() * scale[:, b, None])
        if weight.least is not None:
            out = out + weight.least[:, b].float() * total[:, b, None]
    return out if bias is None else out + bias


@BITS
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 32), (40, 96), (100, 576)])
def test_results_are_the_slow_specification_s_bit_for_bit(own: Operator, outputs: int, inputs: int, bits: int) -> None:
    """At every width, with one thread and two; rows of zeros, tiny ones and such as are not finite too."""
    weight, bias = quantised(torch.randn(outputs, inputs), bits), torch.randn(outputs)
    weight.code[0] = weight.code.max()
    x = torch.randn(37, inputs) * torch.logspace(-3, 3, 37)[:, None]
    x[3], x[4, 0], x[5, 1] = 0, torch.inf, torch.nan
    x[6] *= 1e-36
    x[7] = 1
    finite = x.isfinite().all(-1)
    for b in (None, bias):
        expected = specification(x, weight, b)
        for count in (1, 2):
            with threads(count):
                for width in (*WIDTHS, 37):
                    found = own(x[:width], packed(weight), outputs, b)
                    assert torch.equal(found[finite[:width]], expected[:width][finite[:width]])
                    assert not found[~finite[:width]].isfinite().any()
    assert own(x[:0], packed(weight), outputs, None).shape == (0, outputs)


@BITS
def test_what_does_not_belong_together_is_refused(own: Operator, bits: int) -> None:
    weight = packed(quantised(torch.randn(16, 64), bits))
    for x, tensor, outputs, bias, match in (
        (torch.ones(1, 32), weight, 16, None, "64 wide"),
        (torch.ones(1, 64).double(), weight, 16, None, "float32"),
        (torch.ones(1, 64), weight, 17, None, "weight must be"),
        (torch.ones(1, 64), weight[..., 1:], 16, None, "bytes"),
        (torch.ones(1, 64), weight[0], 16, None, "blocks"),
        (torch.ones(1, 64), weight, 16, torch.ones(15), "bias must be"),
    ):
        with pytest.raises(RuntimeError, match=match):
            own(x, tensor, outputs, bias)


@BITS
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (40, 96)])
def test_blocks_are_packed_and_unpacked(outputs: int, inputs: int, bits: int) -> None:
    made = quantised(torch.randn(outputs, inputs), bits)
    for found, given in zip(unpacked(packed(made), outputs), made, strict=True):
        assert (found is None and given is None) or torch.equal(found, given)


@BITS
def test_numbers_of_blocks_are_rounded_to_these_blocks(bits: int) -> None:
    """Blocks that are all alike too; numbers are off by half a step at most, and by what float16 leaves of it."""
    weight = torch.randn(20, 96) * torch.logspace(-4, 2, 20)[:, None]
    weight[0, :32], weight[1] = 0, 0.3
    made = quantised(weight, bits)
    again = quantised(made.numbers(), bits)
    assert torch.equal(again.numbers(), made.numbers())
    step = made.scale.float().repeat_interleave(32, -1)
    # Scales and least numbers are off by half of float16's least step, and each code by as many of them.
    unit, codes = 2.0**-25, 128 if bits == 8 else 16
    assert ((made.numbers() - weight).abs() <= 0.51 * step + weight.abs() * 2e-3 + codes * unit).all()


@pytest.mark.skipif(weights_in(WEIGHTS["smollm2"]) is None, reason="needs the weights of smollm2")
def test_the_blocks_of_the_bundled_file_come_back() -> None:
    """Codes, scales and least numbers of Q4_1, codes and scales of Q8_0, from the numbers that they stand for."""
    from gguf import GGMLQuantizationType, GGUFReader, dequantize

    file = weights_in(WEIGHTS["smollm2"])
    assert file is not None
    met = set()
    for tensor in GGUFReader(file).tensors:
        kind = tensor.tensor_type
        if kind not in (GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0):
            continue
        met.add(kind.name)
        raw = torch.from_numpy(tensor.data[:512].copy())
        made = quantised(torch.from_numpy(dequantize(tensor.data[:512], kind)), 4 if kind.name == "Q4_1" else 8)
        if kind.name == "Q4_1":
            block = raw.view(len(raw), -1, 20)
            code = torch.cat([block[..., 4:] & 15, block[..., 4:] >> 4], -1)
            halves = block[..., :4].contiguous().view(torch.float16)
            assert made.least is not None
            assert torch.equal(made.least, halves[..., 1]), tensor.name
        else:
            block = raw.view(len(raw), -1, 34)
            code = (block[..., 2:].view(torch.int8).int() + 128).to(torch.uint8)
            halves = block[..., :2].contiguous().view(torch.float16)
        assert torch.equal(made.scale, halves[..., 0]), tensor.name
        assert torch.equal(made.code, code), tensor.name
    assert met == {"Q4_1", "Q8_0"}


def group(*outputs: int, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(96, out, bias=bias) for out in outputs))
    replace(model, [[*model]], lambda layer: BlockLinear(layer, 4))  # type: ignore[list-item]
    return model


def products(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([layer(x) for layer in model.children()], dim=-1)


@pytest.mark.usefixtures("use")
@pytest.mark.parametrize("outputs", [(48, 32, 25), (40, 24), (7,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_one_input_are_multiplied_as_one(outputs: tuple[int, ...], dtype: torch.dtype) -> None:
    """With weights one behind another; what is loaded is taken, and copies stand by themselves."""
    model, x = group(*outputs), torch.randn(2, 3, 96).to(dtype)
    layers = [layer for layer in model if isinstance(layer, BlockLinear)]
    parts = [unpacked(layer.weight, layer.out_features) for layer in layers]
    expected = torch.cat([specification(x.flatten(0, 1), p, la.bias) for p, la in zip(parts, layers, strict=True)], -1)
    expected = expected.unflatten(0, (2, 3)).to(dtype)
    assert torch.equal(products(model, x), expected)
    joined = len({layer._shared for layer in layers}) == 1
    assert joined == (outputs != (40, 24))
    if joined:
        assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 1
    assert torch.equal(products(copy.deepcopy(model), x), expected)
    assert torch.equal(products(model.float(), x), expected)
    recorded = record(lambda x: products(model, x), (torch.zeros(2, 2, 96, dtype=dtype),))
    assert torch.equal(recorded(x), expected)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict(zeros)
    assert not products(model, x).any()


@pytest.fixture
def model(use: None) -> PreTrainedModel:
    return ready(dual(hidden_size=64, intermediate_size=96, head_dim=16), compile=False, pack=None, integers="int4")


def test_models_have_four_bits_and_eight_in_head_and_view(model: nn.Module) -> None:
    assert precision_of(model) == "int4"
    bits = {
        name: "int8" if isinstance(module, Int8Linear) else {320: 4, 544: 8}[module.weight.shape[-1]]
        for name, module in model.named_modules()
        if isinstance(module, BlockLinear | Int8Linear)
    }
    assert bits["lm_head"] == 8
    assert {kind for name, kind in bits.items() if ".diffusion." in name} == {8}
    assert {kind for name, kind in bits.items() if ".mlp." in name or ".ar." in name} == {4}, bits


def test_weights_stay_where_they_are_once_a_model_is_loaded(model: PreTrainedModel) -> None:
    """Recordings take weights that move for others."""
    before = [parameter.data_ptr() for parameter in model.parameters()]
    texts(model, "full", batch=1)
    assert [parameter.data_ptr() for parameter in model.parameters()] == before


def test_drafted_texts_equal_plain_ones_alone_and_in_batches(model: PreTrainedModel) -> None:
    expected = texts(model, "ar", batch=1)
    assert finding_for(model, width=BLOCK).holds
    for plan in ("full", "tree:6", "onepass", "auto"):
        for batch in (1, 8):
            assert texts(model, plan, batch=batch) == expected, (plan, batch)


def test_layers_whose_inputs_do_not_come_in_blocks_are_in_int8(use: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In floating point where int8 does not compute."""
    for exact_here, kind in ((True, Int8Linear), (False, nn.Linear)):
        monkeypatch.setattr(int8, "is_exact", lambda exact_here=exact_here: exact_here)
        model = dual(hidden_size=48, intermediate_size=96)
        to_integers(model, "int4")
        assert type(model.model.layers[0].mlp.up_proj) is kind
        assert type(model.model.layers[0].mlp.down_proj) is BlockLinear


@pytest.mark.parametrize("weight", [65_505.0 * 15, -65_536.0, 65_504.0])
def test_layers_whose_blocks_leave_float16_s_range_are_in_int8(use: None, weight: float) -> None:
    """Their scales or least numbers would be infinite."""
    model = dual()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[1, 2] = weight
    to_integers(model, "int4")
    layer = model.model.layers[0].mlp.down_proj
    assert type(layer) is (BlockLinear if abs(weight) <= 65_504 else Int8Linear)
    assert bool(layer.dequantised().isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_no_numbers_and_layers_without_any_do_not_fit(dtype: torch.dtype) -> None:
    layer = nn.Linear(64, 3, dtype=dtype).requires_grad_(False)
    assert fits(layer)
    layer.weight[1, 2] = torch.nan
    assert not fits(layer)
    assert not fits(nn.Linear(64, 0, dtype=dtype))


def test_a_view_attached_later_is_of_the_dequantised_attention(use: None) -> None:
    """And a view in int4, or a whole model, is not saved; training is refused."""
    model = ready(dual(hidden_size=64, intermediate_size=96, head_dim=16), compile=False, pack=None, integers="int4")
    with pytest.raises(UnsupportedModel, match="view in int4"):
        orthrus.save(model, "nowhere")
    with pytest.raises(UnsupportedModel, match="int4 are not saved"):
        model.save_pretrained("nowhere")
    with pytest.raises(UnsupportedModel, match="int4 layers pass no gradients"):
        model.lm_head(torch.zeros(1, 64, requires_grad=True))
    with pytest.raises(ConfigError, match="int4 layers are for CPUs"):
        copy.deepcopy(model).to("meta")
    layer = detach(model).model.layers[0].self_attn.q_proj
    attach(model, orthrus.OrthrusConfig(block_size=BLOCK))
    twin = model.model.layers[0].self_attn.diffusion.q_proj
    assert torch.equal(twin.weight, layer.dequantised())


@pytest.mark.parametrize(
    ("options", "match"),
    [({"compile": True}, "compile"), ({"quantization_config": object()}, "int4.*config"), ({"device": "meta"}, "CPUs")],
)
def test_what_does_not_go_with_int4_is_refused_by_name(use: None, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load("nano", dtype="int4", **options)


def test_nano_loads_in_int4(use: None) -> None:
    """By name, and decodes."""
    model, tokenizer = load("nano", dtype="int4")
    chat = [{"role": "user", "content": "What is 17 + 5?"}]
    plain, drafted = (
        orthrus.generate(model, tokenizer, [chat], mode=mode, max_new_tokens=24)[0].token_ids
        for mode in ("ar", "orthrus")
    )
    assert plain == drafted


@pytest.mark.parametrize("lack", ["CPU", "folder", "compiler", "CXX", "compiled"])
def test_where_the_operator_cannot_be_had_int4_is_refused(
    lack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is loaded, with what to do; a compiler that fails leaves a log."""
    monkeypatch.setattr(compiled, "_library", [])
    monkeypatch.setenv("ORTHRUS_CACHE", "" if lack == "folder" else str(tmp_path))
    if lack == "CPU":
        monkeypatch.setattr(compiled, "instructions", lambda: None)
    elif lack != "folder":
        monkeypatch.setenv("CXX", {"compiler": "", "CXX": "c++ '", "compiled": "false"}[lack])
    told = {
        "CPU": "dtype int4 requires Linux and an x86 CPU",
        "folder": "ORTHRUS_CACHE",
        "compiler": r"compiler, found none: install g\+\+",
        "CXX": r"compiler, found none: install g\+\+",
        "compiled": r"could not be compiled or loaded: see .*\.log$",
    }
    with pytest.raises(ConfigError, match=told[lack]):
        load("nano", dtype="int4")
    assert compiled.compiles() == (lack == "compiled")
    assert ("compiling the operators" in capsys.readouterr().err) == (lack == "compiled")
    assert [path.suffix for path in (tmp_path / "compiled").glob("*")] == [".log"] * (lack == "compiled")


def test_the_operator_is_compiled_while_its_caller_waits(
    own: Operator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a compiler in the background was started already, or failed."""
    # Of the set whose library this process has: the file that is written here holds none.
    name = str(own).removeprefix("orthrus.linear_blocks_").removesuffix(".default")
    monkeypatch.setenv("ORTHRUS_CACHE", str(tmp_path))
    monkeypatch.setattr(compiled, "_library", [])
    monkeypatch.setattr(compiled, "instructions", lambda: name)
    file = compiled._file(name)
    assert file is not None
    file.parent.mkdir()
    file.with_suffix(".log").write_text("failed\n")
    made: list[Path] = []

    def made_by(name: str, file: Path, scratch: Path) -> str:
        made.append(file)
        return f"touch {file}; rmdir {scratch}"

    monkeypatch.setattr(compiled, "command", made_by)
    assert compiled.required("linear_blocks", by="dtype int4") is not None
    assert compiled.required("linear_blocks", by="dtype int4") is not None
    assert made == [file]
