"""A dual-view Qwen3 model as one GGUF file, in the layout that the llama.cpp fork of Orthrus reads.

Architecture `orthrus`: the keys and tensors of `qwen3`, with block length and mask token. Each layer also has the
view's projections and norms (`blk.0.attn_q_diff.weight`).
"""

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.checkpoints.files import require_published
from orthrus.checkpoints.tokenizers import QWEN2_PIECES
from orthrus.errors import CheckpointError, UnsupportedModel
from orthrus.model.attach import config_of
from orthrus.model.fingerprint import TWIN, backbone_tensors, twin_tensors
from orthrus.model.markov import NAME as MARKOV
from orthrus.writing import replacing

ARCHITECTURE: Final = "orthrus"
BLOCK_SIZE: Final = f"{ARCHITECTURE}.diffusion.block_size"
_LAYOUT: Final = "the GGUF layout"
_FORMS: Final = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_SPECIAL: Final = ("bos", "eos", "unk", "sep", "pad", "cls")  # the mask token is the view's


def save_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> list[str]:
    """Write backbone, view and vocabulary to one file, whole or not at all; returns what was left out, in words.

    Matrices are in the model's dtype, vectors in float32, as llama.cpp wants them. Other forms are made from it by
    llama.cpp's `llama-quantize`.

    Raises:
        CheckpointError: the package gguf is not installed.
        UnsupportedModel: another family than Qwen3, a view that drafts otherwise than the published ones (a correction
            between slots is left out), or a tokenizer that llama.cpp would read otherwise.
        WriteError: the file cannot be written; what was there stays.
    """
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f"{path} needs the package gguf to be written, found none: pip install gguf")
    require_published(model, _LAYOUT)
    _require_plain(model)
    _require_qwen2(tokenizer)
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants

    form = _FORMS[model.dtype]
    with replacing(path) as scratch:
        writer = GGUFWriter(scratch, ARCHITECTURE)
        writer.add_file_type(LlamaFileType["ALL_F32" if form == "F32" else f"MOSTLY_{form}"])
        _add_shape(writer, model)
        _add_vocabulary(writer, tokenizer, rows=model.get_input_embeddings().weight.shape[0])
        writer.add_mask_token_id(config_of(model).mask)
        writer.add_uint32(BLOCK_SIZE, config_of(model).block_size)
        for name, tensor in tensors_of(model).items():
            to = GGMLQuantizationType[form if tensor.ndim > 1 else "F32"]
            writer.add_tensor(name, quants.quantize(tensor.detach().cpu().float().numpy(), to), raw_dtype=to)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    rank = config_of(model).markov_rank
    return [f"the correction between slots (rank {rank}): texts are the same, fewer drafts are kept"] if rank else []


def tensors_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the backbone's and the view's tensors under the layout's names; tied weights once."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH.QWEN3, model.config.num_hidden_layers)

    def named(name: str) -> str:
        short: str | None = names.get_name(name, try_suffixes=(".weight",))
        if short is None:
            raise UnsupportedModel(f"{_LAYOUT} has no name for the tensor {name}: save an adapter")
        return short

    tensors = {named(name): tensor for name, tensor in backbone_tensors(model).items()}
    for name, tensor in twin_tensors(model).items():
        if not name.startswith(f"{MARKOV}."):
            tensors[f"{named(name.replace(TWIN, '.')).removesuffix('.weight')}_diff.weight"] = tensor
    return tensors


def _require_plain(model: PreTrainedModel) -> None:
    """Refuse what Qwen3's configuration may say and the fork's graph does not do."""
    config = model.config
    kinds = {*(config.layer_types or ())} - {"full_attention"}
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    for name, value, wanted in (
        ("attention_bias", config.attention_bias, False),
        ("layers of kind", ", ".join(sorted(kinds)), ""),
        ("rotary embeddings of type", rope, "default"),
    ):
        if value != wanted:
            raise UnsupportedModel(f"{_LAYOUT} has no place for {name} {value}: save an adapter")
    if model.dtype not in _FORMS:
        raise UnsupportedModel(f"{_LAYOUT} holds {', '.join(_FORMS.values())}, found {model.dtype}: load in another")


def _require_qwen2(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cuts text otherwise than llama.cpp would be told."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    cut = described.get("pre_tokenizer") or {}
    patterns = [
        part.get("pattern", {}).get("Regex") for part in cut.get("pretokenizers", [cut]) if part["type"] == "Split"
    ]
    if described["model"]["type"] != "BPE" or patterns != [QWEN2_PIECES]:
        raise UnsupportedModel(
            f"{_LAYOUT} needs a byte-level tokenizer that cuts text as Qwen2's does, found another: llama.cpp would "
            "read texts otherwise"
        )


def _add_shape(writer: Any, model: PreTrainedModel) -> None:
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _add_vocabulary(writer: Any, tokenizer: PreTrainedTokenizerBase, *, rows: int) -> None:
    """Write tokens, merges, special tokens and chat template; rows of the embedding without a token are padding."""
    from gguf import SpecialVocab, TokenType

    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for index in range(rows):
        kind = TokenType.NORMAL if index in texts else TokenType.UNUSED
        if index in added:
            kind = TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED
        tokens.append(texts.get(index, f"[PAD{index}]"))
        kinds.append(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        SpecialVocab(folder, load_merges=True, special_token_types=_SPECIAL).add_to_gguf(writer, quiet=True)
