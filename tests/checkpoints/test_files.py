"""Views on disk: what is written loads back equal, and whatever does not fit is refused by name and loses nothing."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import orthrus
from orthrus.checkpoints import files
from orthrus.errors import CheckpointError, ConfigError, UnsupportedModel
from orthrus.model.attach import config_of, is_attached
from orthrus.model.fingerprint import fingerprint, identity
from tests.families import FAMILIES, HYBRID, perturb, tiny

CONFIG = orthrus.OrthrusConfig(block_size=6, mask_token_id=90)

QWEN3_LAYER = [
    "input_layernorm.weight",
    "mlp.down_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "post_attention_layernorm.weight",
    "self_attn.k_norm.weight",
    "self_attn.k_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.q_norm.weight",
    "self_attn.q_proj.weight",
    "self_attn.v_proj.weight",
]
DIFF_LAYER = [
    "self_attn.k_norm_diff.weight",
    "self_attn.k_proj_diff.weight",
    "self_attn.o_proj_diff.weight",
    "self_attn.q_norm_diff.weight",
    "self_attn.q_proj_diff.weight",
    "self_attn.v_proj_diff.weight",
]


def trained(family: str = "qwen3", **overrides: object) -> PreTrainedModel:
    """A model whose view differs from its backbone, as training leaves it."""
    model = orthrus.attach(tiny(family, **overrides), CONFIG)
    perturb(model)
    return model


def untrained(family: str = "qwen3", *, seed: int = 0, **overrides: object) -> PreTrainedModel:
    return orthrus.attach(tiny(family, seed=seed, **overrides), CONFIG)


def assert_equal(a: PreTrainedModel, b: PreTrainedModel) -> None:
    """Every parameter of both views, by name and bit, and the view's configuration."""
    first, second = dict(a.named_parameters()), dict(b.named_parameters())
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert config_of(a).block_size == config_of(b).block_size
    assert config_of(a).mask == config_of(b).mask


