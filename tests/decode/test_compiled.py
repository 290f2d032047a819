"""Compiled passes: the same graph whatever the lengths, and the same texts as eager ones."""

import copy
import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from orthrus.decode import exact
from orthrus.decode.engine import Engine
from orthrus.decode.options import Options
from orthrus.decode.passes import Passes
from orthrus.errors import CacheFull
from orthrus.kernels import attention as functions
from orthrus.kernels.masks import Behind
from orthrus.kernels.merged import merge
from orthrus.model import graphs as module
from orthrus.model.attach import layers_of
from orthrus.model.attachment import attachment_of
from orthrus.model.cache import ScratchCache
from orthrus.model.graphs import Recording, Recordings, by_layer, compile_passes, is_compiled, recordings_of
from orthrus.policy import steps
from tests import reference
from tests.decode.drive import decode, dual
from tests.families import tiny

PROMPTS = [[5, 6, 7, 8] * 3, [9, 10, 11], [3]]
LAYERS = {"qwen3": {"num_hidden_layers": 1}, "gemma3_text": {"num_hidden_layers": 2}}  # one of each kind


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen3", "full"),
        *(pytest.param("gemma3_text", name, marks=pytest.mark.slow) for name in ("tree:6", "lookup")),
        *(pytest.param("qwen3", name, marks=pytest.mark.slow) for name in ("onepass:2", "onepass:2:6")),
    ],
)
def test_texts_are_those_of_the_plain_loop_and_a_graph_serves_every_length(family: str, name: str) -> None:
    """Traced by torch.compile and run as traced; a text that grows by a cycle at a time is not traced for each.

    What inductor makes of it is for `orthrus bench passes --compile`.
    """
    torch._dynamo.reset()
    shape = {**LAYERS[family], "max_position_embeddings": 512}
    model, plain, traced = dual(family, **shape), tiny(family, **shape), list[str]()
    compile_passes(model, backend=tracing(traced))
    assert is_compiled(model)
    engine = Engine(model, rows=2, capacity=400, plan=steps.parse(name))
    for prompt, row in zip(PROMPTS, decode(engine, PROMPTS, Options(max_new_tokens=12)), strict=True):
        assert row.token_ids == reference.greedy_text(plain, prompt, 12)
    before = len(traced)
    assert before > 0
    (row,) = decode(engine, [[5, 6, 7]], Options(max_new_tokens=300))
    assert row.token_ids == reference.greedy_text(plain, [5, 6, 7], 300)
    assert name != "full" or len(traced) == before


