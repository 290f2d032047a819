"""Attaching the view changes no bit of the backbone, and training reaches the view alone; the rest is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

import orthrus
from orthrus.bench.peers.hf import plain
from orthrus.decode.api import engine_for
from orthrus.decode.options import Options
from orthrus.errors import ConfigError, UnsupportedModel
from orthrus.kernels import masks, packed
from orthrus.kernels.merged import merge
from orthrus.model.attach import config_of, duals, is_attached, use_attention, windows_of
from orthrus.model.dual import DualAttention, View
from orthrus.model.graphs import compile_passes
from orthrus.policy import steps
from tests.families import FAMILIES, HYBRID, MOE, VOCAB, WINDOWED, perturb, tiny

VARIANTS = [*((family, {}) for family in FAMILIES), *WINDOWED.items()]
CONFIG = orthrus.OrthrusConfig(block_size=4)

each_kind = pytest.mark.parametrize(("family", "overrides"), [*VARIANTS, *((family, {}) for family in HYBRID)])
each_variant = pytest.mark.parametrize(("family", "overrides"), VARIANTS)


def some_tokens() -> Tensor:
    """Two rows of 14 tokens: longer than the windows of the windowed variants."""
    return torch.randint(VOCAB, (2, 14), generator=torch.Generator().manual_seed(3))


def logits_of(model: PreTrainedModel, **more: object) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=some_tokens(), use_cache=False, **more).logits
    return out


def whole_block_masks(model: PreTrainedModel, queries: int) -> masks.LayerMasks:
    """Every query sees every key: what a draft pass over an empty cache does."""
    position = torch.arange(queries)[None]
    return masks.layer_masks(
        torch.ones(1, queries, queries, dtype=torch.bool),
        query_position_BQ=position,
        key_position_BS=position,
        windows=windows_of(model),
        dtype=torch.float32,
    )


def attention_modules(model: nn.Module) -> list[nn.Module]:
    kept = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    return [m for m in kept if hasattr(m, "o_proj") or hasattr(m, "out_proj")]


@each_kind
def test_plain_logits_stay_bitwise_the_same(family: str, overrides: dict[str, object]) -> None:
    """After attach, with a perturbed twin, and after detach, which puts the same module objects back."""
    model = tiny(family, **overrides)
    before, own = logits_of(model), attention_modules(model)
    orthrus.attach(model, CONFIG)
    assert torch.equal(logits_of(model), before)
    perturb(model)
    assert torch.equal(logits_of(model), before)
    assert torch.equal(logits_of(model, view="ar"), before)
    assert not torch.equal(logits_of(model, view="diffusion"), before)
    orthrus.detach(model)
    assert not is_attached(model)
    assert not any(isinstance(m, DualAttention) for m in model.modules())
    assert all(a is b for a, b in zip(attention_modules(model), own, strict=True))
    assert torch.equal(logits_of(model), before)


@each_kind
def test_twin_starts_as_an_equal_copy(family: str, overrides: dict[str, object]) -> None:
    """Every twin tensor equals its original and shares no memory with it, so both views agree at first."""
    model = tiny(family, **overrides)
    before = logits_of(model)
    orthrus.attach(model, CONFIG)
    assert len(duals(model)) == model.config.num_hidden_layers
    for dual in duals(model):
        pairs = list(zip(dual.ar.state_dict().items(), dual.diffusion.state_dict().items(), strict=True))
        assert pairs
        for (name, original), (twin_name, twin) in pairs:
            assert name == twin_name
            assert torch.equal(original, twin)
            assert original.data_ptr() != twin.data_ptr()
    assert torch.equal(logits_of(model, view="diffusion"), before)


@each_variant
def test_gradients_reach_the_twin_only(family: str, overrides: dict[str, object]) -> None:
    """A draft pass with a loss leaves a gradient in every twin tensor and in nothing of the backbone."""
    model = orthrus.attach(tiny(family, **overrides), CONFIG)
    block = torch.tensor([[5, *[config_of(model).mask] * 3]])
    view = View(name="diffusion", masks=whole_block_masks(model, 4))
    logits = model(input_ids=block, use_cache=False, view=view).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor([7, 8, 9, 10])).backward()
    named = dict(model.named_parameters())
    twin = {name for name in named if ".diffusion." in name}
    # Adding a constant to every key moves no softmax weight: the gradient of a key bias is zero but for rounding.
    assert {name for name in named if named[name].grad is not None} == twin
    assert all(named[name].grad.abs().max() > 0 for name in twin if not name.endswith("k_proj.bias"))
    assert not any(p.requires_grad for name, p in named.items() if name not in twin)


@pytest.mark.parametrize("family", FAMILIES)
def test_draft_mask_reaches_the_twin(family: str) -> None:
    """A draft block reads both ways: its first slot changes with its last token; a plain pass's does not."""
    model = orthrus.attach(tiny(family), CONFIG)
    one, other = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 7, 9]])
    view = View(name="diffusion", masks=whole_block_masks(model, 4))
    with torch.no_grad():
        first, second = (model(input_ids=ids, use_cache=False, view=view).logits[0, 0] for ids in (one, other))
        plain = [model(input_ids=ids, use_cache=False).logits[0, 0] for ids in (one, other)]
    assert not torch.equal(first, second)
    # Experts group their rows with their neighbours', which moves the last bits (DESIGN, section 5).
    torch.testing.assert_close(plain[0], plain[1], rtol=0, atol=1e-5 if family in MOE else 0)


