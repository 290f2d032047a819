"""On a CUDA device: the same texts under every plan, compiled and eager, at any precision where that is promised."""

import warnings
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import orthrus
from orthrus.decode import exact
from orthrus.decode.engine import Engine
from orthrus.decode.options import Options
from orthrus.model.attach import config_of
from orthrus.model.graphs import compile_passes
from orthrus.policy import steps
from tests import reference
from tests.decode.drive import decode, dual
from tests.families import tiny

pytestmark = pytest.mark.gpu

PROMPTS = [[5, 6, 7, 8] * 3, [9, 10, 11], [3], [*range(20, 60)]]
PLANS = ("ar", "full", "fixed:4", "tree:6", "onepass:2", "lookup", "auto")
TOLD = ["Natalia has 48 clips and sells half of them. How many are left?", "def add(a, b):", "Dear Sir or Madam,"]


def texts(model: PreTrainedModel, name: str, *, rows: int = 2, **more: object) -> list[list[int]]:
    engine = Engine(model, rows=rows, capacity=160, plan=steps.parse(name), **more)  # type: ignore[arg-type]
    return [row.token_ids for row in decode(engine, PROMPTS, Options(max_new_tokens=24))]


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3_text", "phi3", "gpt_oss"])
def test_float32_texts_are_those_of_the_plain_loop(family: str) -> None:
    model = dual(family).to("cuda")
    expected = [reference.greedy_text(tiny(family).to("cuda"), prompt, 24) for prompt in PROMPTS]
    for name in PLANS:
        assert texts(model, name) == expected, name


@pytest.mark.parametrize("name", ["ar", "full", "tree:6", "onepass:2"])
def test_compiled_texts_are_eager_ones(name: str) -> None:
    torch._dynamo.reset()
    model = dual().to("cuda")
    expected = texts(model, name)
    compile_passes(model)
    assert texts(model, name) == expected
    assert texts(model, name, rows=1) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_token_exactness_holds_for_the_bundled_model(dtype: str) -> None:
    """Every plan and batch size writes plain decoding's tokens, or the probe has said that it cannot promise them."""
    model, tokenizer = orthrus.load("nano", dtype=dtype, device="cuda")
    finding = exact.finding_for(model, width=config_of(model).block_size)
    print(finding)
    prompts = [tokenizer(text)["input_ids"] for text in TOLD]
    found = set()
    for name, rows in [
        ("ar", 1),
        ("ar", 3),
        *((name, rows) for name in ("full", "fixed:5", "auto") for rows in (1, 3)),
    ]:
        with warnings.catch_warnings():
            warnings.simplefilter("error" if finding.holds else "ignore")
            engine = Engine(model, rows=rows, capacity=256, plan=steps.parse(name), exact="token")
        found.add(str([row.token_ids for row in decode(engine, prompts, Options(max_new_tokens=96))]))
    assert len(found) == 1


def test_nothing_is_kept_beyond_the_cache() -> None:
    """Cycles allocate for their block alone and give it back: no bytes stay but keys and values."""
    model = dual().to("cuda")
    engine = Engine(model, rows=2, capacity=160, plan=steps.parse("full"))
    decode(engine, PROMPTS, Options(max_new_tokens=24))
    before = torch.cuda.memory_allocated()
    decode(engine, PROMPTS, Options(max_new_tokens=24))
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("name", ["ar", "full", "tree:6", "onepass:2"])
def test_a_cycle_waits_for_the_device_once(name: str) -> None:
    engine = Engine(dual().to("cuda"), rows=1, capacity=160, plan=steps.parse(name))
    engine.add(PROMPTS[0], Options(max_new_tokens=100))
    for _ in range(3):
        engine.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # What a cycle is told is copied to the device before it starts (engine.py), which waits for nothing.
    places = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
    assert len([place for place in places if not place.startswith("engine.py")]) == 1, places
