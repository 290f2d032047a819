"""Tiny random models of every supported family, built in memory from a seed: no files, no network."""

import copy

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 96

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

FAMILIES: dict[str, dict[str, object]] = {
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": None},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 12},
    "gemma3_text": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 12,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "olmo2": {},
    "phi3": {"sliding_window": None},
    "smollm3": {},
    "qwen3_moe": _EXPERTS,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
}
"""Families by transformers' model type; the windows are shorter than the test texts on purpose."""

WINDOWED = {
    "mistral": {"sliding_window": 8},
    "phi3": {"sliding_window": 8},
    "mixtral": {**FAMILIES["mixtral"], "sliding_window": 8},
}
"""Families whose layers all have a window when their configuration says so."""

MOE = ("qwen3_moe", "mixtral", "gpt_oss")

_RECURRENT = {
    "hidden_size": 32,
    "num_hidden_layers": 4,  # layers 0 to 2 are recurrent, layer 3 is attention
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
}
_SHARED_EXPERT = {**_EXPERTS, "shared_expert_intermediate_size": 16}

HYBRID: dict[str, dict[str, object]] = {
    "qwen3_5_text": _RECURRENT,
    "qwen3_next": {**_RECURRENT, **_SHARED_EXPERT},
    "qwen3_5_moe_text": {**_RECURRENT, **_SHARED_EXPERT},
    "olmo_hybrid": {k: v for k, v in _RECURRENT.items() if k != "head_dim"},
}
"""Families with gated delta rule layers: grouped value heads, key and value heads of different widths."""


_BUILT: dict[str, tuple[PreTrainedModel, Tensor]] = {}
"""Models built so far, and the state of the random numbers after each."""


def tiny(family: str, *, seed: int = 0, attn: str | None = None, **overrides: object) -> PreTrainedModel:
    """Return a tiny random model whose logits are spread widely enough to have no near-ties.

    It is the caller's own: a copy of one that is built once, which takes half the time.
    """
    key = repr((family, seed, attn, sorted(overrides.items())))
    if key not in _BUILT:
        model = _build(family, seed, attn, overrides)
        if model.num_parameters() > 1 << 20:
            return model
        _BUILT[key] = model, torch.get_rng_state()
    model, state = _BUILT[key]
    torch.set_rng_state(state)
    return copy.deepcopy(model)


def _build(family: str, seed: int, attn: str | None, overrides: dict[str, object]) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**_SHAPE, **{**FAMILIES, **HYBRID}[family], **overrides})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **({"attn_implementation": attn} if attn else {}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "sinks" in name:
                parameter.normal_(0, 0.12)
            if name.endswith("A_log"):
                parameter.uniform_(-4, 0)  # decays of 0.3 to 0.98 a token: fresh models forget at once
    model.generation_config.eos_token_id = None
    return model.eval()


def perturb(model: PreTrainedModel, *, scale: float = 0.05, seed: int = 1) -> None:
    """Move every twin tensor, so that drafts are sometimes wrong."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".diffusion." in name:
                parameter.add_(torch.randn_like(parameter) * scale)
