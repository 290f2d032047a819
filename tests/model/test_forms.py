"""Backbones whose weights are not plain numbers in one memory: quantised, offloaded, none at all."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import Tensor, nn
from transformers import PreTrainedModel

import orthrus
from orthrus.bench.peers.hf import plain
from orthrus.checkpoints.load import put_on, ready
from orthrus.decode.api import engine_for
from orthrus.decode.options import Options
from orthrus.errors import CheckpointError, ConfigError, UnsupportedModel
from orthrus.kernels.int8 import is_exact
from orthrus.model.attach import duals, is_attached
from orthrus.model.fingerprint import fingerprint, identity, of_view, quantization_of, twin_tensors
from orthrus.model.twin import is_plain, require_gradients
from orthrus.policy import steps
from tests import reference
from tests.families import perturb, tiny

CONFIG = orthrus.OrthrusConfig(block_size=4)
PROMPTS = [[5, 9, 11, 40, 7], [3, 80, 22]]


def texts(model: PreTrainedModel, plan: str, *, tokens: int = 10, exact: str = "distribution") -> list[list[int]]:
    """What a model writes after the prompts, greedily."""
    options = Options(max_new_tokens=tokens, eos_token_id=())
    engine = engine_for(model, PROMPTS, options, steps.parse(plan), rows=2, exact=exact)  # type: ignore[arg-type]
    return [row.token_ids for row in engine.finish(PROMPTS, options)]


def forms() -> dict[str, Callable[[nn.Module], object]]:
    """Ways to quantise a model in place with torchao; none where it is not installed."""
    try:
        from torchao import quantization as ao
    except ImportError:
        return {}
    int4 = ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(16))
    kinds = {
        "int8 weights": ao.Int8WeightOnlyConfig(),
        "int4 weights": int4,
        "fp8 weights": ao.Float8WeightOnlyConfig(),
    }
    return {name: lambda model, kind=kind: ao.quantize_(model, kind) for name, kind in kinds.items()}


FORMS = forms()
each_form = pytest.mark.parametrize("form", FORMS or [pytest.param("", marks=pytest.mark.skip(reason="no torchao"))])


def quantised(form: str, *, seed: int = 0) -> PreTrainedModel:
    model = tiny("qwen3", seed=seed)
    FORMS[form](model)
    return model


@each_form
def test_gradients_pass_through_weights_that_are_dequantised_for_products(form: str) -> None:
    model = quantised(form)
    require_gradients(model)
    layer = model.model.layers[0].self_attn.q_proj
    input = torch.ones(1, layer.in_features, requires_grad=True)
    layer(input).sum().backward()
    assert input.grad is not None
    assert input.grad.abs().max() > 0


@pytest.mark.skipif(not FORMS, reason="no torchao")
def test_where_gradients_get_lost_training_is_refused_by_name() -> None:
    """Products of rounded inputs have none: a view would be trained by what passes beside them."""
    from torchao import quantization as ao

    model = tiny("qwen3")
    ao.quantize_(model, ao.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(UnsupportedModel, match=r"gradients do not pass through .*q_proj \(Linear of Int8Tensor\)"):
        require_gradients(model)


@each_form
def test_a_quantised_backbone_gets_a_plain_twin(form: str) -> None:
    """Its tensors are floating point, near what they were before, and take gradients through quantised layers."""
    plain, model = orthrus.attach(tiny("qwen3"), CONFIG), orthrus.attach(quantised(form), CONFIG)
    for name, tensor in twin_tensors(plain).items():
        own = twin_tensors(model)[name]
        assert type(own) is Tensor
        torch.testing.assert_close(own, tensor, rtol=0.1, atol=0.03)
    model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False, view="diffusion").logits.sum().backward()
    named = {name: p for name, p in model.named_parameters() if p.grad is not None}
    assert {n for n, p in model.named_parameters() if ".diffusion." in n} == named.keys()
    assert all(p.grad.abs().max() > 0 for p in named.values())
    orthrus.detach(model)
    assert not is_attached(model)


@each_form
@pytest.mark.parametrize("plan", ["full", "tree:6", "onepass", "auto"])
def test_quantised_texts_are_those_of_plain_decoding(form: str, plan: str) -> None:
    """Greedy, in float32, packed where that pays: the model's own text, with drafts that are sometimes right."""
    model = quantised(form)
    expected = [reference.greedy_text(model, prompt, 10) for prompt in PROMPTS]
    orthrus.attach(model, CONFIG, attn_implementation="orthrus")
    perturb(model, scale=0.01)
    assert texts(ready(model, compile=False, pack=None), plan) == expected


