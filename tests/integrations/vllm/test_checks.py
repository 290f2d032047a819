"""Settings that would not draft as they should are refused, each with a sentence, and others are not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from orthrus.errors import ConfigError
from orthrus.integrations.vllm import checks, hook

VERSION = "0.32.0"
FIELDS: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 8,
    "head_dim": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "block_size": 16,
    "mask_token_id": 3,
    "layer_types": ["full_attention"] * 2,
}


def configuration(path: str | Path, **changes: Any) -> Any:
    """What the checks read of a `VllmConfig` that drafts; `changes` are dotted paths with `__` for the dot."""
    model = SimpleNamespace(model=str(path), revision=None, quantization=None, hf_config=SimpleNamespace(**FIELDS))
    config = SimpleNamespace(
        model_config=model,
        speculative_config=SimpleNamespace(
            method="draft_model",
            draft_model_config=SimpleNamespace(model=str(path), revision=None),
            num_speculative_tokens=15,
            parallel_drafting=False,
            disable_padded_drafter_batch=False,
            use_heterogeneous_vocab=False,
            enable_adaptive_verification=False,
            num_speculative_tokens_per_batch_size=None,
            quantization=None,
            attention_backend=None,
            kv_cache_dtype=None,
        ),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            data_parallel_size=1,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
            enable_dbo=False,
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        attention_config=SimpleNamespace(backend=None, use_non_causal=False),
        scheduler_config=SimpleNamespace(max_num_seqs=64, max_num_batched_tokens=2048),
        load_config=SimpleNamespace(load_format="auto"),
        lora_config=None,
        kv_transfer_config=None,
    )
    for place, value in changes.items():
        *parents, name = place.split("__")
        owner: Any = config
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, value)
    return config


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory with the tensors that the view needs, and nothing else."""
    shapes = checks.view_shapes(SimpleNamespace(**FIELDS))
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    return tmp_path


def only(problems: list[str]) -> str:
    assert len(problems) == 1, problems
    return problems[0]


def test_what_is_supported_is_not_refused(checkpoint: Path) -> None:
    assert checks.problems(configuration(checkpoint), version=VERSION) == []
    assert checks.problems(configuration(checkpoint, speculative_config=None), version="0.32.7") == []


def test_a_correction_needs_its_tensors(checkpoint: Path) -> None:
    """Both factors, of the rank that the configuration names."""
    corrected = configuration(checkpoint, model_config__hf_config__markov_rank=4)
    assert "must hold markov.before_VR of shape [32, 4], found none" in only(
        checks.problems(corrected, version=VERSION)
    )
    shapes = checks.view_shapes(corrected.model_config.hf_config)
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, checkpoint / "model.safetensors")
    assert checks.problems(corrected, version=VERSION) == []


REFUSED: dict[str, tuple[Any, str]] = {
    "parallel_config__pipeline_parallel_size": (2, "--pipeline-parallel-size must be 1, found 2"),
    "parallel_config__data_parallel_size": (2, "--data-parallel-size must be 1"),
    "parallel_config__decode_context_parallel_size": (4, "--decode-context-parallel-size must be 1"),
    "parallel_config__prefill_context_parallel_size": (2, "--prefill-context-parallel-size must be 1"),
    "parallel_config__enable_dbo": (True, "--enable-dbo is not supported"),
    "lora_config": (object(), "LoRA is not supported"),
    "kv_transfer_config": (object(), "KV connectors are not supported"),
    "model_config__quantization": ("fp8", "must not be quantised"),
    "cache_config__cache_dtype": ("fp8_e4m3", "--kv-cache-dtype must be 'auto' with drafts, found 'fp8_e4m3'"),
    "attention_config__backend": (SimpleNamespace(name="FLASHINFER"), "found FLASHINFER"),
    "speculative_config__method": ("ngram", "must be 'draft_model', found 'ngram'"),
    "speculative_config__num_speculative_tokens": (16, "at most 15: the view was trained for blocks of 16"),
    "speculative_config__draft_model_config": (SimpleNamespace(model="other", revision=None), "found other"),
    "speculative_config__parallel_drafting": (True, "parallel_drafting in the speculative configuration"),
    "speculative_config__use_heterogeneous_vocab": (True, "use_heterogeneous_vocab"),
    "speculative_config__num_speculative_tokens_per_batch_size": ([(1, 4, 3)], "num_speculative_tokens_per_batch"),
    "speculative_config__kv_cache_dtype": ("fp8", "kv_cache_dtype in the speculative configuration"),
    "model_config__hf_config__mask_token_id": (None, "must hold mask_token_id, a token below 32, found None"),
    "model_config__hf_config__block_size": (True, "must hold block_size, an integer of at least 2, found True"),
    "model_config__hf_config__markov_rank": (-1, "must hold markov_rank, an integer of at least 0"),
    "model_config__hf_config__layer_types": (["full_attention", "linear_attention"], "found linear_attention"),
}