def tracing(traced: list[str]) -> Callable[..., object]:
    """A backend that runs graphs as they were traced, and notes them."""

    def note(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        traced.append(graph.code)
        return graph.forward

    return note


# ---------------------------------------------------------------- as on CUDA: masks in parts, passes recorded


def densely(
    grouped: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Behind,
    scaling: float,
    softcap: float | None,
    sink_H: Tensor | None,
    queries: int,
    in_order: bool,
) -> Tensor:
    """Stand in for the kernel: the parts put together to a dense mask."""
    slot_S = torch.arange(key.shape[2])
    behind_BS = slot_S - mask.length_B[:, None]
    Q, W = mask.self_BQW.shape[1:]
    text_BQS = (behind_BS < 0)[:, None].expand(-1, Q, -1)
    if mask.first_BQ is not None:
        text_BQS = text_BQS & (slot_S >= mask.first_BQ[:, :, None])
    inside_BS = (behind_BS >= 0) & (behind_BS < W)
    index_BQS = behind_BS.clamp(0, W - 1)[:, None].expand(-1, Q, -1)
    own_BQS = mask.self_BQW.gather(2, index_BQS) & inside_BS[:, None]
    dense = (text_BQS | own_BQS).repeat(1, grouped.shape[2] // Q, 1)[:, None]
    return functions._explicit(grouped, key, value, dense, scaling, softcap, sink_H, queries)


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of decoding passes are in parts, as on CUDA."""
    monkeypatch.setattr(functions, "can_split", lambda _: True)
    monkeypatch.setattr(functions, "_split", densely)
    monkeypatch.setattr(exact, "_ALIKE", {})


@pytest.fixture
def recorded(in_parts: None, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Passes are recorded, as on CUDA; what stands in for a graph makes the call again. Returns what was recorded."""
    made: list[object] = []

    def record(
        inputs: list[Tensor], call: Callable[[], list[Tensor]], _: ScratchCache
    ) -> tuple[Recording | None, list[Tensor]]:
        first = call()
        results = [result.clone() for result in first]
        made.append(results)

        def replay() -> None:
            for kept, new in zip(results, call(), strict=True):
                kept.copy_(new)

        return Recording(replay, inputs, results), first

    monkeypatch.setattr(module, "record", record)
    return made


def marked(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model pass for compiled: what is recorded is its forward as it is."""
    attachment_of(model).compiled = model.forward
    return model


FAMILIES_AND_PLANS = [
    ("qwen3", "full"),
    ("qwen3", "auto"),
    ("gemma2", "full"),
    ("gemma3_text", "tree:6"),
    ("gpt_oss", "onepass:2"),
    ("gemma3_text", "onepass:2:6"),
]


@pytest.mark.parametrize(("family", "name"), FAMILIES_AND_PLANS)
def test_texts_under_masks_in_parts_are_those_of_the_plain_loop(family: str, name: str, in_parts: None) -> None:
    """Windows, caps, sinks, trees and fused passes, rows that join and leave."""
    engine = Engine(dual(family), rows=2, capacity=96, plan=steps.parse(name))
    for prompt, row in zip(PROMPTS, decode(engine, PROMPTS, Options(max_new_tokens=12)), strict=True):
        assert row.token_ids == reference.greedy_text(tiny(family), prompt, 12)


@pytest.mark.parametrize(
    ("family", "name", "options"),
    [
        *((family, name, {}) for family, name in FAMILIES_AND_PLANS),
        *((family, name, {"exact": "token"}) for family, name in (("qwen3", "full"), ("gemma3_text", "onepass:2:6"))),
    ],
)
def test_recorded_texts_are_those_of_the_plain_loop(
    family: str, name: str, options: dict[str, Any], recorded: list[object]
) -> None:
    """Whatever a recording reads is brought up to date, the lengths of texts too; few are made, and none twice."""
    model = marked(dual(family))
    engine = Engine(model, rows=2, capacity=96, plan=steps.parse(name), **options)
    expected = [reference.greedy_text(tiny(family), prompt, 12) for prompt in PROMPTS]
    for _ in range(2):
        assert [row.token_ids for row in decode(engine, PROMPTS, Options(max_new_tokens=12))] == expected
    made = recordings_of(engine.cache).made
    if not options:  # the probe of exactness records passes over caches of its own
        assert len(recorded) == len(made)
    if name == "full":
        assert 0 < len(made) <= 6, "drafts, verifications and ends of prompts met before, of one row and of two"


def test_rows_that_begin_behind_others_leave_no_recordings(recorded: list[object]) -> None:
    """Their numbers are too many; here a prompt that was read before joins a text that is being written."""
    engine = Engine(marked(dual()), rows=2, capacity=96, plan=steps.parse("full"))
    decode(engine, PROMPTS[:1], Options(max_new_tokens=4))
    engine.add(PROMPTS[1], Options(max_new_tokens=40))
    engine.step()
    engine.add(PROMPTS[0], Options(max_new_tokens=4))
    assert len(engine.step()) == 2
    assert {key[1] for key, *_ in recordings_of(engine.cache).made} == {0}


def test_a_pass_that_does_not_fit_is_refused_before_it_is_run_again(recorded: list[object]) -> None:
    """The check a recording skips is made all the same."""
    engine = Engine(marked(dual()), rows=1, capacity=96, plan=steps.parse("full"))
    decode(engine, PROMPTS[:1], Options(max_new_tokens=12))
    assert recordings_of(engine.cache).made
    engine.cache.set_length(0, engine.cache.capacity - 2)
    with pytest.raises(CacheFull):
        engine.passes.verify(slice(0, 1), torch.zeros(1, 8, dtype=torch.long))


def test_a_prompt_that_does_not_fit_is_refused() -> None:
    """Rounding up what a compiled pass looks at hides nothing."""
    passes = Passes(marked(dual()), ScratchCache(rows=1, capacity=16))
    with torch.inference_mode(), pytest.raises(CacheFull):
        passes.prefill(slice(0, 1), [[5] * 20], chunk=64)


def test_a_copy_is_not_compiled() -> None:
    """It would run the original's forward."""
    assert not is_compiled(copy.deepcopy(marked(dual())))


def test_other_weights_or_another_view_are_recorded_anew(recorded: list[object]) -> None:
    """A recording reads weights where they lay: once they lie elsewhere, or drafts are made otherwise, it is no use."""
    model = marked(dual())

    def text() -> list[int]:
        engine = Engine(model, rows=1, capacity=96, plan=steps.parse("full"))
        return decode(engine, PROMPTS[:1], Options(max_new_tokens=12))[0].token_ids

    expected, made = text(), len(recorded)
    gc.collect()
    model.model.norm.weight.data = model.model.norm.weight.data.clone()
    assert text() == expected
    assert len(recorded) == 2 * made
    gc.collect()
    attachment = attachment_of(model)
    attachment.config = dataclasses.replace(attachment.config, mask_token_id=7)
    assert text() == expected
    assert len(recorded) == 3 * made


def test_passes_that_cannot_be_recorded_are_launched(in_parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for the device while it is recorded is asked for once, and texts are what they are."""
    asked: list[object] = []

    def record(_: object, call: Callable[[], list[Tensor]], cache: ScratchCache) -> tuple[None, list[Tensor]]:
        asked.append(cache)
        return None, call()

    monkeypatch.setattr(module, "record", record)
    engine = Engine(marked(dual()), rows=1, capacity=96, plan=steps.parse("full"))
    (row,) = decode(engine, PROMPTS[:1], Options(max_new_tokens=12))
    assert row.token_ids == reference.greedy_text(tiny("qwen3"), PROMPTS[0], 12)
    assert len(asked) == len(recordings_of(engine.cache).made) == 2


def test_results_of_all_recordings_lie_in_one_place() -> None:
    """As large as the largest needs, in any type and shape; where it is enlarged, older ones keep the smaller one."""
    shared = Recordings()
    first = [torch.randn(2, 3), torch.arange(5)]
    places = shared.places(first)
    assert [(p.shape, p.dtype) for p in places] == [(r.shape, r.dtype) for r in first]
    for place, result in zip(places, first, strict=True):
        place.copy_(result)
    assert all(torch.equal(p, r) for p, r in zip(places, first, strict=True)), "none lies over another"
    (again,) = shared.places([torch.zeros(4, dtype=torch.bfloat16)])
    assert again.data_ptr() == places[0].data_ptr()
    (larger,) = shared.places([torch.zeros(4096)])
    assert larger.data_ptr() != places[0].data_ptr()
    assert torch.equal(places[1], first[1])
    assert shared.places([]) == []


def test_a_cache_is_lent_again_with_what_was_recorded_over_it(recorded: list[object]) -> None:
    """To the next engine of as many rows that it has room for, once nobody else has it; texts are what they were."""
    model = marked(dual())

    def engine(rows: int = 1, capacity: int = 96) -> Engine:
        return Engine(model, rows=rows, capacity=capacity, plan=steps.parse("full"))

    first = engine()
    (row,) = decode(first, PROMPTS[:1], Options(max_new_tokens=12))
    cache, made = first.cache, len(recorded)
    assert engine().cache is not cache, "in use"
    del first
    gc.collect()
    second = engine(capacity=200)
    assert second.cache is cache, "rounded up to 256"
    assert second.cache.lengths == [0]
    assert decode(second, PROMPTS[:1], Options(max_new_tokens=12))[0].token_ids == row.token_ids
    assert len(recorded) == made, "nothing is recorded twice"
    del second
    gc.collect()
    assert engine(rows=2).cache is not cache
    assert engine(capacity=300).cache is not cache
    gc.collect()
    assert len(attachment_of(model).idle) == module._KEPT


def test_caches_of_models_that_are_not_compiled_are_their_engines_own(in_parts: None) -> None:
    model = dual()
    engines = [Engine(model, rows=1, capacity=96, plan=steps.parse("full")) for _ in range(2)]
    assert [engine.cache.capacity for engine in engines] == [96, 96]
    assert not attachment_of(model).idle


@pytest.mark.parametrize("name", ["ar", pytest.param("full", marks=pytest.mark.slow)])
def test_layers_share_their_graphs(name: str, recorded: list[object]) -> None:
    """Nothing is traced again for the second of two layers, and both are left as they were."""
    torch._dynamo.reset()
    model, traced = merge(dual()), list[str]()
    attachment_of(model).compiled = by_layer(model, backend=tracing(traced))
    engine = Engine(model, rows=1, capacity=96, plan=steps.parse(name))
    (row,) = decode(engine, PROMPTS[:1], Options(max_new_tokens=12))
    assert row.token_ids == reference.greedy_text(tiny("qwen3"), PROMPTS[0], 12)
    assert len(traced) == len({*traced}) > 0
    assert all("forward" not in layer.__dict__ for layer in layers_of(model))