@each_form
def test_a_view_of_plain_weights_loads_on_quantised_ones(form: str, tmp_path: Path) -> None:
    """With a warning that says what differs; saved there and loaded on plain weights again, it is the same view."""
    model = orthrus.attach(tiny("qwen3"), CONFIG)
    perturb(model)
    orthrus.save(model, tmp_path / "plain")
    other = quantised(form)
    with pytest.warns(
        UserWarning,
        match=r"on plain weights, this backbone has torchao .* \(embedding and norms are",
    ):
        put_on(other, tmp_path / "plain")
    assert all(torch.equal(t, twin_tensors(other)[name]) for name, t in twin_tensors(model).items())
    with pytest.raises(UnsupportedModel, match="holds plain weights, found torchao"):
        orthrus.save(other, tmp_path / "official", format="official")
    orthrus.save(other, tmp_path / "quantised")
    values = json.loads((tmp_path / "quantised" / "orthrus_config.json").read_text())
    assert values["quantization"] == quantization_of(other)
    assert values["fingerprint"] == fingerprint(model)
    back = tiny("qwen3")
    with pytest.warns(UserWarning, match="trained on torchao"):
        put_on(back, tmp_path / "quantised")
    assert all(torch.equal(t, twin_tensors(back)[name]) for name, t in twin_tensors(model).items())


@each_form
def test_a_foreign_quantised_backbone_is_refused(form: str, tmp_path: Path) -> None:
    """By what quantisation leaves as it is; and it stays a plain model."""
    orthrus.save(orthrus.attach(tiny("qwen3"), CONFIG), tmp_path)
    other = quantised(form, seed=1)
    with pytest.raises(CheckpointError, match=r"another|identity .* load it with its own backbone"):
        put_on(other, tmp_path)
    assert not is_attached(other)


