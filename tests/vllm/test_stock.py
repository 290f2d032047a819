"""A stock model, drafts and all, is served by vLLM's own classes where the plugin is installed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.vllm.drive import BASE, agreement, drafting, prompts, serve, texts

pytestmark = pytest.mark.vllm

OWN_FIELDS = ("block_size", "mask_token_id", "markov_rank", "auto_map")


@pytest.fixture
def stock(checkpoint: Path, tmp_path: Path) -> Path:
    """The backbone alone, as a Qwen3 checkpoint like any other."""
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    fields = json.loads((checkpoint / "config.json").read_text())
    fields = {name: value for name, value in fields.items() if name not in OWN_FIELDS}
    (tmp_path / "config.json").write_text(json.dumps({**fields, "architectures": ["Qwen3ForCausalLM"]}))
    tensors = load_file(checkpoint / "model.safetensors")
    weights = {name: w for name, w in tensors.items() if "_diff." not in name and not name.startswith("markov.")}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.mark.timeout(7200)
def test_each_checkpoint_is_served_by_its_own_classes(checkpoint: Path, stock: Path, record_property: Any) -> None:
    """And the backbone says the same under both names."""
    calls = [{"prompts": prompts(checkpoint)[::5], "sampling": {"temperature": 0.0, "max_tokens": 24}}]
    (plain,) = serve(checkpoint, BASE, calls)
    (other,) = serve(stock, {**BASE, **drafting(stock, drafts=3)}, calls)
    record_property("texts", agreement(texts(other), texts(plain)))
    record_property("classes", [plain["model_class"], other["model_class"], other["drafter_class"]])
    assert plain["model_class"] == "orthrus.integrations.vllm.model.OrthrusForCausalLM"
    assert other["model_class"] == "vllm.model_executor.models.qwen3.Qwen3ForCausalLM"
    assert other["drafter_class"] == "vllm.v1.spec_decode.draft_model.DraftModelProposer"
    assert other["accepted"] > 0
    assert texts(other) == texts(plain)
