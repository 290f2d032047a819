"""The draft pass sees what it should: every key of the text before the block, and every key of the block."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.drive import BASE, drafting, prompts, serve

pytestmark = pytest.mark.vllm


@pytest.mark.timeout(7200)
def test_draft_attention_equals_float64_over_prefix_and_block(
    checkpoint: Path, tmp_path: Path, record_property: Any
) -> None:
    """Each layer, each pass, rows of different lengths: as near as float32 comes.

    How near that is depends on a model's scores and values, so the measure is torch's own float32 softmax over the same
    keys: vLLM's differs from float64 by at most twice as much. A key too many or too few differs a thousand times that.
    """
    notes = tmp_path / "notes.jsonl"
    calls = [{"prompts": prompts(checkpoint)[::20], "sampling": {"temperature": 0.0, "max_tokens": 24}}]
    (call,) = serve(checkpoint, {**BASE, **drafting(checkpoint)}, calls, patches={"attention": str(notes)})
    passes = [json.loads(line) for line in notes.read_text().splitlines()]
    layers = [layer for one in passes for layer in one["layers"]]
    record_property("draft passes", len(passes))
    worst = {name: max(layer[name] for layer in layers) for name in ("largest", "vllm", "torch")}
    record_property("largest output and differences", worst)
    assert call["drafts"] > 0
    assert any(len(set(one["seen"])) > 1 for one in passes), "no pass held rows of different lengths"
    assert worst["vllm"] <= 2 * worst["torch"]
