"""What is refused before a weight is loaded: versions, settings and checkpoints that would not draft as they should.

Reads vLLM's objects by attribute and checkpoints by their headers; imports neither vLLM nor torch.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

from safetensors import SafetensorError, safe_open

SUPPORTED = "0.32"
"""The release series of vLLM that the plugin is tested with; its interfaces move between series."""
BACKENDS = ("FLASH_ATTN", "TRITON_ATTN", "FLEX_ATTENTION", "CPU_ATTN")
"""Attention backends that let a block see both ways over the paged cache."""

_PLAIN_CACHE = ("auto", "float16", "bfloat16", "float32", "half", "float")
_TWINS = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
_EXAMPLE = '{"method": "draft_model", "model": "<the same checkpoint>", "num_speculative_tokens": 15}'

Check = Callable[[Any], Iterator[str]]


def problems(config: Any, *, version: str) -> list[str]:
    """Return why an Orthrus checkpoint cannot be served with a `VllmConfig` in this version; empty when it can."""
    if not version.startswith(f"{SUPPORTED}."):
        return [f"vLLM {SUPPORTED}.x is supported, found {version}: install 'vllm=={SUPPORTED}.*'"]
    checks: tuple[Check, ...] = (_everywhere, _weights)
    if config.speculative_config is not None:
        method = list(_method(config))
        if method:
            return method  # what follows reads fields that another method may leave unset
        checks = (_everywhere, _block, _speculation, _cache, _parallel, _windows, _weights)
    return [problem for check in checks for problem in check(config)]


def _everywhere(config: Any) -> Iterator[str]:
    stages = config.parallel_config.pipeline_parallel_size
    if stages > 1:
        yield f"--pipeline-parallel-size must be 1, found {stages}: split the model with --tensor-parallel-size"
    if config.lora_config is not None:
        yield "LoRA is not supported, found --enable-lora: leave it out, or merge the adapter into the checkpoint"
    quantization = config.model_config.quantization
    if quantization is not None:
        yield f"weights must not be quantised, found --quantization {quantization}: serve the plain checkpoint"


def _method(config: Any) -> Iterator[str]:
    spec = config.speculative_config
    if spec.method != "draft_model":
        yield f"the speculative method must be 'draft_model', found {spec.method!r}: use {_EXAMPLE}"
        return
    target, draft = config.model_config, spec.draft_model_config
    if _resolved(target.model) != _resolved(draft.model) or target.revision != draft.revision:
        yield (
            f"the draft model must be the served checkpoint itself, {_named(target)}, found {_named(draft)}: name the "
            "same model, and revision, in both places"
        )


def _block(config: Any) -> Iterator[str]:
    fields = config.model_config.hf_config
    block, mask = getattr(fields, "block_size", None), getattr(fields, "mask_token_id", None)
    drafts = config.speculative_config.num_speculative_tokens
    if not _is_count(block) or block < 2:
        yield f"config.json must hold block_size, an integer of at least 2, found {block!r}: convert the model again"
    elif drafts >= block:
        yield (
            f"num_speculative_tokens must be at most {block - 1}: the view was trained for blocks of {block}, an "
            f"anchor and its drafts; found {drafts}"
        )
    if not _is_count(mask) or not 0 <= mask < fields.vocab_size:
        yield (
            f"config.json must hold mask_token_id, a token below {fields.vocab_size}, found {mask!r}: convert the "
            "model again"
        )


def _speculation(config: Any) -> Iterator[str]:
    spec = config.speculative_config
    unset = {
        "parallel_drafting": False,
        "disable_padded_drafter_batch": False,
        "use_heterogeneous_vocab": False,
        "enable_adaptive_verification": False,
        "num_speculative_tokens_per_batch_size": None,
        "quantization": None,
        "attention_backend": None,
        "kv_cache_dtype": None,
    }
    for name, default in unset.items():
        value = getattr(spec, name)
        if value not in (default, None):
            yield f"{name} in the speculative configuration is not supported, found {value!r}: leave it out"


def _cache(config: Any) -> Iterator[str]:
    kind = str(config.cache_config.cache_dtype)
    if kind not in _PLAIN_CACHE:
        yield f"--kv-cache-dtype must be 'auto' with drafts, found {kind!r}: both views share one plain cache"
    if config.kv_transfer_config is not None:
        yield "KV connectors are not supported with drafts, found --kv-transfer-config: leave it out"
    backend = config.attention_config.backend
    if backend is not None and backend.name not in BACKENDS:
        yield f"drafts need an attention backend out of {', '.join(BACKENDS)}, found {backend.name}: name another"


def _parallel(config: Any) -> Iterator[str]:
    flags = ("data_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size")
    for name in flags:
        value = getattr(config.parallel_config, name)
        if value > 1:
            yield f"--{name.replace('_', '-')} must be 1 with drafts, found {value}: run several servers instead"
    if config.parallel_config.enable_dbo:
        yield "--enable-dbo is not supported with drafts: leave it out"


def _windows(config: Any) -> Iterator[str]:
    kinds = sorted(set(getattr(config.model_config.hf_config, "layer_types", None) or ()) - {"full_attention"})
    if kinds:
        yield f"every layer must attend to the whole text with drafts, found {', '.join(kinds)}: serve it plainly"


def _weights(config: Any) -> Iterator[str]:
    """Compare a local checkpoint's headers with what the twins need; one still on the Hub is checked on loading."""
    path = Path(config.model_config.model)
    if not path.is_dir() or config.load_config.load_format not in ("auto", "safetensors", "hf"):
        return
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as opened:
                shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            yield f"{file} is damaged ({error}): fetch or write it again"
            return
    rank = getattr(config.model_config.hf_config, "markov_rank", 0)
    if not _is_count(rank) or rank < 0:
        yield f"config.json must hold markov_rank, an integer of at least 0, or leave it out, found {rank!r}"
        return
    for name, shape in view_shapes(config.model_config.hf_config).items():
        if shapes.get(name) != shape:
            held = list(shapes[name]) if name in shapes else "none"
            yield (
                f"{path} must hold {name} of shape {list(shape)}, found {held}: it is not an Orthrus checkpoint of "
                "the official layout (orthrus convert MODEL OUT --format official)"
            )
            return


def view_shapes(fields: Any) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the view's tensors in the official layout, for a Qwen3 configuration."""
    rank = getattr(fields, "markov_rank", 0)
    correction = {f"markov.{part}_VR": (fields.vocab_size, rank) for part in ("before", "after")} if rank else {}
    size, head = fields.hidden_size, fields.head_dim
    queries, keys = fields.num_attention_heads * head, fields.num_key_value_heads * head
    shapes: tuple[tuple[int, ...], ...] = (
        (queries, size),
        (keys, size),
        (keys, size),
        (size, queries),
        (head,),
        (head,),
    )
    twins = {
        f"model.layers.{layer}.self_attn.{twin}_diff.weight": shape
        for layer in range(fields.num_hidden_layers)
        for twin, shape in zip(_TWINS, shapes, strict=True)
    }
    return twins | correction


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _resolved(model: str) -> str:
    path = Path(model)
    return str(path.resolve()) if path.exists() else model


def _named(model: Any) -> str:
    return f"{model.model} ({model.revision})" if model.revision else str(model.model)
