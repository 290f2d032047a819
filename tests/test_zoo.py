"""The bundled model: it is small, whole, lossless, and draws from its backbone's distribution."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import orthrus
from orthrus.checkpoints.load import load
from orthrus.data.synthetic import DOMAINS, problem
from orthrus.decode import accept
from orthrus.decode.accept import Verdict
from orthrus.decode.api import encode
from orthrus.decode.output import Completion, Stats
from orthrus.decode.passes import Passes
from orthrus.model.attachment import attachment_of
from orthrus.model.cache import ScratchCache
from orthrus.zoo import BUNDLED

CHATS = [problem(domain, index, split="heldout").messages[:1] for index in range(2) for domain in DOMAINS]
"""Questions with names, things and numbers never trained on together."""

POEM = [{"role": "user", "content": "Write a poem."}]
"""Answered in dozens of ways: the view's drafts of the second token are kept now and then, and refused mostly."""

DRAWS, TEMPERATURE = 1500, 0.9


@pytest.fixture(scope="module")
def nano() -> tuple[Any, Any]:
    """The bundled model in float32."""
    return orthrus.load("nano", dtype="float32", device="cpu")


def test_the_bundled_files_are_small_and_complete() -> None:
    """At most 40 MB in all; backbone, view, tokenizer and card are there."""
    files = {file.name: file.stat().st_size for file in Path(BUNDLED["nano"]).iterdir()}
    assert sum(files.values()) <= 40e6
    assert {"model.safetensors", "orthrus.safetensors", "orthrus_config.json", "tokenizer.json", "README.md"} <= set(
        files
    )


@pytest.fixture(scope="module")
def plain(nano: tuple[Any, Any]) -> list[Completion]:
    """What plain decoding answers, each question alone."""
    return orthrus.generate(*nano, CHATS, mode="ar", max_new_tokens=64, batch_size=1)


@pytest.mark.parametrize(
    ("plan", "batch_size"),
    [("full", 1), ("full", 8), ("fixed:5", 8), ("tree:24", 8), ("onepass:2", 1), ("auto", 1), ("auto", 8)],
)
def test_greedy_texts_equal_plain_decoding(
    nano: tuple[Any, Any], plain: list[Completion], plan: str, batch_size: int
) -> None:
    """In float32 every plan writes the same tokens as plain decoding of each text alone, by itself and in a batch."""
    drafted = orthrus.generate(*nano, CHATS, plan=plan, max_new_tokens=64, batch_size=batch_size)
    assert [d.token_ids for d in drafted] == [p.token_ids for p in plain]
    assert [d.finish_reason for d in drafted] == [p.finish_reason for p in plain]


def test_drafts_are_worth_their_pass(nano: tuple[Any, Any]) -> None:
    """The trained view gives at least three tokens a cycle on its own domain (its card has the measured figure)."""
    outs = orthrus.generate(*nano, CHATS, plan="full", max_new_tokens=128)
    assert Stats.total(out.stats for out in outs).tokens_per_cycle >= 3


def test_exact_token_in_bfloat16(nano: tuple[Any, Any]) -> None:
    """In bfloat16 `exact="token"` writes plain decoding's tokens, whatever plan and batch, greedy and sampled."""
    model, tokenizer = orthrus.load("nano", dtype="bfloat16", device="cpu")
    chats = CHATS[: len(DOMAINS)]
    sampled = {"do_sample": True, "temperature": 0.9, "seed": 5}
    for more, plans in (({}, [("full", 4), ("fixed:6", 4)]), (sampled, [("full", 1), ("auto", 4)])):
        ask = {"exact": "token", "max_new_tokens": 24, **more}
        plain = orthrus.generate(model, tokenizer, chats, mode="ar", batch_size=1, **ask)
        for plan, batch_size in plans:
            drafted = orthrus.generate(model, tokenizer, chats, plan=plan, batch_size=batch_size, **ask)
            assert [d.token_ids for d in drafted] == [p.token_ids for p in plain]


