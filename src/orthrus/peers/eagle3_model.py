"""EAGLE-3 (arXiv 2503.01840): one decoder layer over token embeddings and fused hidden states of the backbone.

Entry t reads token t and the backbone's features at t - 1, and predicts token t + 1. While the layer drafts, its
previous output replaces the features.

Shapes: B rows, Q entries, S keys, H hidden size, A tapped layers, N heads, D head dimension, V vocabulary.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from orthrus.checkpoints import files
from orthrus.errors import CheckpointError, ConfigError
from orthrus.model.head import output_head
from orthrus.model.twin import in_dtype
from orthrus.peers.shape import FIELDS, shape_of

CONFIG, WEIGHTS = "config.json", "model.safetensors"
SERVED = ("llama", "qwen3")
"""Kinds of layer that published drafters have; the second norms queries and keys by head."""


@dataclass(frozen=True, kw_only=True)
class Eagle3Config:
    """Describe a drafter.

    Attributes:
        layer: the shape of the layer, as transformers describes it.
        taps: decoder layers whose outputs are fused, by index. Published configurations name the next layer instead.
        norm_before_residual: whether the residual is the normed features.
        vocabulary: how many tokens it drafts; the backbone's number for all.
        drafts: how many tokens in a row it was trained for.
    """

    layer: PreTrainedConfig
    taps: tuple[int, ...]
    norm_before_residual: bool = False
    vocabulary: int
    backbone: str | None = None
    drafts: int = 7

    @classmethod
    def of(cls, model: PreTrainedModel, **more: Any) -> "Eagle3Config":
        """Return the configuration of a drafter for a model, with a layer of the model's shape."""
        text = model.config.get_text_config()
        layers = text.num_hidden_layers
        kind = text.model_type if text.model_type in SERVED else "llama"
        layer = AutoConfig.for_model(kind, **shape_of(text, _SHAPE), num_hidden_layers=1, tie_word_embeddings=False)
        taps = more.pop("taps", None) or default_taps(layers)
        if len(taps) != 3 or not all(0 <= tap < layers for tap in taps):
            raise ConfigError(f"taps must be three of the backbone's layers 0 to {layers - 1}, found {list(taps)}")
        return cls(layer=layer, taps=tuple(taps), vocabulary=text.vocab_size, **more)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as `speculators` writes it and vLLM reads it."""
        method = {"proposal_type": "greedy", "speculative_tokens": self.drafts, "accept_tolerance": 0.0}
        return {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "speculators_version": "0.9.0",
            "draft_vocab_size": self.vocabulary,
            "eagle_aux_hidden_state_layer_ids": [tap + 1 for tap in self.taps],
            "norm_before_residual": self.norm_before_residual,
            "target_hidden_size": None,
            "transformer_layer_config": self.layer.to_diff_dict() | {"model_type": self.layer.model_type},
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [method],
                "verifier": {"name_or_path": self.backbone, "architectures": []},
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, layers: int, where: str) -> "Eagle3Config":
        """Read a configuration of `speculators` or of EAGLE's authors, for a backbone of so many layers."""
        shape = dict(values.get("transformer_layer_config") or values)
        kind = shape.pop("model_type", "llama")
        name = "eagle_aux_hidden_state_layer_ids"
        ids = values.get(name) or values.get("eagle_config", {}).get(name)
        taps = default_taps(layers) if ids is None else tuple(index - 1 for index in ids)
        if kind not in SERVED or len(taps) != 3 or not all(0 <= tap < layers for tap in taps):
            raise CheckpointError(
                f"{where}: a layer of kind {' or '.join(SERVED)} over three of the backbone's {layers} layers is "
                f"required, found {kind!r} over {list(taps)}"
            )
        fields = {name: value for name, value in shape.items() if name in _SHAPE}
        layer = AutoConfig.for_model(kind, **fields, num_hidden_layers=1, tie_word_embeddings=False)
        asked = values.get("speculators_config", {})
        methods = asked.get("proposal_methods") or [{}]
        return cls(
            layer=layer,
            taps=taps,
            norm_before_residual=bool(values.get("norm_before_residual", False)),
            vocabulary=values.get("draft_vocab_size") or layer.vocab_size,
            backbone=asked.get("verifier", {}).get("name_or_path"),
            drafts=methods[0].get("speculative_tokens", 7),
        )


_SHAPE = (*FIELDS, "attention_bias", "rope_theta", "rope_scaling")