def bundle(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Put backbone, tokenizer and adapter in one directory, as the bundled model has them."""
    plain = tiny(model.config.model_type)
    plain.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return orthrus.save(model, path)


# ---------------------------------------------------------------- adapter


@pytest.mark.parametrize("family", [*FAMILIES, *HYBRID])
def test_adapter_round_trip(family: str, tmp_path: Path) -> None:
    """The twin alone is written; in another copy of the backbone it is equal again."""
    model = trained(family)
    orthrus.save(model, tmp_path / "view")
    assert sorted(f.name for f in (tmp_path / "view").iterdir()) == ["orthrus.safetensors", "orthrus_config.json"]
    assert all(".diffusion." in name for name in load_file(tmp_path / "view" / "orthrus.safetensors"))
    other = orthrus.attach(tiny(family), files.read_config(tmp_path / "view"))
    files.load_adapter(other, tmp_path / "view")
    assert_equal(model, other)


def test_adapter_loads_through_load(tmp_path: Path, characters: PreTrainedTokenizerBase) -> None:
    """Beside its backbone, or apart from it with `backbone=`; the tokenizer is the backbone's."""
    model = trained()
    bundle(tmp_path / "whole", model, characters)
    loaded, tokenizer = orthrus.load(tmp_path / "whole")
    assert_equal(model, loaded)
    assert not loaded.training
    assert tokenizer("abc")["input_ids"] == characters("abc")["input_ids"]
    orthrus.save(model, tmp_path / "apart")
    with pytest.raises(CheckpointError, match="does not say which backbone it belongs to: name it with backbone="):
        orthrus.load(tmp_path / "apart")
    loaded, _ = orthrus.load(tmp_path / "apart", backbone=tmp_path / "whole", dtype="float32", device="cpu")
    assert_equal(model, loaded)


@pytest.mark.parametrize("drafter", ["", "dflash", "nothing:here", "dflash:/nowhere"])
def test_a_backbone_stays_plain_where_its_drafter_cannot_be_loaded(
    drafter: str, tmp_path: Path, characters: PreTrainedTokenizerBase
) -> None:
    """A name that is none is refused before anything is loaded; a place where nothing is, afterwards."""
    bundle(tmp_path / "whole", trained(), characters)
    backbone = tiny("qwen3")
    with pytest.raises((ConfigError, CheckpointError), match=r"a drafter is KIND:SOURCE|no model '/nowhere'"):
        orthrus.load(tmp_path / "whole", backbone=backbone, drafter=drafter)
    assert not is_attached(backbone)


@pytest.mark.parametrize("kept", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_a_backbone_is_known_in_every_precision(
    dtype: str, kept: torch.dtype, tmp_path: Path, characters: PreTrainedTokenizerBase
) -> None:
    """Half precision rounds what fingerprints are made of; the right backbone is taken all the same, and no other."""
    backbone = tiny("qwen3")
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.copy_((parameter * 1e-5).bfloat16())  # below what float16 has all digits for
    backbone.to(kept).save_pretrained(tmp_path)
    characters.save_pretrained(tmp_path)
    orthrus.save(orthrus.attach(backbone, CONFIG), tmp_path)
    loaded, _ = orthrus.load(tmp_path, dtype=dtype)
    assert loaded.dtype == (kept if dtype == "auto" else getattr(torch, dtype))
    config = json.loads((tmp_path / "orthrus_config.json").read_text())
    (tmp_path / "orthrus_config.json").write_text(json.dumps(config | {"fingerprint": "0" * 32, "identity": "0" * 32}))
    with pytest.raises(CheckpointError, match=r"fingerprint 0000.* load it with its own backbone"):
        orthrus.load(tmp_path, dtype=dtype)


def test_what_holds_its_backbone_takes_no_other(tmp_path: Path, characters: PreTrainedTokenizerBase) -> None:
    """The official layout has all weights in one file."""
    orthrus.save(trained(), tmp_path, format="official")
    characters.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="holds its backbone itself, found backbone='other' beside it: drop it"):
        orthrus.load(tmp_path, backbone="other")


@pytest.mark.parametrize(("given", "revision"), [(None, "abc"), ("mirror/model", None)])
def test_a_pinned_revision_is_the_named_backbones(
    given: str | None, revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights' and its tokenizer's; another backbone has no such commit."""
    asked = list[tuple[str, str | None]]()

    def pretrained(cls: Any, home: str, dtype: Any, *, revision: str | None) -> PreTrainedModel:
        asked.append((home, revision))
        return tiny("qwen3")

    def tokenizer(home: str, *, revision: str | None = None) -> None:
        asked.append((home, revision))

    monkeypatch.setattr("orthrus.checkpoints.load._pretrained", pretrained)
    monkeypatch.setattr("orthrus.checkpoints.load.read_tokenizer", tokenizer)
    orthrus.save(trained(), tmp_path)
    config = json.loads((tmp_path / "orthrus_config.json").read_text())
    config |= {"backbone": "some/model", "revision": "abc"}
    (tmp_path / "orthrus_config.json").write_text(json.dumps(config))
    orthrus.load(tmp_path, backbone=given)
    assert asked == [(given or "some/model", revision)] * 2


def test_configuration_names_its_backbone(tmp_path: Path) -> None:
    """Block, mask and a fingerprint of the frozen weights are written; the dtype does not change the latter."""
    model = trained()
    orthrus.save(model, tmp_path)
    values = json.loads((tmp_path / "orthrus_config.json").read_text())
    assert values == {
        "block_size": 6,
        "mask_token_id": 90,
        "backbone": None,
        "revision": None,
        "fingerprint": fingerprint(model),
        "identity": identity(model),
    }
    assert fingerprint(trained().to(torch.bfloat16)) == values["fingerprint"]
    assert fingerprint(untrained()) == values["fingerprint"]
    assert fingerprint(untrained(seed=1)) != values["fingerprint"]


def test_saving_again_keeps_other_files(tmp_path: Path) -> None:
    """A directory may hold a backbone, a card, anything: only the view's own files are replaced."""
    (tmp_path / "README.md").write_text("a card")
    orthrus.save(untrained(), tmp_path)
    orthrus.save(trained(), tmp_path)
    other = untrained()
    files.load_adapter(other, tmp_path)
    assert_equal(trained(), other)
    assert (tmp_path / "README.md").read_text() == "a card"
    assert len(list(tmp_path.iterdir())) == 3


# ---------------------------------------------------------------- refusals


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = path / "orthrus.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


FIRST = "model.layers.0.self_attn.diffusion.k_norm.weight"

DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda t: t.pop(FIRST), f"1 missing tensors: {FIRST}"),
    "unexpected": (lambda t: t.update(stray=torch.ones(1)), "1 unexpected tensors: stray"),
    "integers": (
        lambda t: t.update({FIRST: t[FIRST].int()}),
        rf"{FIRST} must be one of .* found torch\.int32",
    ),
    "eight bits": (lambda t: t.update({FIRST: t[FIRST].to(torch.float8_e4m3fn)}), rf"{FIRST} .* torch\.float8_e4m3fn"),
    "not a number": (lambda t: t[FIRST][3:].fill_(torch.nan), rf"{FIRST} \(torch\.float32\) must hold finite numbers"),
    "infinite": (lambda t: t[FIRST][:1].fill_(torch.inf), rf"{FIRST} .* must hold finite numbers"),
    "misshapen": (lambda t: t.update({FIRST: torch.ones(3)}), rf"{FIRST} is \[3\], the model's is \[12\]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_tensors_that_do_not_fit_are_named(damage: str, tmp_path: Path) -> None:
    """Missing, unexpected, misshapen: the message names the tensor, and nothing is copied into the model."""
    change, message = DAMAGE[damage]
    orthrus.save(trained(), tmp_path)
    rewrite(tmp_path, change)  # type: ignore[arg-type]
    model = untrained()
    with pytest.raises(CheckpointError, match=message):
        files.load_adapter(model, tmp_path)
    assert_equal(model, untrained())


def test_a_foreign_backbone_is_refused(tmp_path: Path) -> None:
    """Other weights of the same shape are told by their fingerprint."""
    orthrus.save(trained(), tmp_path)
    config = files.read_config(tmp_path)
    model = orthrus.attach(tiny("qwen3", seed=1), config)
    with pytest.raises(CheckpointError, match=f"fingerprint {config.fingerprint} .* load it with its own backbone"):
        files.load_adapter(model, tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    """Cut in the data or in the header."""
    orthrus.save(trained(), tmp_path)
    file = tmp_path / "orthrus.safetensors"
    whole = file.read_bytes()
    for size in (len(whole) - 100, 20, 0):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"orthrus\.safetensors is damaged .* fetch or write it again"):
            files.load_adapter(untrained(), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{not json", "must be JSON"),
        ("[1, 2]", "must hold one JSON object, found list"),
        ('{"block_size": 8, "blok": 1}', "unknown key 'blok'"),
        ('{"block_size": "8"}', "block_size must be an integer"),
        ('{"mask_token_id": "x"}', "mask_token_id must be an integer of at least 0, found 'x'"),
    ],
)
def test_a_broken_configuration_is_refused(text: str, message: str, tmp_path: Path) -> None:
    """The file is named in every message."""
    orthrus.save(trained(), tmp_path)
    (tmp_path / "orthrus_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"orthrus_config\.json.*" + re.escape(message)):
        orthrus.load(tmp_path, backbone="nowhere")


@pytest.mark.parametrize("content", ["", '{"version": "1.0", "trunc', "{}", "[]", '{"added_tokens": []}'])
def test_a_damaged_tokenizer_is_called_so(tmp_path: Path, characters: PreTrainedTokenizerBase, content: str) -> None:
    """Cut short or of another format; only a tokenizer without files is called missing."""
    bundle(tmp_path, trained(), characters)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged .*: fetch or write it again"):
        orthrus.load(tmp_path)


def test_missing_files_are_named(tmp_path: Path, characters: PreTrainedTokenizerBase) -> None:
    """A directory that is no model, an adapter without tensors, a plain model, a file, an unknown name."""
    with pytest.raises(CheckpointError, match=r"must hold config\.json, found none: it is not a model"):
        orthrus.load(tmp_path)
    bundle(tmp_path / "a", trained(), characters)
    (tmp_path / "a" / "orthrus.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"must hold orthrus\.safetensors, found none"):
        orthrus.load(tmp_path / "a")
    tiny("llama").save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"neither an adapter .* nor in the official layout .*'llama'"):
        orthrus.load(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="a model is a directory, found the file"):
        orthrus.load(tmp_path / "a" / "config.json")
    with pytest.raises(CheckpointError, match=r"no model 'no/such': it is neither bundled \(smollm2, nano\) nor a dir"):
        orthrus.load("no/such")
    for name in ("./such", str(tmp_path / "such"), "no/such/folder", tmp_path / "such"):  # the Hub is not asked
        with pytest.raises(CheckpointError, match=r"no model '.*such.*': a model is a directory, found none"):
            orthrus.load(name)


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma2"])
def test_a_model_without_its_tokenizer_is_refused(family: str, tmp_path: Path) -> None:
    """Some families would get one of special tokens alone, which reads every prompt as nothing."""
    tiny(family).save_pretrained(tmp_path)
    orthrus.save(trained(family), tmp_path)
    with pytest.raises(CheckpointError, match="must hold the model's tokenizer, found none"):
        orthrus.load(tmp_path)


def test_unusable_places_are_refused(tmp_path: Path) -> None:
    """An unknown dtype, device or format is told before anything is read or written."""
    with pytest.raises(ConfigError, match=r"dtype must be one of float32, .*, int4 or auto, found 'int3'"):
        orthrus.load(tmp_path, dtype="int3")
    with pytest.raises(ConfigError, match=r"device 'abacus' cannot be used here: .*; take cpu"):
        orthrus.load(tmp_path, device="abacus")
    with pytest.raises(ConfigError, match="format must be 'adapter' or 'official', found 'zip'"):
        orthrus.save(trained(), tmp_path / "out", format="zip")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs a model with a diffusion view, found a plain one"):
        orthrus.save(tiny("qwen3"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("a text")
    with pytest.raises(ConfigError, match="written to a directory, found the file"):
        orthrus.save(trained(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "a text"


@pytest.mark.parametrize("format", ["adapter", "official"])
@pytest.mark.parametrize("failing", ["save_torch_state_dict", "json.dumps"])
def test_an_interrupted_save_leaves_the_old_files(
    format: str, failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while tensors or configuration are being written: the directory stays as it was, byte for byte."""
    path = tmp_path / "view"
    orthrus.save(untrained(), path, format=format)  # type: ignore[arg-type]
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    real = save_torch_state_dict

    def interrupted(*arguments: object, **more: object) -> None:
        if failing == "save_torch_state_dict":
            real(*arguments, **more)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(f"orthrus.checkpoints.files.{failing}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        orthrus.save(trained(), path, format=format)  # type: ignore[arg-type]
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["view"]


# ---------------------------------------------------------------- official layout


@pytest.mark.parametrize("tied", [True, False])
def test_official_layout_has_the_published_names(tied: bool, tmp_path: Path) -> None:
    """Standard Qwen3 names and six `_diff` tensors per layer (reference/orthrus.md, section 6), no others."""
    model = trained(tie_word_embeddings=tied)
    orthrus.save(model, tmp_path, format="official")
    expected = {"model.embed_tokens.weight", "model.norm.weight"} | (set() if tied else {"lm_head.weight"})
    expected |= {f"model.layers.{n}.{name}" for n in range(2) for name in [*QWEN3_LAYER, *DIFF_LAYER]}
    assert set(load_file(tmp_path / "model.safetensors")) == expected
    config = json.loads((tmp_path / "config.json").read_text())
    published = {
        "architectures": ["OrthrusLM"],
        "model_type": "qwen3",
        "auto_map": {"AutoModelForCausalLM": "modeling_orthrus.OrthrusLM"},
        "block_size": 6,
        "mask_token_id": 90,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
        "num_hidden_layers": 2,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "intermediate_size": 64,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": tied,
        "sliding_window": None,
        "layer_types": ["full_attention"] * 2,
        "r": 16,
        "lora_alpha": 32,
        "use_cache": False,
    }
    assert {name: config.get(name) for name in published} == published
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["use_cache"] is False
    assert not {"temperature", "top_k", "top_p", "do_sample"} & generation.keys()


@pytest.mark.parametrize("tied", [True, False])
def test_official_layout_loads_back_equal(tied: bool, tmp_path: Path, characters: PreTrainedTokenizerBase) -> None:
    """Both views, bit for bit, through `orthrus.load`."""
    model = trained(tie_word_embeddings=tied)
    orthrus.save(model, tmp_path, format="official")
    characters.save_pretrained(tmp_path)
    loaded, _ = orthrus.load(tmp_path)
    assert_equal(model, loaded)
    half, _ = orthrus.load(tmp_path, dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_the_hybrid_official_layout_has_the_published_names(
    tmp_path: Path, characters: PreTrainedTokenizerBase
) -> None:
    """`_diff` beside every tensor of either kind of mixer, as the authors' code for Qwen3.5 names them; loads equal."""
    model = trained("qwen3_5_text")
    orthrus.save(model, tmp_path, format="official")
    plain = set(tiny("qwen3_5_text").state_dict())
    mixers = {name for name in plain if ".self_attn." in name or ".linear_attn." in name}
    recurrent = {"in_proj_qkv.weight", "in_proj_z.weight", "in_proj_b.weight", "in_proj_a.weight", "conv1d.weight"}
    recurrent |= {"dt_bias", "A_log", "norm.weight", "out_proj.weight"}
    assert {name.partition(".linear_attn.")[2] for name in mixers if ".layers.0." in name} == recurrent
    twins = {re.sub(r"((?:self|linear)_attn\.\w+)", r"\1_diff", name) for name in mixers}
    assert len(twins) == len(mixers) == 3 * 9 + 6
    assert set(load_file(tmp_path / "model.safetensors")) == plain | twins
    config = json.loads((tmp_path / "config.json").read_text())
    said = {"model_type": "orthrus_qwen3_5", "architectures": ["OrthrusQwen3_5ForCausalLM"], "use_cache": False}
    assert {name: config.get(name) for name in said} == said
    assert (config["block_size"], config["mask_token_id"], config.get("auto_map")) == (6, 90, None)
    assert not (tmp_path / "modeling_orthrus.py").exists()
    characters.save_pretrained(tmp_path)
    assert_equal(model, orthrus.load(tmp_path)[0])


def test_sharded_official_layout_loads(tmp_path: Path, characters: PreTrainedTokenizerBase) -> None:
    """The published 8B model comes in several files with an index."""
    model = trained(tie_word_embeddings=False)
    orthrus.save(model, tmp_path, format="official")
    characters.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    save_torch_state_dict(tensors, tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded, _ = orthrus.load(tmp_path)
    assert_equal(model, loaded)
    next(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        orthrus.load(tmp_path)


OFFICIAL_DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "view missing": (lambda t: t.pop("model.layers.1.self_attn.q_proj_diff.weight"), "1 missing tensors"),
    "backbone missing": (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "not whole: 1 tensors missing"),
    "unexpected": (lambda t: t.update(stray=torch.ones(1)), "1 unexpected tensors: stray"),
    "misshapen view": (
        lambda t: t.update({"model.layers.1.self_attn.q_norm_diff.weight": torch.ones(3)}),
        r"diffusion\.q_norm\.weight is \[3\], the model's is \[12\]",
    ),
    "misshapen backbone": (
        lambda t: t.update({"model.layers.1.self_attn.q_norm.weight": torch.ones(3)}),
        "q_norm",
    ),
}


@pytest.mark.parametrize("damage", OFFICIAL_DAMAGE)
def test_a_damaged_official_layout_is_refused(damage: str, tmp_path: Path, characters: PreTrainedTokenizerBase) -> None:
    """Whichever view the missing or misshapen tensor belongs to, it is named."""
    change, message = OFFICIAL_DAMAGE[damage]
    orthrus.save(trained(), tmp_path, format="official")
    characters.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        orthrus.load(tmp_path)


def test_other_families_have_no_official_layout(tmp_path: Path) -> None:
    """Other families are told to save an adapter; nothing is written."""
    with pytest.raises(UnsupportedModel, match="for qwen3 and qwen3_5_text backbones, found llama: save an adapter"):
        orthrus.save(trained("llama"), tmp_path / "out", format="official")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["adapter", "official"])
def test_a_whole_file_replaces_shards(
    format: str, tmp_path: Path, characters: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And shards a whole file: what an earlier save left under names of its own must not be read instead."""
    tiny("qwen3").save_pretrained(tmp_path / "backbone")
    characters.save_pretrained(tmp_path / "backbone")
    path = tmp_path / "view"

    def sharded(tensors: dict[str, Tensor], where: Path, **more: object) -> None:
        save_torch_state_dict(tensors, where, max_shard_size="20KB", **more)  # type: ignore[arg-type]

    def read() -> PreTrainedModel:
        characters.save_pretrained(path)
        return orthrus.load(path, backbone=tmp_path / "backbone" if format == "adapter" else None)[0]

    monkeypatch.setattr(files, "save_torch_state_dict", sharded)
    orthrus.save(untrained(), path, format=format)  # type: ignore[arg-type]
    assert_equal(read(), untrained())
    monkeypatch.undo()
    orthrus.save(trained(), path, format=format)  # type: ignore[arg-type]
    assert_equal(read(), trained())
    monkeypatch.setattr(files, "save_torch_state_dict", sharded)
    orthrus.save(untrained(), path, format=format)  # type: ignore[arg-type]
    assert_equal(read(), untrained())
