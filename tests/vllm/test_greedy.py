"""Greedy text with drafts is the text without them, token for token, in every way vLLM can come to compute it."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.drive import BASE, CONTEXT, agreement, drafting, prompts, serve, texts

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
    "compiled": {"enforce_eager": False},
}


@cache
def calls(checkpoint: Path) -> list[dict[str, Any]]:
    """100 prompts, the same again from the cache, to the context's end, and those texts continued from the cache."""
    short = prompts(checkpoint)
    return [
        {"prompts": short, "sampling": SHORT},
        {"prompts": short, "sampling": SHORT},
        {"prompts": short, "sampling": ENDLESS},
        {"continue": {"call": 2, "kept": KEPT}, "sampling": ENDLESS},
    ]


@pytest.fixture(scope="module")
def plain(converted: Path) -> list[dict[str, Any]]:
    """What vLLM says without drafts."""
    return serve(converted, BASE, calls(converted))


@pytest.mark.timeout(14400)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_greedy_text_is_the_plain_text(
    name: str, checkpoint: Path, plain: list[dict[str, Any]], record_property: Any
) -> None:
    """Fresh, from cached prompts, to the context's end, and from cached generated blocks."""
    engine = {**BASE, **drafting(checkpoint), **CONFIGURATIONS[name]}
    fresh, again, to_the_end, continued = serve(checkpoint, engine, calls(checkpoint))
    rest = [tokens[KEPT:] for tokens in texts(plain[2])]
    pairs = {
        "fresh": (fresh, texts(plain[0])),
        "cached prompts": (again, texts(plain[0])),
        "to the context's end": (to_the_end, texts(plain[2])),
        "continued from cached text": (continued, rest),
    }
    record_property("texts", {kind: agreement(texts(call), expected) for kind, (call, expected) in pairs.items()})
    for count in ("drafts", "accepted", "preemptions", "blocks"):
        record_property(count, [call[count] for call, _ in pairs.values()])
    record_property("compilation", fresh["compilation"])
    record_property("tokens from the cache", [sum(call["cached"]) for call, _ in pairs.values()])
    for kind, (call, expected) in pairs.items():
        assert texts(call) == expected, kind
    assert {len(p) + len(t) for p, t in zip(to_the_end["prompts"], texts(to_the_end), strict=True)} == {CONTEXT}
    assert fresh["accepted"] > fresh["drafts"] > 0
    assert to_the_end["accepted"] > to_the_end["drafts"]  # rows near the end keep no others from drafting
    assert fresh["drafter_weights"] == 0
    assert (fresh["compilation"] != "NONE") == (name == "compiled")
    if name in ("defaults", "chunked prefill"):  # the same memory holds as many blocks as without drafts
        assert fresh["blocks"] == plain[0]["blocks"]
    if name == "few blocks":
        assert fresh["preemptions"] > 0
    else:  # little stays in so small a cache
        assert sum(again["cached"]) > 0
        lengths = [len(ids) - KEPT for ids in continued["prompts"]]
        assert any(cached > length for cached, length in zip(continued["cached"], lengths, strict=True))