def default_taps(layers: int) -> tuple[int, ...]:
    """Return a low, a middle and a high layer: the paper's, or evenly spread ones in shallow models."""
    chosen = (1, layers // 2 - 1, layers - 4)
    if len({tap for tap in chosen if tap >= 0}) == 3:
        return chosen
    return tuple(round(part * (layers - 1)) for part in (0.0, 0.5, 1.0))


class _Attention(nn.Module):
    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        wide, bias = 2 * config.hidden_size, bool(getattr(config, "attention_bias", False))
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(wide, config.num_attention_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(wide, config.num_key_value_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(wide, config.num_key_value_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=bias)
        if config.model_type == "qwen3":
            self.q_norm = LlamaRMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def heads(self, states_BQE: Tensor) -> Tensor:
        """Split the last dimension into heads: `[B, N, Q, D]`."""
        return states_BQE.view(*states_BQE.shape[:2], -1, self.head_dim).transpose(1, 2)

    def normed(self, name: str, states_BNQD: Tensor) -> Tensor:
        return getattr(self, name)(states_BNQD) if hasattr(self, name) else states_BNQD


class _Layer(nn.Module):
    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        H, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm, self.hidden_norm = LlamaRMSNorm(H, eps=eps), LlamaRMSNorm(H, eps=eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = LlamaRMSNorm(H, eps=eps)
        self.mlp = Qwen3MLP(config)


class Eagle3(nn.Module):
    """The drafter's modules. Token embeddings are the backbone's, and so is the head for a whole vocabulary.

    `draft_to_target`: the backbone's token for each drafted token; None for a whole vocabulary.
    """

    draft_to_target: Tensor | None

    def __init__(self, config: Eagle3Config, *, whole: bool = True) -> None:
        super().__init__()
        self.config = config
        H = config.layer.hidden_size
        self.fc = nn.Linear(len(config.taps) * H, H, bias=False)
        self.layers = nn.ModuleList([_Layer(config.layer)])
        self.norm = LlamaRMSNorm(H, eps=config.layer.rms_norm_eps)
        self.rotary = LlamaRotaryEmbedding(config.layer)
        self.lm_head = None if whole else nn.Linear(H, config.vocabulary, bias=False)
        self.register_buffer("draft_to_target", None if whole else torch.arange(config.vocabulary), persistent=False)

    @property
    def layer(self) -> Any:
        return self.layers[0]

    def fuse(self, hidden: Sequence[Tensor]) -> Tensor:
        """Make one feature of the tapped layers' outputs: `[B, Q, H]`."""
        fused: Tensor = self.fc(torch.cat(list(hidden), dim=-1))
        return fused

    def join(self, embedded_BQH: Tensor, feature_BQH: Tensor) -> Tensor:
        """Put tokens and features side by side, each normed: `[B, Q, 2H]`."""
        layer = self.layer
        return torch.cat([layer.input_layernorm(embedded_BQH), layer.hidden_norm(feature_BQH)], dim=-1)

    def keys(self, joined_BQE: Tensor, position_BQ: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of entries, `[B, N, Q, D]` each; they depend on no other entry."""
        attention = self.layer.self_attn
        key_BNQD = attention.normed("k_norm", attention.heads(attention.k_proj(joined_BQE)))
        return self._rotated(key_BNQD, position_BQ), attention.heads(attention.v_proj(joined_BQE))

    def queries(self, joined_BQE: Tensor, position_BQ: Tensor) -> Tensor:
        """Return queries of entries, `[B, N, Q, D]`."""
        attention = self.layer.self_attn
        return self._rotated(attention.normed("q_norm", attention.heads(attention.q_proj(joined_BQE))), position_BQ)

    def output(self, attended_BNQD: Tensor, feature_BQH: Tensor) -> Tensor:
        """Return the layer's outputs, `[B, Q, H]`: the features of the next draft."""
        layer = self.layer
        base_BQH = layer.hidden_norm(feature_BQH) if self.config.norm_before_residual else feature_BQH
        states_BQH = base_BQH + layer.self_attn.o_proj(attended_BNQD.transpose(1, 2).flatten(2))
        output: Tensor = states_BQH + layer.mlp(layer.post_attention_layernorm(states_BQH))
        return output

    def attend(
        self, joined_BQE: Tensor, feature_BQH: Tensor, position_BQ: Tensor, key: Tensor, value: Tensor, seen_BQS: Tensor
    ) -> Tensor:
        """Run the layer over entries that see some of the keys; returns `[B, Q, H]`."""
        attended_BNQD = scaled_dot_product_attention(
            self.queries(joined_BQE, position_BQ), key, value, attn_mask=seen_BQS[:, None], enable_gqa=True
        )
        return self.output(attended_BNQD, feature_BQH)

    def logits(self, output_BQH: Tensor, head: Callable[[Tensor], Tensor], vocabulary: int) -> Tensor:
        """Return logits `[B, Q, V]` over the backbone's vocabulary; tokens outside a reduced one get the lowest."""
        normed_BQH = self.norm(output_BQH)
        if self.lm_head is None or self.draft_to_target is None:
            return head(normed_BQH)
        drafted: Tensor = self.lm_head(normed_BQH)
        whole = drafted.new_full((*drafted.shape[:-1], vocabulary), torch.finfo(drafted.dtype).min)
        whole[..., self.draft_to_target] = drafted
        return whole

    def _rotated(self, states_BNQD: Tensor, position_BQ: Tensor) -> Tensor:
        cos, sin = self.rotary(states_BNQD, position_BQ)
        rotated: Tensor = apply_rotary_pos_emb(states_BNQD, states_BNQD, cos, sin)[0]
        return rotated


def save(drafter: Eagle3, backbone: PreTrainedModel, path: Path) -> None:
    """Write a drafter in the layout of `speculators`, with the backbone's embeddings and head."""
    tensors = {name: tensor.detach() for name, tensor in drafter.state_dict().items()}
    tensors["embed_tokens.weight"] = backbone.get_input_embeddings().weight.detach()
    if drafter.lm_head is None:
        tensors["lm_head.weight"] = backbone.get_output_embeddings().weight.detach()
    elif drafter.draft_to_target is not None:
        tensors["d2t"] = drafter.draft_to_target - torch.arange(len(drafter.draft_to_target))
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}, path / WEIGHTS)
    (path / CONFIG).write_text(json.dumps(drafter.config.to_dict(), indent=2) + "\n", encoding="utf-8")


def load(path: Path, backbone: PreTrainedModel) -> Eagle3:
    """Read a drafter of `speculators` or of EAGLE's authors for a backbone.

    Raises CheckpointError: files are missing or damaged, or belong to another backbone.
    """
    text = backbone.config.get_text_config()
    values = files.read_object(path / CONFIG, missing="it is not an EAGLE-3 drafter")
    tensors = files.read_tensors(path, WEIGHTS)
    with files.described_by(path / CONFIG):
        config = Eagle3Config.from_dict(values, layers=text.num_hidden_layers, where=str(path))
    tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    offset = tensors.pop("d2t", None)
    whole = offset is None and config.vocabulary == text.vocab_size
    for name in ("t2d", "embed_tokens.weight", *(["lm_head.weight"] if whole else [])):
        tensors.pop(name, None)
    with files.described_by(path / CONFIG):
        drafter = Eagle3(config, whole=whole)
    if not whole:
        if offset is None or offset.shape != (config.vocabulary,):
            shape = "none" if offset is None else list(offset.shape)
            raise CheckpointError(f"{path}: d2t is required for a vocabulary of {config.vocabulary}, found {shape}")
        drafter.draft_to_target = token_D = offset.long() + torch.arange(len(offset))
        if not 0 <= int(token_D.min()) <= int(token_D.max()) < text.vocab_size:
            raise CheckpointError(f"{path}: d2t must name tokens below {text.vocab_size}, found another: it is damaged")
    expected = {name: tensor.shape for name, tensor in drafter.state_dict().items()}
    stored = {name: tensor.shape for name, tensor in tensors.items()}
    if expected != stored or config.layer.hidden_size != text.hidden_size:
        wrong = sorted(name for name in expected.keys() | stored.keys() if expected.get(name) != stored.get(name))
        raise CheckpointError(
            f"{path}: a drafter of this backbone is required; these tensors differ: {wrong or 'size'}"
        )
    drafter.load_state_dict(tensors)
    return in_dtype(drafter, backbone.dtype).to(backbone.device).eval()


def head_of(backbone: PreTrainedModel) -> tuple[Callable[[Tensor], Tensor], int]:
    """Return the backbone's output head and the size of its vocabulary."""
    return output_head(backbone), int(backbone.get_input_embeddings().weight.shape[0])
