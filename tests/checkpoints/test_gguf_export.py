"""A view as GGUF: every key and tensor read back, nothing half written, and what the layout cannot say refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import orthrus
from orthrus.checkpoints import gguf_export
from orthrus.checkpoints.gguf_export import save_gguf
from orthrus.errors import UnsupportedModel, WriteError
from tests.families import perturb, tiny
from tests.train.tiny import tiny_tokenizer

LAYERS, VOCABULARY = 2, 310
SAID = {
    "attn_q": "self_attn.{view}.q_proj",
    "attn_k": "self_attn.{view}.k_proj",
    "attn_v": "self_attn.{view}.v_proj",
    "attn_output": "self_attn.{view}.o_proj",
    "attn_q_norm": "self_attn.{view}.q_norm",
    "attn_k_norm": "self_attn.{view}.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def view(tokenizer: PreTrainedTokenizerFast, family: str = "qwen3", **fields: Any) -> PreTrainedModel:
    """A view that has moved; the embedding has a few rows more than the vocabulary, as Qwen3's has."""
    shape = {"head_dim": 16, "vocab_size": VOCABULARY, "tie_word_embeddings": fields.pop("tied", False)}
    config = orthrus.OrthrusConfig(block_size=8, mask_token_id=tokenizer.mask_token_id, **fields)
    model = orthrus.attach(tiny(family, **shape), config)
    perturb(model)
    return model


def expected(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All tensors by the names of ecosystem's table, spelt out."""
    state = model.state_dict(keep_vars=True)
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    if not model.config.tie_word_embeddings:
        names["output"] = "lm_head"
    for layer in range(LAYERS):
        for short, place in SAID.items():
            names[f"blk.{layer}.{short}"] = f"model.layers.{layer}.{place.replace('.{view}', '')}"
            if "{view}" in place:
                names[f"blk.{layer}.{short}_diff"] = f"model.layers.{layer}.{place.format(view='diffusion')}"
    return {f"{name}.weight": state[f"{place}.weight"] for name, place in names.items()}


@pytest.mark.parametrize(("dtype", "tied"), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, False)])
def test_every_tensor_is_read_back_under_the_forks_name(
    dtype: torch.dtype, tied: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Equal to the bit in the model's dtype; vectors in float32; no tensor more and none less."""
    model = view(tokenizer, tied=tied).to(dtype)
    assert save_gguf(model, tokenizer, tmp_path / "m.gguf") == []
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    wanted = expected(model)
    assert read.keys() == wanted.keys()
    for name, tensor in wanted.items():
        values = torch.from_numpy(gguf.quants.dequantize(read[name].data, read[name].tensor_type).copy())
        assert torch.equal(values, tensor.detach().float()), name
        kind = "F32" if tensor.ndim == 1 else {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[str(dtype)[6:]]
        assert read[name].tensor_type.name == kind


def test_keys_are_qwen3s_under_another_name_with_block_and_mask(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Also the vocabulary: each token by its number, special ones marked, rows without a token as padding."""
    model = view(tokenizer)
    save_gguf(model, tokenizer, tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    values = {name: field.contents() for name, field in fields.items()}
    config = model.config
    assert values["general.architecture"] == "orthrus"
    assert {name.removeprefix("orthrus."): v for name, v in values.items() if name.startswith("orthrus.")} == {
        "diffusion.block_size": 8,
        "block_count": LAYERS,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": pytest.approx(config.rms_norm_eps),
        "rope.freq_base": config.rope_parameters["rope_theta"],
    }
    assert values["tokenizer.ggml.mask_token_id"] == tokenizer.mask_token_id
    assert values["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert (values["tokenizer.ggml.model"], values["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    assert values["tokenizer.chat_template"] == tokenizer.chat_template
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == VOCABULARY
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert tokens[len(tokenizer) :] == [f"[PAD{index}]" for index in range(len(tokenizer), VOCABULARY)]
    control = {index for index, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL}
    assert control == set(tokenizer.all_special_ids)
    assert kinds[len(tokenizer) :] == [gguf.TokenType.UNUSED] * (VOCABULARY - len(tokenizer))
    assert len(values["tokenizer.ggml.merges"]) > 0


def test_a_correction_is_left_out_and_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (left_out,) = save_gguf(view(tokenizer, markov_rank=2), tokenizer, tmp_path / "m.gguf")
    assert "correction between slots (rank 2)" in left_out
    assert not any("markov" in tensor.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors)


def test_a_write_that_fails_leaves_the_file_that_was_there(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"good")

    def fills_the_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fills_the_disk)
    with pytest.raises(WriteError, match=r"m\.gguf cannot be written \(No space left"):
        save_gguf(view(tokenizer), tokenizer, path)
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]
    assert path.read_bytes() == b"good"


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {}, "defined for qwen3 backbones, found llama"),
        ("qwen3", {"block_attention": "causal"}, "no place for block_attention, found 'causal'"),
        ("qwen3", {"anchor": "backbone"}, "no place for anchor, found 'backbone'"),
        ("qwen3", {"layers": "last:1"}, "no place for layers"),
        ("qwen3", {"trained_mask": True}, "no place for trained_mask"),
    ],
)
def test_what_the_layout_cannot_say_is_refused_by_name(
    family: str, fields: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel, match=f"the GGUF layout .*{message}.*: save an adapter"):
        save_gguf(view(tokenizer, family, **fields), tokenizer, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_backbones_and_tokenizers_that_llama_cpp_would_read_otherwise_are_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = view(tokenizer)
    model.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UnsupportedModel, match="rotary embeddings of type yarn"):
        save_gguf(model, tokenizer, tmp_path / "m.gguf")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(UnsupportedModel, match="cuts text as Qwen2's does"):
        save_gguf(view(tokenizer), tokenizer, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_nothing_is_written(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find: Callable[[str], object] = lambda name: None  # noqa: E731
    monkeypatch.setattr(gguf_export.importlib.util, "find_spec", find)
    with pytest.raises(orthrus.errors.CheckpointError, match="pip install gguf"):
        save_gguf(view(tokenizer), tokenizer, tmp_path / "m.gguf")