def test_windows_are_the_layers_own() -> None:
    """Alternating families have windowed and full layers; a family-wide window is every layer's."""
    assert [d.window for d in duals(orthrus.attach(tiny("gemma2"), CONFIG))] == [8, None]
    assert [d.window for d in duals(orthrus.attach(tiny("mistral", sliding_window=8), CONFIG))] == [8, 8]
    assert windows_of(orthrus.attach(tiny("qwen3"), CONFIG)) == ()


def test_mask_token_defaults_to_the_last_embedding_row() -> None:
    """And a given one is kept; one outside the vocabulary is refused and leaves the model plain."""
    assert config_of(orthrus.attach(tiny("llama"), CONFIG)).mask == VOCAB - 1
    given = orthrus.OrthrusConfig(block_size=4, mask_token_id=11)
    assert config_of(orthrus.attach(tiny("llama"), given)).mask == 11
    model = tiny("llama")
    with pytest.raises(ConfigError, match=f"one of the {VOCAB} embedding rows, found {VOCAB}"):
        orthrus.attach(model, orthrus.OrthrusConfig(mask_token_id=VOCAB))
    assert not is_attached(model)
    assert all(p.requires_grad for p in model.parameters())


def test_attaching_twice_is_refused() -> None:
    """The message says what to do; the first view stays."""
    model = orthrus.attach(tiny("qwen3"), CONFIG)
    twins = [dual.diffusion for dual in duals(model)]
    with pytest.raises(ConfigError, match=r"has a diffusion view already: detach\(\) it first"):
        orthrus.attach(model, CONFIG)
    assert [dual.diffusion for dual in duals(model)] == twins


def test_detaching_leaves_the_backbone_as_it_was() -> None:
    """Its attention function, and which of its parameters are to be trained; a comparison's copy changes neither."""
    model = tiny("qwen3")
    function = model.config._attn_implementation
    frozen = model.model.embed_tokens.weight.requires_grad_(False)
    orthrus.attach(model, CONFIG, attn_implementation="orthrus")
    plain(model)
    assert model.config._attn_implementation == "orthrus"
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".diffusion." not in name)
    orthrus.detach(model)
    assert model.config._attn_implementation == function != "orthrus"
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]


def test_detaching_a_plain_model_is_refused() -> None:
    """There is nothing to take off."""
    with pytest.raises(ConfigError, match="needs a model with a diffusion view"):
        orthrus.detach(tiny("qwen3"))


TINY = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "head_dim": 8}


