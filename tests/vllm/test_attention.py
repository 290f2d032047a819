"""The draft pass sees what it should: every key of the text before the block, and every key of the block."""

from pathlib import Path

import pytest

from tests.vllm.drive import BASE, drafting, prompts, serve

pytestmark = pytest.mark.vllm


@pytest.mark.timeout(7200)
def test_draft_attention_equals_float64_over_prefix_and_block(checkpoint: Path) -> None:
    """Each layer, each pass, rows of different lengths: within 1e-5; the patched engine fails on the first miss."""
    calls = [{"prompts": prompts(checkpoint)[::20], "sampling": {"temperature": 0.0, "max_tokens": 24}}]
    (call,) = serve(checkpoint, {**BASE, **drafting(checkpoint)}, calls, patches="attention")
    assert call["drafts"] > 0