def chi_square(observed: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """Return the p-value of counts against probabilities; outcomes expected fewer than 8 times share one bin."""
    total = sum(observed.values())
    bins = [key for key, p in expected.items() if p * total >= 8]
    rest_expected = total * (1 - sum(expected[key] for key in bins))
    rest_observed = total - sum(observed[key] for key in bins)
    statistic = sum((observed[key] - expected[key] * total) ** 2 / (expected[key] * total) for key in bins)
    if rest_expected >= 8:
        statistic += (rest_observed - rest_expected) ** 2 / rest_expected
    freedom = len(bins) - (rest_expected < 8)
    return float(torch.special.gammaincc(torch.tensor(freedom / 2).double(), torch.tensor(statistic / 2).double()))


def first_two(nano: tuple[Any, Any]) -> tuple[Counter[tuple[int, ...]], dict[tuple[int, ...], float]]:
    """Return how often each pair of first tokens was drawn with drafts, and its probability in the backbone."""
    model, tokenizer = nano
    outs = orthrus.generate(
        model, tokenizer, [POEM] * DRAWS, plan="fixed:3", do_sample=True, temperature=TEMPERATURE, top_k=12,
        max_new_tokens=2, batch_size=100, eos_token_id=[], seed=0,
    )  # fmt: skip
    assert 0.1 < Stats.total(out.stats for out in outs).accepted / DRAWS < 0.9  # the second tokens
    observed = Counter(tuple(out.token_ids) for out in outs)
    ids = encode(tokenizer, POEM)

    def after(tokens: list[int]) -> torch.Tensor:
        cache = ScratchCache(rows=1, capacity=64)
        passes = Passes(model, cache)
        with torch.inference_mode():
            logits = passes.verify(slice(0, 1), torch.tensor([tokens]))[0, -1] / TEMPERATURE
        top = logits.topk(12)
        return torch.full_like(logits, -torch.inf).scatter(0, top.indices, top.values).softmax(-1)

    first = after(ids)
    expected = {}
    for a in first.nonzero()[:, 0].tolist():
        second = after([*ids, a])
        for b in second.nonzero()[:, 0].tolist():
            expected[a, b] = float(first[a] * second[b])
    return observed, expected


def test_sampled_tokens_follow_the_backbone(nano: tuple[Any, Any]) -> None:
    """Chi-square over pairs of first tokens; the chance of a false alarm is 1e-7."""
    observed, expected = first_two(nano)
    assert abs(sum(expected.values()) - 1) < 1e-4
    assert set(observed) <= set(expected)
    assert chi_square(observed, expected) > 1e-7


def test_the_chi_square_catches_a_broken_rule(nano: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that keeps every draft gives the diffusion view's distribution, and is caught."""
    honest = accept.rejection

    def gullible(draft_BM: torch.Tensor, *args: Any, **kwargs: Any) -> Verdict:
        kwargs["accept_BM"] = torch.zeros_like(kwargs["accept_BM"])
        return honest(draft_BM, *args, **kwargs)

    monkeypatch.setattr(accept, "rejection", gullible)
    observed, expected = first_two(nano)
    assert chi_square(observed, expected) < 1e-7


@pytest.mark.parametrize("named", ["by its configuration", "by the call"])
def test_a_view_of_the_bundled_backbone_finds_it_by_name(nano: tuple[Any, Any], tmp_path: Path, named: str) -> None:
    """An adapter that was trained with `model.backbone = "nano"` is loaded without the backbone beside it."""
    model, _ = nano
    attachment = attachment_of(model)
    own = attachment.config
    backbone = "nano" if named == "by its configuration" else "elsewhere"
    attachment.config = dataclasses.replace(own, backbone=backbone)
    orthrus.save(model, tmp_path / "view", format="adapter")
    attachment.config = own
    found, tokenizer = load(tmp_path / "view", device="cpu", backbone="nano" if named == "by the call" else None)
    assert len(tokenizer) == len(nano[1])
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