def encoder_decoder() -> PreTrainedModel:
    config = AutoConfig.for_model("t5", vocab_size=96, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    return AutoModelForSeq2SeqLM.from_config(config)


def headless() -> PreTrainedModel:
    return AutoModel.from_config(tiny("qwen3").config)


def lightning() -> PreTrainedModel:
    config = AutoConfig.for_model("minimax", **TINY, num_hidden_layers=2, num_key_value_heads=2, num_local_experts=2)
    return AutoModelForCausalLM.from_config(config)


def delta_by_channel() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "kimi_linear", **TINY, num_hidden_layers=2, num_key_value_heads=4, kv_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, linear_num_heads=2, linear_head_dim=8, num_experts=2, pad_token_id=0,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def short_convolutions() -> PreTrainedModel:
    kinds = ["conv", "full_attention"]
    config = AutoConfig.for_model("lfm2", **TINY, num_hidden_layers=2, num_key_value_heads=2, layer_types=kinds)
    return AutoModelForCausalLM.from_config(config)


def mamba_2() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "granitemoehybrid", **TINY, num_hidden_layers=2, num_key_value_heads=2, layer_types=["mamba", "attention"],
        mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, num_local_experts=2, shared_intermediate_size=16,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def replaced_by_a_kernel() -> PreTrainedModel:
    model = tiny("qwen3_5_text")
    mixer = model.model.layers[1].linear_attn
    mixer.forward = mixer.forward  # where hub kernels put theirs, and accelerate its hook
    return model


def state_space() -> PreTrainedModel:
    config = AutoConfig.for_model("mamba", vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4)
    return AutoModelForCausalLM.from_config(config)


def mixed_layers() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "jamba", **TINY, num_hidden_layers=2, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1,
        num_experts=2, num_experts_per_tok=1, use_mamba_kernels=False,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def one_layer_short() -> PreTrainedModel:
    model = tiny("qwen3")
    model.model.layers[1].self_attn = nn.Identity()
    return model


def dynamic_rope() -> PreTrainedModel:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return tiny("llama", rope_parameters=rope)


def long_rope() -> PreTrainedModel:
    rope = {"rope_type": "longrope", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    return tiny("llama", rope_parameters={**rope, "short_factor": [1.0] * 6, "long_factor": [2.0] * 6})


def chunked() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "llama4_text", **TINY, num_hidden_layers=2, num_key_value_heads=2, num_local_experts=2,
        intermediate_size_mlp=32, layer_types=["chunked_attention", "full_attention"],
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def called_otherwise() -> PreTrainedModel:
    shape = {name: size for name, size in TINY.items() if name != "head_dim"}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", **shape, num_hidden_layers=2))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (encoder_decoder, "T5ForConditionalGeneration is an encoder-decoder"),
        (headless, "Qwen3Model has no language-model head"),
        (lightning, "MiniMaxForCausalLM needs .* found 1, and MiniMaxDecoderLayer, MiniMaxLightningAttention in"),
        (delta_by_channel, "KimiLinearForCausalLM needs .* found 1, and KimiLinearDeltaAttention in the others"),
        (short_convolutions, "Lfm2ForCausalLM has layers of kind conv"),
        (mamba_2, "GraniteMoeHybridForCausalLM"),
        (state_space, "MambaForCausalLM needs .* found 0, and MambaBlock, MambaMixer in the others"),
        (replaced_by_a_kernel, "Qwen3_5GatedDeltaNet in the others: .* nor layers .* replaced by hub kernels"),
        (one_layer_short, "Qwen3ForCausalLM needs one attention module .* in each of its 2 layers, found 1"),
        (mixed_layers, "JambaForCausalLM"),
        (dynamic_rope, "dynamic rotary embeddings"),
        (long_rope, "longrope rotary embeddings"),
        (chunked, "Llama4ForCausalLM has layers of kind chunked_attention"),
        (called_otherwise, "GPTNeoXForCausalLM needs .* found 0, and GPTNeoXAttention in the others"),
        (lambda: nn.Linear(2, 2), "needs a transformers PreTrainedModel, found Linear"),
    ],
)
def test_what_cannot_carry_a_view_is_refused_by_name(make: object, reason: str) -> None:
    """The architecture and the part that does not fit are named, and nothing of the model is touched."""
    model = make()  # type: ignore[operator]
    with pytest.raises(UnsupportedModel, match=reason):
        orthrus.attach(model, CONFIG)
    assert not is_attached(model)
    assert not any(isinstance(m, DualAttention) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_attention_function_can_be_switched_either_way() -> None:
    """Before, with or after the view: the logits are those of the same model to rounding."""
    model = tiny("qwen3")
    before = logits_of(model)
    orthrus.attach(model, CONFIG, attn_implementation="orthrus")
    assert model.config._attn_implementation == "orthrus"
    torch.testing.assert_close(logits_of(model), before, rtol=0, atol=1e-5)
    use_attention(model, "sdpa")
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_twins_call_the_attention_function_the_model_is_set_to(family: str) -> None:
    """Both halves read it from the one configuration, whenever it was set."""
    model = orthrus.attach(tiny(family), CONFIG)
    use_attention(model, "orthrus")
    for dual in duals(model):
        assert dual.diffusion.config is dual.ar.config
        assert dual.diffusion.config._attn_implementation == "orthrus"


@pytest.mark.parametrize("block_size", [1, 0, -3, 2.0, "8", True])
def test_block_size_must_hold_an_anchor_and_a_mask(block_size: object) -> None:
    """Anything but an integer of at least 2 is refused."""
    with pytest.raises(ConfigError, match="block_size must be an integer of at least 2"):
        orthrus.OrthrusConfig(block_size=block_size)  # type: ignore[arg-type]


def test_unknown_configuration_keys_are_refused_with_the_nearest_one() -> None:
    """A typo names what was meant; a stranger gets the list."""
    with pytest.raises(ConfigError, match="unknown key 'block_sise'; did you mean 'block_size'"):
        orthrus.OrthrusConfig.from_dict({"block_sise": 8})
    with pytest.raises(ConfigError, match="unknown key 'zzz'; known keys: block_size, mask_token_id"):
        orthrus.OrthrusConfig.from_dict({"zzz": 8})


def test_detaching_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed, merged, corrected, decoded with, probed and compiled: attributes, modules and forwards are as before."""
    model = tiny("qwen3")

    def state() -> dict[str, object]:
        found: dict[str, object] = {}
        for name, module in model.named_modules():
            found[name] = (module, type(module), module.forward.__func__, {**module.__dict__, "_modules": None})
            found[f"{name}."] = [*module._modules, {name: id(p) for name, p in module._parameters.items()}]
        return found

    monkeypatch.setenv("ORTHRUS_CACHE", "")
    before = state()
    orthrus.attach(model, orthrus.OrthrusConfig(block_size=4, markov_rank=2), attn_implementation="orthrus")
    packed.pack(merge(model))
    options = Options(max_new_tokens=4, eos_token_id=())
    for exact in ("distribution", "token"):
        engine = engine_for(model, [[3, 4, 5]], options, steps.parse("auto"), rows=1, exact=exact)
        engine.add([3, 4, 5], options)
        while engine.busy:
            engine.step()
    compile_passes(model)
    orthrus.detach(model)
    assert state() == before


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "gemma3_text"])
def test_saved_weights_have_the_backbones_own_names(family: str, tmp_path: Path) -> None:
    """`save_pretrained` on a model with a view is read by stock `from_pretrained`, logits bit for bit the same."""
    model = tiny(family)
    before = logits_of(model)
    orthrus.attach(model, CONFIG)
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert {".diffusion." in key for key in info["unexpected_keys"]} == {True}
    assert torch.equal(logits_of(loaded.eval()), before)


def test_states_are_taken_with_and_without_a_view() -> None:
    """A plain model's state fills the backbone of a dual one and the reverse; two dual ones exchange everything."""
    plain, other = tiny("qwen3"), tiny("qwen3", seed=1)
    expected = logits_of(plain)
    model = orthrus.attach(tiny("qwen3", seed=1), CONFIG)
    left = model.load_state_dict(plain.state_dict(), strict=False)
    assert not left.unexpected_keys
    assert {".diffusion." in key for key in left.missing_keys} == {True}
    assert torch.equal(logits_of(model), expected)
    perturb(model)
    assert not other.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert torch.equal(logits_of(other), expected)
    third = orthrus.attach(tiny("qwen3", seed=2), CONFIG)
    third.load_state_dict(model.state_dict())
    for view in ("ar", "diffusion"):
        assert torch.equal(logits_of(third, view=view), logits_of(model, view=view))
