"""DFlash (z-lab), DSpark and JetSpec: a few layers that fill a block in one pass, in one class of transformers.

The layers read the backbone's hidden states of all tokens before the block, then the anchor and the masks.

Shapes: B rows, T tokens of context, Q slots of blocks, S keys, A tapped layers, C hidden size, H key/value heads, D
head dimension.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import PreTrainedModel, Qwen3Config

from orthrus.errors import CheckpointError, ConfigError
from orthrus.kernels import attention
from orthrus.kernels.masks import LayerMasks
from orthrus.model.markov import Markov
from orthrus.peers.shape import FIELDS, shape_of

try:
    from transformers import MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel
    from transformers.models.muse_glimmer_assistant.modeling_muse_glimmer_assistant import apply_rotary_pos_emb
except ImportError as error:
    raise ConfigError("DFlash needs the drafter of transformers 5.19 or newer: pip install -U transformers") from error


@dataclass(frozen=True, kw_only=True)
class DFlashConfig:
    """Describe a drafter.

    Attributes:
        shape: the layers, as transformers describes them, with the kind of attention of each.
        taps: decoder layers of the backbone whose outputs are read, by index.
        block_size: slots of a block, the anchor's counted.
        shift: whether a slot predicts the next token (DSpark). Without it the anchor's slot predicts nothing.
        causal: whether a slot sees only the earlier slots of its block (JetSpec), in layers without a window;
            `sliding_causal`, in layers with one.
        markov_rank: rank of the correction by the previous token (DSpark); 0 for none.
        embedding_scale, multiplier: factors of the embeddings and of the logits.
        softcap: bound of the logits after that, by tanh; None for none.
        backbone: name or path of the backbone.
    """

    shape: Qwen3Config
    taps: tuple[int, ...]
    block_size: int
    mask_token_id: int
    shift: bool = False
    causal: bool = False
    sliding_causal: bool = False
    markov_rank: int = 0
    embedding_scale: float = 1.0
    multiplier: float = 1.0
    softcap: float | None = None
    backbone: str | None = None

    @property
    def proposals(self) -> int:
        return self.block_size if self.shift else self.block_size - 1

    @classmethod
    def of(
        cls, model: PreTrainedModel, *, layers: int, taps: Sequence[int] | None = None, **more: Any
    ) -> "DFlashConfig":
        """Return the configuration of a drafter whose layers have the backbone's shape."""
        text = model.config.get_text_config()
        taps = spread(text.num_hidden_layers, 3) if taps is None else tuple(taps)
        if not taps or not all(0 <= tap < text.num_hidden_layers for tap in taps):
            raise ConfigError(f"taps must be among the backbone's {text.num_hidden_layers} layers, found {list(taps)}")
        shape = Qwen3Config(**shape_of(text), num_hidden_layers=layers, tie_word_embeddings=False)
        softcap = getattr(text, "final_logit_softcapping", None)
        return cls(shape=shape, taps=tuple(taps), softcap=softcap, **more)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration in z-lab's layout; the variants' fields keep their published names."""
        details: dict[str, Any] = {
            "block_size": self.block_size,
            "mask_token_id": self.mask_token_id,
            "target_layer_ids": list(self.taps),
            "causal": self.causal,
            "causal_head": self.causal,
        }
        if self.shift or self.markov_rank:
            details |= {"projector_type": "dspark", "shift_label": self.shift, "use_confidence_head": False}
            details |= {"markov_rank": self.markov_rank, "markov_head_type": "vanilla"}
        if self.softcap is not None:
            details["final_logit_softcapping"] = self.softcap
        layers: dict[str, Any] = self.shape.to_diff_dict()
        return layers | {
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            "backbone": self.backbone,
            "block_size": self.block_size,
            "dflash_config": details,
            "is_causal": self.causal,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str) -> "DFlashConfig":
        """Read a configuration of z-lab, JetSpec, DeepSpec or speculators; raises CheckpointError for any other."""
        nested = values.get("transformer_layer_config")
        named = values.get("speculators_model_type") or "".join(values.get("architectures") or [])
        fields = {**values, **(values.get("dflash_config") or {})}
        ids = fields.get("target_layer_ids")
        if ids is None and fields.get("aux_hidden_state_layer_ids") is not None:
            ids = [index - 1 for index in fields["aux_hidden_state_layer_ids"]]
        if ids is None and (layers := values.get("num_target_layers")):
            drafts = int(values["num_hidden_layers"])
            ids = spread(layers, drafts) if drafts > 1 else (layers // 2,)
        mask, block = fields.get("mask_token_id"), fields.get("block_size")
        if not ids or mask is None or block is None:
            raise CheckpointError(
                f"{where}: target_layer_ids, mask_token_id and block_size of a DFlash drafter are required, found "
                f"{sorted(values)}"
            )
        heads = {"markov_head_type": ("vanilla",)} if fields.get("markov_rank") else {}
        for name, served in ({"projector_type": ("dflash", "dspark")} | heads).items():
            value = fields.get(name, served[0])
            if value not in served:
                raise CheckpointError(f"{where}: {name} must be {served[0]!r}, found {value!r}: it is not served")
        for name in _NOT_SERVED:
            if fields.get(name):
                raise CheckpointError(f"{where}: {name} is of a drafter that is not served, found {fields[name]!r}")
        causal = bool(fields.get("causal", fields.get("causal_head", fields.get("is_causal") or False)))
        sliding = fields.get("is_causal")
        if sliding is None:  # z-lab's windows are causal unless the configuration says so; speculators' say otherwise
            sliding = not fields.get("sliding_window_non_causal", False)
        return cls(
            shape=Qwen3Config.from_dict(dict(nested or values)),
            taps=tuple(ids),
            block_size=int(block),
            mask_token_id=int(mask),
            shift=bool(fields.get("sample_from_anchor", fields.get("shift_label", "dspark" in named.lower()))),
            causal=causal,
            sliding_causal=causal or bool(sliding),
            markov_rank=int(fields.get("markov_rank") or 0),
            embedding_scale=float(fields.get("input_embedding_scale", 1.0)),
            multiplier=float(fields.get("output_multiplier", 1.0)),
            softcap=fields.get("final_logit_softcapping") or None,
            backbone=values.get("backbone"),
        )


_NOT_SERVED = ("conv_kernel_size", "selector_rank", "use_swa", "attention_sink_bias")
"""Fields of DFlash-2, and of drafters with other windows or attention sinks."""


def spread(layers: int, count: int) -> tuple[int, ...]:
    """Return `count` layers, evenly from the second to the third from the end, as z-lab chooses them.

    Of few layers, from the first to the last.
    """
    first, last = (1, layers - 3) if layers >= 6 else (0, layers - 1)
    return tuple(round(first + index * (last - first) / max(count - 1, 1)) for index in range(count))


class Vocabulary(nn.Module):
    """A reduced vocabulary: D of the V tokens, and an output head for them."""

    token_D: Tensor

    def __init__(self, size: int, tokens: int) -> None:
        super().__init__()
        self.head = nn.Linear(size, tokens, bias=False)
        self.register_buffer("token_D", torch.arange(tokens))

    def logits(self, hidden: Tensor, vocabulary: int) -> Tensor:
        """Return logits `[..., V]`; no other token is ever drafted."""
        drafted: Tensor = self.head(hidden)
        lowest = drafted.new_full((*drafted.shape[:-1], vocabulary), torch.finfo(drafted.dtype).min)
        return lowest.index_copy(-1, self.token_D, drafted)


class DFlash(nn.Module):
    """The drafter's tensors: transformers' body, and DSpark's correction.

    Embedding and output head are the backbone's. With a reduced vocabulary of `tokens` tokens the drafter has a head.

    Raises ConfigError: the configuration asks for biases in attention.
    """

    def __init__(self, config: DFlashConfig, *, tokens: int | None = None) -> None:
        super().__init__()
        shape = config.shape
        if shape.attention_bias:
            raise ConfigError("drafters whose attention has biases are not served: transformers' body has none")
        attention.register()
        names = (*FIELDS, "num_hidden_layers", "layer_types", "initializer_range")
        body = {name: value for name in names if (value := getattr(shape, name, None)) is not None}
        body.pop("vocab_size")
        self.config = config
        self.body = MuseGlimmerAssistantModel(
            MuseGlimmerAssistantConfig(
                **body,
                sliding_window=shape.sliding_window or shape.max_position_embeddings,
                block_size=config.block_size,
                mask_token_id=config.mask_token_id,
                target_layer_ids=list(config.taps),
                attn_implementation=attention.NAME,
            )
        )
        self.vocabulary = None if tokens is None else Vocabulary(shape.hidden_size, tokens)
        self.markov: Markov | None = None
        if config.markov_rank:
            device, dtype = torch.device("cpu"), torch.get_default_dtype()
            self.markov = Markov(shape.vocab_size, config.markov_rank, device=device, dtype=dtype)

    @property
    def windows(self) -> tuple[int, ...]:
        """The distinct sliding windows of the layers."""
        sliding = "sliding_attention" in self.body.config.layer_types
        return (int(self.body.config.sliding_window),) if sliding else ()

    def forward(
        self,
        embedded_BQC: Tensor,
        context_BTF: Tensor,
        position: Tensor,
        masks: LayerMasks,
        sliding: LayerMasks,
        cache: Any = None,
    ) -> Tensor:
        """Return hidden states `[B, Q, C]` of the slots of blocks.

        Args:
            context_BTF: tapped hidden states side by side, F = A * C; none where the cache has the keys already.
            position: of context and slots, `[B, T + Q]`.
            cache: takes keys and values of all of these and returns those in reach; None for none beside them.
        """
        by_kind = {"full_attention": masks.of(None), "sliding_attention": sliding.of(next(iter(self.windows), None))}
        hidden: Tensor = self.body(
            noise_embeds=embedded_BQC,
            context_hidden_states=context_BTF,
            attention_mask=by_kind,
            position_ids=position,
            past_key_values=cache,
            use_cache=False,
        ).last_hidden_state
        return hidden

    def context(self, context_BTF: Tensor, position_BT: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each layer's keys and values `[B, H, T, D]` of tokens before a block."""
        fused_BTC = self.body.encoder(context_BTF)
        cos, sin = self.body.rotary_emb(fused_BTC, position_BT)
        for layer in self.body.layers:
            module = layer.self_attn
            heads = (*fused_BTC.shape[:2], -1, module.head_dim)
            key_BHTD = module.k_norm(module.k_proj(fused_BTC).view(heads).transpose(1, 2))
            _, turned_BHTD = apply_rotary_pos_emb(key_BHTD, key_BHTD, cos, sin)
            yield turned_BHTD, module.v_proj(fused_BTC).view(heads).transpose(1, 2)

    def embedded(self, backbone: PreTrainedModel, token_BQ: Tensor) -> Tensor:
        """Return the backbone's embeddings of anchors and masks, without a scaling of its own."""
        return embedding(token_BQ, backbone.get_input_embeddings().weight) * self.config.embedding_scale

    def logits(self, backbone: PreTrainedModel, hidden: Tensor) -> Tensor:
        """Return logits by the backbone's head or its own; scaling is the drafter's, not the backbone's."""
        if self.vocabulary is not None:
            return self.vocabulary.logits(hidden, self.config.shape.vocab_size)
        scaled: Tensor = backbone.get_output_embeddings()(hidden) * self.config.multiplier
        cap = self.config.softcap
        return scaled if cap is None else torch.tanh(scaled / cap) * cap
