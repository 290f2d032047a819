"""Greedy text with drafts is the text without them, token for token, in every way vLLM can come to compute it."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.drive import BASE, CONTEXT, drafting, prompts, serve, texts

pytestmark = pytest.mark.vllm

GREEDY = {"temperature": 0.0}
SHORT = {**GREEDY, "max_tokens": 48}
ENDLESS = {**GREEDY, "max_tokens": CONTEXT, "ignore_eos": True}
"""Prompts and answers together end where the context does."""
KEPT = 64
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "chunked prefill": {"max_num_batched_tokens": 64},
    "few blocks": {"num_gpu_blocks_override": 40},
    "tensor parallel": {"tensor_parallel_size": 2},
}


@cache
def calls(checkpoint: Path) -> list[dict[str, Any]]:
    """100 prompts, the same again from the cache, 12 to the context's end, and those continued from the cache."""
    short = prompts(checkpoint)
    return [
        {"prompts": short, "sampling": SHORT},
        {"prompts": short, "sampling": SHORT},
        {"prompts": short[::9][:12], "sampling": ENDLESS},
        {"continue": {"call": 2, "kept": KEPT}, "sampling": ENDLESS},
    ]


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> list[dict[str, Any]]:
    """What vLLM says without drafts."""
    return serve(checkpoint, BASE, calls(checkpoint))


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_greedy_text_is_the_plain_text(name: str, checkpoint: Path, plain: list[dict[str, Any]]) -> None:
    """Fresh, from cached prompts, to the context's end, and from cached generated blocks."""
    engine = {**BASE, **drafting(checkpoint), **CONFIGURATIONS[name]}
    fresh, again, to_the_end, continued = serve(checkpoint, engine, calls(checkpoint))
    assert texts(fresh) == texts(plain[0])
    assert texts(again) == texts(plain[0])
    assert texts(to_the_end) == texts(plain[2])
    assert [len(p) + len(t) for p, t in zip(to_the_end["prompts"], texts(to_the_end), strict=True)] == [CONTEXT] * 12
    assert texts(continued) == [tokens[KEPT:] for tokens in texts(plain[2])]
    assert fresh["accepted"] > fresh["drafts"] > 0
    if name in ("defaults", "chunked prefill"):  # the same memory holds as many blocks as without drafts
        assert fresh["blocks"] == plain[0]["blocks"]
    if name == "few blocks":
        assert fresh["preemptions"] > 0
    else:  # little stays in so small a cache
        assert sum(again["cached"]) > 0
        lengths = [len(ids) - KEPT for ids in continued["prompts"]]
        assert any(cached > length for cached, length in zip(continued["cached"], lengths, strict=True))
