"""The model inside vLLM: Qwen3 with a second set of attention projections, and the pass that uses them.

Both passes run vLLM's own forward functions over the same layers, attention objects and cache. Shapes: T tokens of all
rows, C hidden size, V vocabulary.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CacheConfig, VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3ForCausalLM, Qwen3Model
from vllm.model_executor.models.utils import maybe_prefix

from orthrus.model.markov import Markov

_PROJECTIONS = ("qkv_proj", "o_proj", "q_norm", "k_norm")


class Swapped:
    """A module with other parts in some places; everything else is the module's own."""

    def __init__(self, module: nn.Module, **parts: Any) -> None:
        self._module = module
        self.__dict__.update(parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class OrthrusDecoderLayer(Qwen3DecoderLayer):
    """A layer of the backbone whose attention holds the view's projections too, under their names on disk.

    `…q_proj_diff` and its neighbours become shards of `qkv_proj_diff` by vLLM's own renaming.
    """

    def __init__(
        self,
        config: Any,
        cache_config: CacheConfig | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(config, cache_config, quant_config, prefix, **kwargs)
        attention, heads, keys = self.self_attn, config.num_attention_heads, config.num_key_value_heads
        prefix = f"{prefix}.self_attn"
        attention.qkv_proj_diff = QKVParallelLinear(
            config.hidden_size,
            attention.head_dim,
            heads,
            keys,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj_diff",
        )
        attention.o_proj_diff = RowParallelLinear(
            heads * attention.head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj_diff",
        )
        attention.q_norm_diff = RMSNorm(attention.head_dim, eps=config.rms_norm_eps)
        attention.k_norm_diff = RMSNorm(attention.head_dim, eps=config.rms_norm_eps)

    def draft(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the layer with the view's projections; arguments and results are those of `forward`."""
        twins = {name: getattr(self.self_attn, f"{name}_diff") for name in _PROJECTIONS}
        attention = partial(Qwen3Attention.forward, Swapped(self.self_attn, **twins))
        layer = Swapped(self, self_attn=attention)
        return Qwen3DecoderLayer.forward(layer, positions, hidden_states, residual)


class OrthrusModel(Qwen3Model):
    """The backbone's layers, each with the view's projections."""

    decoder_layer_type = OrthrusDecoderLayer


class OrthrusForCausalLM(Qwen3ForCausalLM):
    """What vLLM serves: plainly, it is the backbone."""

    packed_modules_mapping = {  # noqa: RUF012 (vLLM's own declaration)
        **Qwen3ForCausalLM.packed_modules_mapping,
        "qkv_proj_diff": ["q_proj_diff", "k_proj_diff", "v_proj_diff"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)  # the stock one builds stock layers
        config = vllm_config.model_config.hf_config
        self.config = config
        self.vllm_config = vllm_config
        self.quant_config = vllm_config.quant_config
        self.model = OrthrusModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=self.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        rank = getattr(config, "markov_rank", 0)
        if rank:
            device, dtype = torch.get_default_device(), torch.get_default_dtype()
            self.markov = Markov(config.vocab_size, rank, device=device, dtype=dtype)  # every device holds all of it
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors


class OrthrusDraft(nn.Module):
    """The diffusion view of a loaded model, as the draft model that vLLM's drafters expect; owns no weights."""

    def __init__(self, target: OrthrusForCausalLM) -> None:
        super().__init__()
        self._target = (target,)  # in a tuple, so that its weights are not counted, moved or loaded twice

    @property
    def attention_layers(self) -> set[str]:
        """Names of the attention objects, and so of the cache, that both views share."""
        return {layer.self_attn.attn.layer_name for layer in self._target[0].model.layers}

    @property
    def markov(self) -> Markov | None:
        """The correction of a slot by the token before it, if the view has one."""
        return getattr(self._target[0], "markov", None)

    def forward(self, input_ids: Tensor, positions: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        """Return final hidden states `[T, C]` of blocks of tokens `[T]`."""
        model = self._target[0].model
        hidden_states, residual = model.embed_input_ids(input_ids), None
        for layer in model.layers:
            hidden_states, residual = layer.draft(positions, hidden_states, residual)
        return model.norm(hidden_states, residual)[0]

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return self._target[0].compute_logits(hidden_states)

    def get_top_tokens(self, hidden_states: Tensor) -> Tensor:
        """Return the likeliest tokens `[T]` without gathering logits across devices."""
        return self._target[0].get_top_tokens(hidden_states)
