"""Drafters that training saves are served by stock vLLM: it drafts what our engine drafts, and texts stay plain."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import orthrus
from orthrus.bench.suites import read_suite
from orthrus.checkpoints.drafters import load_drafter
from orthrus.decode.drafters import Drafter
from orthrus.decode.engine import Engine
from orthrus.decode.options import Options
from orthrus.decode.text import encode
from orthrus.peers import dflash_files, eagle3_model
from orthrus.peers.dflash import DFlash, DFlashConfig
from orthrus.peers.eagle3_model import Eagle3, Eagle3Config
from orthrus.policy import steps
from orthrus.train.draft import first_layers
from tests.vllm.racing import Count, Entry, backbone, official, run

pytestmark = pytest.mark.vllm

TOKENS, BLOCK = 48, 16


@pytest.fixture(scope="module")
def nano() -> tuple[Any, list[list[int]]]:
    """The bundled model, and eight prompts."""
    model, tokenizer = orthrus.load("nano", dtype="float32")
    items = [item for suite in ("synthetic:maths", "synthetic:code") for item in read_suite(suite, limit=4)]
    return model, [encode(tokenizer, list(item.messages)) for item in items]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return backbone("nano", tmp_path_factory.mktemp("vllm") / "backbone")


@pytest.fixture(scope="module")
def plain(nano: Any, served: Path) -> list[list[int]]:
    """What vLLM says without drafts."""
    counts, _ = run(Entry("plain"), served, [nano[1][:1], nano[1]], TOKENS)
    return counts[1].texts


def moved(drafter: nn.Module) -> Any:
    """Weights at random, so wide that each slot's draft depends on what the slot sees."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.normal_(0, 0.15) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5)
    return drafter


def eagle3(model: Any, folder: Path) -> Entry:
    eagle3_model.save(moved(Eagle3(Eagle3Config.of(model, drafts=5))), model, folder)
    return Entry("eagle3", folder, 5)


def dflash(model: Any, folder: Path, **more: Any) -> Entry:
    config = DFlashConfig.of(model, layers=1, block_size=BLOCK, mask_token_id=3, **more)
    folder.mkdir()
    dflash_files.save(moved(DFlash(config)), folder)
    return Entry("dflash", folder, BLOCK - 1)


def jetspec(model: Any, folder: Path) -> Entry:
    return dflash(model, folder, causal=True, sliding_causal=True)


def draft(model: Any, folder: Path) -> Entry:
    first_layers(model, 1).save_pretrained(folder)
    return Entry("draft_model", folder, 4)


def view(model: Any, folder: Path) -> Entry:
    return Entry("orthrus", official("nano", folder), BLOCK - 1)


def ngram(model: Any, folder: Path) -> Entry:
    return Entry("ngram", None, BLOCK - 1)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("make", [eagle3, dflash, jetspec, draft, view, ngram])
def test_texts_are_plain_and_drafts_are_our_engines(
    make: Callable[[Any, Path], Entry],
    nano: tuple[Any, list[list[int]]],
    served: Path,
    plain: list[list[int]],
    tmp_path: Path,
    record_property: Any,
) -> None:
    """Counters add up. Drafts of one text, one after another, are compared where our engine has the very drafter."""
    model, prompts = nano
    entry, notes = make(model, tmp_path / "peer"), tmp_path / "drafts.jsonl"
    folder = entry.source if make is view else served
    assert folder is not None
    (one, all_), classes = run(entry, folder, [prompts[:1], prompts], TOKENS, patches={"drafts": str(notes)})
    record_property("classes", classes)
    record_property("counts", all_.to_dict())
    assert all_.texts == plain
    assert_adds_up(all_)
    if make in (draft, view, ngram):
        assert sum(all_.accepted) > 0
    else:  # untrained: next to nothing is kept
        theirs = [json.loads(line) for line in notes.read_text().splitlines()[: one.passes]]
        ours = our_drafts(model, entry, prompts[0])
        record_property("drafts", len(theirs))
        assert [drafts for (drafts,) in theirs] == ours[: one.passes]
        assert len({tuple(drafts) for drafts in ours}) > TOKENS // 5


def assert_adds_up(count: Count) -> None:
    """Each pass writes a token and the drafts it keeps; those behind a text's end are counted, and not written."""
    kept, behind = count.accepted, len(count.texts) * len(count.accepted)
    assert kept == sorted(kept, reverse=True)
    assert kept[0] <= count.steps <= count.passes
    assert 0 <= count.passes + sum(kept) - count.tokens <= behind
    assert count.tokens == sum(len(text) - 1 for text in count.texts)


def our_drafts(model: Any, entry: Entry, prompt: list[int]) -> list[list[int]]:
    """What our engine drafts for a text, cycle after cycle."""
    drafter: Drafter = load_drafter(f"{entry.method}:{entry.source}", model)
    propose, out = drafter.propose, []

    def noted(*args: Any) -> Any:
        made = propose(*args)
        logits_BMV = made if isinstance(made, Tensor) else made.logits_BMV
        out.append(logits_BMV[0].argmax(-1).tolist())
        return made

    drafter.propose = noted  # type: ignore[method-assign]
    engine = Engine(model, rows=1, capacity=512, plan=steps.parse("full"), drafter=drafter)
    engine.finish([prompt], Options.of(model.generation_config, max_new_tokens=TOKENS + BLOCK))
    return out
