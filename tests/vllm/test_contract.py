"""What the plugin stands on is there in the installed vLLM, and what it does not concern is as vLLM made it."""

import dataclasses
import inspect
import json
import shutil
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.vllm


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_plugin_is_found_by_its_entry_point() -> None:
    from orthrus.integrations.vllm import register

    assert [e.load() for e in entry_points(group="vllm.general_plugins", name="orthrus")] == [register]


def test_registering_twice_changes_nothing_and_stock_models_keep_their_classes() -> None:
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from orthrus.integrations.vllm import ARCHITECTURE, register

    register()
    others = {name: ModelRegistry.models[name] for name in ModelRegistry.models if name != ARCHITECTURE}
    hooks = {name: hook for name, hook in MODELS_CONFIG_MAP.items() if name != ARCHITECTURE}
    register()
    assert {name: ModelRegistry.models[name] for name in others} == others
    assert all(not hook.__module__.startswith("orthrus") for hook in hooks.values())
    assert ModelRegistry.models["Qwen3ForCausalLM"].load_model_cls().__module__ == "vllm.model_executor.models.qwen3"


def test_stock_drafters_are_made_by_their_own_classes() -> None:
    from vllm.v1.spec_decode.draft_model import DraftModelProposer
    from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator

    from orthrus.integrations.vllm import register

    register()
    other = SimpleNamespace(architectures=["Qwen3ForCausalLM"], model="other")
    config = SimpleNamespace(model_config=other, speculative_config=SimpleNamespace(draft_model_config=other))
    for stock in (DraftModelProposer, StandaloneARSpeculator):
        assert "__new__" in vars(stock)
        assert type(stock.__new__(stock, config, "cpu")) is stock


def test_what_the_first_runner_calls_and_gives() -> None:
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.spec_decode.draft_model import DraftModelProposer as Stock

    from orthrus.integrations.vllm.v1 import OrthrusProposer

    given = set(parameters(Stock.propose))
    assert {"next_token_ids", "common_attn_metadata", "sampling_metadata", "num_rejected_tokens_gpu"} <= given
    for name in ("load_model", "propose", "dummy_run", "initialize_cudagraph_keys"):
        assert name in vars(OrthrusProposer)
    for name in ("build_per_group_and_layer_attn_metadata", "_sample_draft_tokens", "_greedy_sample"):
        assert callable(getattr(Stock, name))
    fields = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
    assert {"causal", "seq_lens", "block_table_tensor", "slot_mapping", "seq_lens_cpu_upper_bound"} <= fields


def test_what_the_second_runner_calls_and_gives() -> None:
    """Its module cannot be run on the CPU, but it can be imported and compared with the class it extends."""
    from vllm.v1.worker.gpu.spec_decode.dflash.cudagraph import DFlashCudaGraphManager
    from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator as Stock

    from orthrus.integrations.vllm.v2 import OrthrusSpeculator

    assert not inspect.isabstract(OrthrusSpeculator)
    assert parameters(OrthrusSpeculator.load_draft_model) == parameters(Stock.load_draft_model)
    own = [name for name in parameters(OrthrusSpeculator.propose) if name != "unused"]
    stock = parameters(Stock.propose)
    assert own[:12] == stock[:12]
    assert set(own) <= set(stock)
    assert {"forward_fn", "prepare_forward", "causal"} <= set(parameters(DFlashCudaGraphManager.capture))
    for name in (
        "sample_draft",
        "_copy_request_inputs",
        "_build_uniform_attn_metadata",
        "_update_draft_decode_metadata",
    ):
        assert callable(getattr(Stock, name))


REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "too many drafts": ({"num_speculative_tokens": 16}, {}, "at most 15"),
    "wrong method": ({"method": "ngram", "model": None}, {}, "must be 'draft_model', found 'ngram'"),
    "quantised cache": ({}, {"kv_cache_dtype": "fp8"}, "--kv-cache-dtype must be 'auto'"),
    "dynamic counts": (
        {"num_speculative_tokens_per_batch_size": [[1, 4, 3]]},
        {},
        "num_speculative_tokens_per_batch_size",
    ),
}


def configure(checkpoint: Path, spec: dict[str, Any], **engine: Any) -> Any:
    """Build vLLM's configuration as its server does; nothing is loaded."""
    from vllm import EngineArgs

    method = {"method": "draft_model", "model": str(checkpoint), "num_speculative_tokens": 15, **spec}
    return EngineArgs(str(checkpoint), dtype="float32", speculative_config=method, **engine).create_engine_config()


@pytest.mark.parametrize("case", REFUSALS)
def test_settings_are_refused_before_anything_is_loaded(case: str, checkpoint: Path) -> None:
    spec, engine, sentence = REFUSALS[case]
    with pytest.raises(ValueError, match="cannot be served") as refused:
        configure(checkpoint, spec, **engine)
    assert sentence in str(refused.value)


def test_checkpoints_are_refused_before_anything_is_loaded(checkpoint: Path, tmp_path: Path) -> None:
    """One without its mask token, and one without its view."""
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    fields = json.loads((checkpoint / "config.json").read_text())
    del fields["mask_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="must hold mask_token_id, a token below 2048, found None"):
        configure(tmp_path, {})
    shutil.copy(checkpoint / "config.json", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="q_proj_diff"):
        configure(tmp_path, {})


def test_supported_settings_are_completed(checkpoint: Path) -> None:
    """Two-way attention is asked for, and no more rows than a pass can verify."""
    config = configure(checkpoint, {}, max_num_seqs=256, max_num_batched_tokens=1024)
    assert config.attention_config.use_non_causal
    assert config.scheduler_config.max_num_seqs == 64
    assert config.num_lookahead_tokens == 15