@pytest.mark.parametrize("place", REFUSED)
def test_each_unsupported_setting_is_refused_by_name(place: str, checkpoint: Path) -> None:
    value, sentence = REFUSED[place]
    assert sentence in only(checks.problems(configuration(checkpoint, **{place: value}), version=VERSION))


@pytest.mark.parametrize(
    "place",
    ["parallel_config__pipeline_parallel_size", "lora_config", "model_config__quantization", "kv_transfer_config"],
)
def test_without_drafts_only_what_the_model_cannot_do_is_refused(place: str, checkpoint: Path) -> None:
    config = configuration(checkpoint, speculative_config=None, **{place: REFUSED[place][0]})
    assert len(checks.problems(config, version=VERSION)) == (place != "kv_transfer_config")


@pytest.mark.parametrize("version", ["0.31.4", "0.33.0", "0.320.1", "dev"])
def test_other_versions_are_refused_and_named(version: str, checkpoint: Path) -> None:
    found = only(checks.problems(configuration(checkpoint, speculative_config=None), version=version))
    assert found == f"vLLM 0.32.x is supported, found {version}: install 'vllm==0.32.*'"


def test_the_same_place_may_be_written_in_two_ways(checkpoint: Path) -> None:
    draft = SimpleNamespace(model=f"{checkpoint}/../{checkpoint.name}", revision=None)
    config = configuration(checkpoint, speculative_config__draft_model_config=draft)
    assert checks.problems(config, version=VERSION) == []
    draft.revision = "other"
    assert "(other)" in only(checks.problems(config, version=VERSION))


def test_a_checkpoint_without_the_view_is_refused_by_its_first_missing_tensor(checkpoint: Path) -> None:
    save_file({"model.embed_tokens.weight": torch.zeros(32, 8)}, checkpoint / "model.safetensors")
    found = only(checks.problems(configuration(checkpoint), version=VERSION))
    assert "must hold model.layers.0.self_attn.q_proj_diff.weight of shape [16, 8], found none" in found
    config = configuration(checkpoint, load_config__load_format="dummy")
    assert checks.problems(config, version=VERSION) == []


def test_a_misshapen_or_damaged_checkpoint_is_refused(checkpoint: Path) -> None:
    config = configuration(checkpoint, model_config__hf_config__num_key_value_heads=1)
    assert "k_proj_diff.weight of shape [4, 8], found [8, 8]" in only(checks.problems(config, version=VERSION))
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert f"{file} is damaged" in only(checks.problems(configuration(checkpoint), version=VERSION))


def test_preparing_asks_for_two_way_attention_and_fits_rows_to_the_pass(checkpoint: Path) -> None:
    """2,048 tokens hold 128 rows of 16; an explicit backend is left alone."""
    config = configuration(checkpoint, scheduler_config__max_num_seqs=256)
    hook.prepare(config)
    assert config.attention_config.use_non_causal
    assert config.scheduler_config.max_num_seqs == 128
    named = configuration(checkpoint, attention_config__backend=SimpleNamespace(name="FLASH_ATTN"))
    hook.prepare(named)
    assert not named.attention_config.use_non_causal
    assert named.scheduler_config.max_num_seqs == 64


def test_a_pass_too_small_for_one_row_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="--max-num-batched-tokens must be at least 16 for 15 drafts, found 15"):
        hook.prepare(configuration(checkpoint, scheduler_config__max_num_batched_tokens=15))