def test_a_view_loads_on_weights_that_were_rounded_or_merged(tmp_path: Path) -> None:
    """Plain matrices other than those it was trained for, between the same embedding and norms, give a warning."""
    orthrus.save(orthrus.attach(tiny("qwen3"), CONFIG), tmp_path)
    model = tiny("qwen3")
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1.1)
    with pytest.warns(UserWarning, match="this backbone has other ones"):
        put_on(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        put_on(tiny("qwen3"), tmp_path)


def test_shards_of_plain_weights_are_plain() -> None:
    """Types of torch's own, such as a sharded parameter's, hold the numbers they stand for; others do not."""

    class Shard(Tensor):
        __module__ = "torch.distributed.tensor"

    class Rounded(Tensor):
        __module__ = "torchao.quantization"

    assert is_plain(torch.ones(2).as_subclass(Shard))
    assert not is_plain(torch.ones(2).as_subclass(Rounded))
    assert not is_plain(torch.ones(2, dtype=torch.uint8))
    assert not is_plain(torch.ones(2).to(torch.float8_e4m3fn))


def test_identity_is_that_of_all_forms() -> None:
    """The embedding and the norms, whatever the matrices are; other weights have another."""
    model, other = tiny("qwen3"), tiny("qwen3")
    for layer in other.model.layers:
        layer.mlp.up_proj.weight.data.mul_(1.01)
    assert identity(model) == identity(other) == identity(orthrus.attach(other, CONFIG))
    assert fingerprint(model) != fingerprint(other)
    assert identity(tiny("qwen3", seed=1)) != identity(model)


class Packed(nn.Module):
    """A linear layer as GPTQ and AWQ keep it."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(like.in_features // 8, like.out_features, dtype=torch.int32))


def test_weights_that_cannot_be_dequantised_are_refused_by_name() -> None:
    """And the model is as it was: no layer has a twin, and what was to be trained still is."""
    model = tiny("qwen3")
    attention = model.model.layers[1].self_attn
    attention.v_proj = Packed(attention.v_proj)
    with pytest.raises(UnsupportedModel, match=r"Qwen3Attention keeps v_proj\.qweight as Tensor of torch\.int32"):
        orthrus.attach(model, CONFIG)
    assert not is_attached(model)
    assert not duals(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model = tiny("qwen3")
    model.model.layers[0].self_attn.q_proj.weight_scale = nn.Parameter(torch.ones(48, 1))
    with pytest.raises(UnsupportedModel, match=r"keeps q_proj\.weight_scale as Parameter of torch\.float32"):
        orthrus.attach(model, CONFIG)


def offloaded(where: str, folder: Path) -> PreTrainedModel:
    """A model whose weights, but for the embedding, accelerate fetches layer by layer from another memory."""
    model, here = tiny("qwen3"), torch.device("cpu")
    for part in (model.model.layers, model.model.norm, model.lm_head):
        if where == "disk":
            disk_offload(part, str(folder / type(part).__name__), execution_device=here)
        else:
            cpu_offload(part, execution_device=here)
    assert [name for name, p in model.named_parameters() if not p.is_meta] == ["model.embed_tokens.weight"]
    return model


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_an_offloaded_backbone_gets_a_resident_twin(where: str, tmp_path: Path) -> None:
    """Weights, digests, texts and files are those of the model that is all here; a view loads, nothing is lost."""
    whole = orthrus.attach(tiny("qwen3"), CONFIG, attn_implementation="orthrus")
    perturb(whole, scale=0.01)
    orthrus.save(whole, tmp_path / "view")
    model = put_on(offloaded(where, tmp_path / "weights"), tmp_path / "view")
    assert all(torch.equal(tensor, twin_tensors(model)[name]) for name, tensor in twin_tensors(whole).items())
    assert fingerprint(model) == fingerprint(whole)
    for plan in ("ar", "full", "auto"):
        assert texts(ready(model, compile=False, pack=None), plan) == texts(whole, plan)
    with pytest.raises(UnsupportedModel, match="holds plain weights, found offloaded ones: load plain ones"):
        orthrus.save(model, tmp_path / "official", format="official")
    orthrus.save(model, tmp_path / "again")
    assert (tmp_path / "again" / "orthrus.safetensors").read_bytes() == (
        tmp_path / "view" / "orthrus.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("layout", ["adapter", "official"])
def test_a_model_loads_with_its_layers_left_on_disk(layout: str, tmp_path: Path) -> None:
    """`offload_folder` keeps layers out of memory and changes no text; forms that it cannot take are refused."""
    whole, tokenizer = orthrus.load("nano", pack=False)
    name = "nano"
    if layout == "official":
        whole = orthrus.attach(tiny("qwen3"), CONFIG, attn_implementation="orthrus")
        perturb(whole, scale=0.01)
        name = str(orthrus.save(whole, tmp_path / "model", format="official"))
        tokenizer.save_pretrained(name)
    model, _ = orthrus.load(name, offload_folder=tmp_path / "copies")
    away = {key for key, parameter in model.named_parameters() if parameter.is_meta}
    assert away == {key for key, _ in model.named_parameters() if ".layers." in key and not of_view(key)}
    for plan in ("ar", "full", "auto"):
        assert texts(model, plan) == texts(whole, plan)
    for other in (*([{"dtype": "int8"}] if is_exact() else []), {"compile": True}, {"pack": True}):
        with pytest.raises(ConfigError, match="found offload_folder beside"):
            orthrus.load(name, offload_folder=tmp_path / "copies", **other)  # type: ignore[arg-type]


def test_weights_that_nobody_fetches_are_refused() -> None:
    """A parameter on meta without a hook is named; a model that is all shapes still attaches, to be counted."""
    model = tiny("qwen3")
    model.model.layers[0].mlp.up_proj.to("meta")
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.0\.mlp\.up_proj\.weight holds no weights"):
        orthrus.attach(model, CONFIG)
    model = tiny("qwen3")
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModel, match="must keep its input embedding in memory"):
        orthrus.attach(model, CONFIG)
    shapes = orthrus.attach(tiny("qwen3").to("meta"), CONFIG)
    assert len(duals(shapes)) == 2


def test_weights_changed_in_place_change_the_text() -> None:
    """Through `.data`, as a merge of LoRA weights does: no packed copy of the old ones is used."""
    model = ready(orthrus.attach(tiny("qwen3"), CONFIG), compile=False, pack=True)
    before = texts(model, "full")
    model.model.layers[1].mlp.down_proj.weight.data += 0.2 * torch.randn(48, 64, generator=torch.manual_seed(0))
    backbone = plain(model)
    expected = [reference.greedy_text(backbone, prompt, 10) for prompt in PROMPTS]
    assert texts(model, "full") == texts(model, "ar") == expected != before


@pytest.mark.parametrize("exact", ["distribution", "token"])
def test_a_model_in_training_decodes_as_in_evaluation(exact: str) -> None:
    """With dropout and gradient checkpointing on, which are on again afterwards."""
    model = tiny("qwen3", attention_dropout=0.5)
    expected = [reference.greedy_text(model, prompt, 10) for prompt in PROMPTS]
    orthrus.attach(model, CONFIG)
    model.gradient_checkpointing_enable()
    model.train()
    assert texts(model, "full", exact=exact) == expected
    assert all(module.training for module in model.modules())


def test_under_autocast_texts_are_plain_decodings_to_the_token() -> None:
    """Autocast rounds as 16-bit weights do: the strong promise is kept there, the other one is about float32."""
    model = orthrus.attach(tiny("qwen3"), CONFIG, attn_implementation="orthrus")
    perturb(model, scale=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        found = [texts(ready(model, compile=False, pack=None), plan, exact="token") for plan in ("ar", "full", "auto")]
    assert found[0] == found[1] == found[2]
