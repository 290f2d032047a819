"""Attention of few rows by the operator in C++: softmax attention's numbers, and bits that no neighbour changes."""

from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from orthrus.decode.engine import Engine
from orthrus.decode.options import Options
from orthrus.decode.passes import Passes
from orthrus.kernels import attention as attending
from orthrus.kernels import compiled, rewritten
from orthrus.kernels.attention import FEW, attention, use_own
from orthrus.kernels.compiled import instructions
from orthrus.kernels.layout import laid_out
from orthrus.kernels.recorded import record
from orthrus.model import fingerprint, traced
from orthrus.model.attach import detach
from orthrus.model.attachment import attachment_of
from orthrus.model.cache import ScratchCache
from orthrus.model.fingerprint import key_of, operators_of
from orthrus.policy import steps
from tests import reference
from tests.decode.drive import decode, dual
from tests.families import tiny
from tests.kernels.conftest import Operator
from tests.kernels.test_int8 import threads

pytestmark = pytest.mark.skipif(
    instructions() is None or not compiled._compiler(), reason="needs Linux on an x86 CPU, and a compiler"
)

SCALING = 0.3
TEXTS, SLOTS = 2, 200
KINDS = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]
"""Types of queries and of keys."""


@pytest.fixture(scope="session")
def attend(own: tuple[str, Operator]) -> Operator:
    """The operator, compiled for a set of instructions that this CPU has."""
    found: Operator = getattr(torch.ops.orthrus, f"attention_{own[0]}").default
    return found


def drawn(
    queries: int, *, groups: int = 3, dtype: torch.dtype = torch.float32, size: int = 64, out: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries as rotary embeddings leave them, keys and values as they lie in a cache."""
    generator = torch.Generator().manual_seed(queries)
    query = torch.randn(TEXTS, queries, 2 * groups, size, generator=generator).transpose(1, 2)
    key, value = (torch.randn(TEXTS, 2, SLOTS + 30, n, generator=generator)[:, :, :SLOTS] for n in (size, out))
    return query.to(dtype), key.to(dtype), value.to(dtype)


def seen(queries: int, *, slots: int = SLOTS) -> Tensor:
    """Rows of a tree behind texts of two lengths, `[B, 1, Q, S]`: each sees its text, itself and some before it."""
    generator = torch.Generator().manual_seed(1)
    own = (torch.rand(queries, queries, generator=generator) < 0.5).tril() | torch.eye(queries, dtype=torch.bool)
    allowed = torch.zeros(TEXTS, 1, queries, slots, dtype=torch.bool)
    for text, length in enumerate((90, 151)):
        allowed[text, :, :, :length] = True
        allowed[text, :, :, length : length + queries] = own
    return allowed


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def plainly(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
    """The specification: softmax attention in float64 with repeated keys, `[B, Q, H, E]`."""
    groups = query.shape[1] // key.shape[1]
    keys, values = (x.double().repeat_interleave(groups, 1) for x in (key, value))
    scores = query.double() @ keys.transpose(2, 3) * SCALING
    scores = scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "size", "out"), [(1, 64, 64), (3, 80, 20), (4, 7, 9)])
@pytest.mark.parametrize("queries", [1, 2, 3, 6, 11, 33])
def test_equals_softmax_attention(
    attend: Operator, queries: int, groups: int, size: int, out: int, dtype: torch.dtype
) -> None:
    """With masks that are boolean or added, of either type, alike for all rows or none."""
    query, key, value = drawn(queries, groups=groups, dtype=dtype, size=size, out=out)
    allowed = seen(queries)
    masks = [(None, None), (allowed, allowed)]
    masks += [(allowed, additive(allowed, kind)) for kind in (torch.float32, torch.bfloat16)]
    masks += [(allowed[:1, :, -1:], allowed[:1, :, -1:])]
    tolerance = 5e-6 if dtype == torch.float32 else 1e-2
    for rows, mask in masks:
        found = attend(query, key, value, mask, SCALING)
        assert found.dtype == dtype
        assert found.is_contiguous()
        expected = plainly(query, key, value, rows)
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "kept"), KINDS)
def test_a_row_has_the_same_bits_alone_and_beside_any_others(
    attend: Operator, dtype: torch.dtype, kept: torch.dtype
) -> None:
    """With other rows and texts, heads, threads, and more slots behind and before those that any row sees."""
    query, *rest = drawn(40, dtype=dtype)
    key, value = (x.to(kept) for x in rest)
    mask = additive(seen(40), dtype)
    whole = attend(query, key, value, mask, SCALING)
    for count in (1, 2):
        with threads(count):
            assert torch.equal(attend(query, key, value, mask, SCALING), whole)
            for rows in (slice(0, 1), slice(3, 5), slice(5, 13), slice(7, 40)):
                part = attend(query[:, :, rows], key, value, mask[:, :, rows], SCALING)
                assert torch.equal(part, whole[:, rows])
    for text in range(TEXTS):
        one = slice(text, text + 1)
        assert torch.equal(attend(query[one], key[one], value[one], mask[one], SCALING), whole[one])
        heads = attend(query[one, :3], key[one, :1], value[one, :1], mask[one], SCALING)
        assert torch.equal(heads, whole[one, :, :3])
    assert torch.equal(attend(query, key, value, seen(40), SCALING), whole)
    shorter = attend(query[:1], key[:1, :, :130], value[:1, :, :130], mask[:1], SCALING)
    assert torch.equal(shorter, whole[:1])


@pytest.mark.parametrize("queries", [1, 9])
def test_keys_in_bfloat16_beside_queries_in_float32(attend: Operator, own: tuple[str, Operator], queries: int) -> None:
    """Such keys are read as float32; tiles (AMX) multiply them by queries that are rounded to bfloat16 as well."""
    query, key, value = drawn(queries)
    kept, mask = (key.bfloat16(), value.bfloat16()), additive(seen(queries), torch.float32)
    found = attend(query, *kept, mask, SCALING)
    if own[0] == "amx":
        assert torch.equal(found, attend(query.bfloat16().float(), *kept, mask, SCALING))
    else:
        assert torch.equal(found, attend(query, kept[0].float(), kept[1].float(), mask, SCALING))


@pytest.mark.parametrize(("dtype", "kept"), KINDS)
def test_keys_are_written_and_attended_to_in_one_operation(
    attend: Operator, own: tuple[str, Operator], dtype: torch.dtype, kept: torch.dtype
) -> None:
    query, key, value = drawn(5, dtype=dtype, out=32)
    whole: Operator = getattr(torch.ops.orthrus, f"attended_{own[0]}").default
    before = [torch.randn(4, 230, 2, size).to(kept) for size in (64, 32)]
    for start, span, mask in ((0, 5, None), (70, 75, None), (40, 200, additive(seen(5), dtype)[..., :200])):
        new = [x[:, :, start : start + 5] for x in (key, value)]
        keys, values = (buffer.clone() for buffer in before)
        found = whole(query, *new, keys, values, mask, SCALING, 1, start, span)
        for buffer, old, x in zip((keys, values), before, new, strict=True):
            old = old.clone()
            old[1:3, start : start + 5] = x.transpose(1, 2)
            assert torch.equal(buffer, old)
        reach = (x[1:3, :span].transpose(1, 2) for x in (keys, values))
        assert torch.equal(found, attend(query, *reach, mask, SCALING))
    for wrong in ((3, 0, 5), (-1, 0, 5), (0, 1, 5), (0, -1, 5), (0, 226, 231)):
        with pytest.raises(RuntimeError, match="must fit their buffers"):
            whole(query, *(x[:, :, :5] for x in (key, value)), *before, None, SCALING, *wrong)


@pytest.mark.parametrize(("dtype", "kept"), KINDS)
def test_recordings_write_and_attend_at_once(
    attend: Operator, own: tuple[str, Operator], dtype: torch.dtype, kept: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where what is written is read, and by attention alone; over other rows, slots and sizes."""
    monkeypatch.setattr(rewritten, "between", lambda: (f"normed_{own[0]}", f"rotated_{own[0]}"))
    found: list[str] = []

    def rewrite(graph: Any) -> None:
        rewritten.rewrite(graph)
        found[:] = [node.kind() for node in graph.nodes()]

    def call(query: Tensor, key: Tensor, value: Tensor, buffers: list[Tensor], reach: Tensor) -> Tensor:
        span, first, start, _ = reach.shape
        rows, slots = slice(first, first + query.shape[0]), slice(start, start + query.shape[2])
        for buffer, new in zip(buffers, (key, value), strict=True):
            buffer[rows, slots] = new.transpose(1, 2)
        keys, values = (buffer[rows, :span].transpose(1, 2) for buffer in buffers)
        return attend(query, keys, values, None, SCALING)

    def others(query: Tensor, key: Tensor, value: Tensor, buffers: list[Tensor], reach: Tensor) -> Tensor:
        return call(query, key, value, buffers, reach) + buffers[0].sum()

    def of(queries: int, first: int, start: int, span: int) -> tuple[Any, ...]:
        query, key, value = drawn(queries, dtype=dtype)
        buffers = [torch.randn(4, 230, 2, 64).to(kept) for _ in "kv"]
        return query, key[:, :, :queries], value[:, :, :queries], buffers, torch.empty(span, first, start, 0)

    with torch.inference_mode():
        graph = record(call, of(3, 1, 70, 73), rewrite)
        assert found.count(f"orthrus::attended_{own[0]}") == 1
        assert not {"aten::copy_", "aten::slice", f"orthrus::attention_{own[0]}"} & {*found}
        for inputs in (of(3, 1, 70, 73), of(5, 0, 0, 5), of(1, 2, 150, 160)):
            same = (*inputs[:3], [buffer.clone() for buffer in inputs[3]], inputs[4])
            assert torch.equal(graph(*inputs), call(*same))
            assert all(map(torch.equal, inputs[3], same[3]))
        record(others, of(3, 1, 70, 73), rewrite)
        assert "aten::copy_" in found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_behind_the_last_key_that_is_seen_may_hold_anything(attend: Operator, dtype: torch.dtype) -> None:
    query, key, value = drawn(3, dtype=dtype)
    found = attend(query, key, value, seen(3), SCALING)
    for other in (key, value):
        other[0, :, 93:], other[1, :, 154:] = torch.nan, torch.inf
    assert torch.equal(attend(query, key, value, seen(3), SCALING), found)


def test_keys_before_a_window_change_no_bit(attend: Operator) -> None:
    query, key, value = drawn(4)
    windowed = torch.zeros(1, 1, 4, SLOTS, dtype=torch.bool)
    for row in range(4):
        windowed[..., row, 150 + row : 170 + row] = True
    found = attend(query, key, value, windowed, SCALING)
    torch.testing.assert_close(found.double(), plainly(query, key, value, windowed), rtol=0, atol=5e-6)
    other = key.clone()
    other[:, :, :150] = 7
    assert torch.equal(attend(query, other, value, windowed, SCALING), found)
    beside = torch.cat([windowed, torch.ones(1, 1, 1, SLOTS, dtype=torch.bool)], dim=2)
    more = torch.cat([query, query[:, :, :1]], dim=2)
    assert torch.equal(attend(more, key, value, beside, SCALING)[:, :4], found)


def test_large_scores_and_many_keys(attend: Operator) -> None:
    query, key, value = torch.randn(1, 2, 3, 16) * 30, torch.randn(1, 1, 5000, 16), torch.randn(1, 1, 5000, 16)
    found = attend(query, key, value, None, SCALING)
    score = float((query.double() @ key.double().transpose(2, 3)).abs().max()) * SCALING
    rounded = torch.finfo(torch.float32).eps * score * float(value.abs().max())  # of a score, times what it weighs
    torch.testing.assert_close(found.double(), plainly(query, key, value, None), rtol=0, atol=rounded)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"query": torch.zeros(1, 2, 3, 8).double()}, "float32 or bfloat16"),
        ({"key": torch.zeros(1, 1, 5, 8).bfloat16()}, "of one type"),
        ({"query": torch.zeros(1, 2, 3, 8).bfloat16()}, "of one type"),
        ({"key": torch.zeros(1, 1, 5, 4)}, "keys must fit"),
        ({"value": torch.zeros(1, 1, 4, 8)}, "as many"),
        ({"value": torch.zeros(1, 1, 8, 5).transpose(2, 3)}, "side by side"),
        ({"mask": torch.zeros(1, 1, 3, 4)}, "a mask must be"),
        ({"mask": torch.zeros(1, 2, 3, 5)}, "a mask must be"),
    ],
)
def test_what_does_not_fit_is_refused(attend: Operator, wrong: dict[str, Tensor], message: str) -> None:
    given = {"query": torch.zeros(1, 2, 3, 8), "key": torch.zeros(1, 1, 5, 8), "value": torch.zeros(1, 1, 5, 8)}
    given = {**given, "mask": torch.zeros(1, 1, 3, 5), **wrong}
    with pytest.raises(RuntimeError, match=message):
        attend(given["query"], given["key"], given["value"], given["mask"], SCALING)


class Attending(nn.Module):
    is_causal = True


@pytest.fixture
def here(attend: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are loaded from now on use the operator, and passes are recorded when they are met again."""
    monkeypatch.setattr(attending, "_own", [])
    monkeypatch.setattr(compiled, "attention", lambda: attend)
    monkeypatch.setattr(traced, "USES", 1)


@pytest.fixture
def module(here: None) -> nn.Module:
    """An attention module of a model that uses the operator."""
    model = nn.ModuleList([Attending()])
    use_own(model)
    return model[0]


def test_a_text_that_sees_nothing_gives_zeros(attend: Operator) -> None:
    query, key, value = drawn(2)
    mask = torch.ones(TEXTS, 1, 2, SLOTS, dtype=torch.bool)
    mask[0] = False
    out = attend(query, key, value, mask, SCALING)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert bool((out[1] != 0).all())


def test_masks_of_single_heads_are_left_to_torch(module: nn.Module) -> None:
    query, key, value = drawn(2, groups=1)
    mask = torch.rand(TEXTS, query.shape[1], 2, SLOTS, generator=torch.Generator().manual_seed(0)) < 0.5
    with torch.inference_mode():
        out = attention(module, query, key, value, mask, scaling=SCALING)[0]
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=SCALING)
    assert torch.allclose(out, expected.transpose(1, 2), atol=1e-5)


def test_a_backbone_without_its_view_attends_as_it_did(here: None) -> None:
    model = dual(num_hidden_layers=1)
    use_own(model)
    assert attending.uses_own(model, 1)
    assert not any(attending.uses_own(module, 1) for module in detach(model).modules())


@pytest.mark.parametrize("uses", [False, True])
def test_layers_that_are_laid_out_for_a_while_attend_afterwards_as_before(
    here: None, uses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "prepare", lambda: None)
    model = dual(num_hidden_layers=1)
    if uses:
        use_own(model)
    with laid_out(model):
        assert attending.uses_own(model, 1)
    assert attending.uses_own(model, 1) is uses


@pytest.mark.parametrize("uses", [False, True])
def test_rounded_keys_are_kept_in_bfloat16_where_the_operator_reads_them(
    here: None, uses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain and drafted, prompts beyond `FEW` rows and shorter ones: the same texts."""
    monkeypatch.setattr(attending, "multiplies", lambda dtype: True)
    model = dual(num_hidden_layers=2)
    attending.round_keys(model)
    if uses:
        use_own(model)
    prompts = [[*range(1, 1 + length)] for length in (3, FEW + 9)]
    texts = {}
    for plan in ("ar", "full", "tree:9"):
        engine = Engine(model, rows=2, capacity=90, plan=steps.parse(plan))
        texts[plan] = [row.token_ids for row in decode(engine, prompts, Options(max_new_tokens=12))]
        kept = torch.bfloat16 if uses else torch.float32
        assert {x.dtype for x in (*engine.cache.keys, *engine.cache.values)} == {kept}
    assert texts["ar"] == texts["full"] == texts["tree:9"]
    assert not any(attending.rounds_keys(module) for module in detach(model).modules())


def test_few_rows_are_the_operators(module: nn.Module, attend: Operator) -> None:
    """In inference mode, of modules that are told so; in blocks of keys all numbers of rows are."""

    def called(rows: int, module: nn.Module = module, inference: bool = True, **more: object) -> bool:
        query, key, value = drawn(rows)
        mask = seen(rows)
        with patch.object(attending, "_own", [lambda *given: asked.append(0) or attend(*given)]):
            asked: list[int] = []
            with torch.inference_mode(inference):
                found = attention(module, query, key, value, mask, SCALING, **more)[0]  # type: ignore[arg-type]
        if not more:
            torch.testing.assert_close(found.double(), plainly(query, key, value, mask), rtol=0, atol=5e-6)
        return bool(asked)

    assert called(1)
    assert called(FEW)
    assert not called(FEW + 1)
    assert called(FEW + 1, tile=512)
    assert not called(1, module=Attending())
    assert not called(1, inference=False)
    assert not called(1, softcap=3.0)
    assert not called(1, s_aux=torch.zeros(6))
    query, key, value = (x.double() for x in drawn(2))
    with torch.inference_mode():
        assert attention(module, query, key, value, seen(2), SCALING)[0].dtype == torch.float64


def test_without_a_library_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "attention", lambda: None)
    model = nn.ModuleList([Attending()])
    use_own(model)
    assert not attending.uses_own(model[0], 1)


PROMPTS = [[5, 6, 7, 8] * 3, [9, 10, 11], [3]]
OPTIONS = Options(max_new_tokens=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_keeps_its_operators_whatever_is_loaded_beside_it(
    attend: Operator, own: tuple[str, Operator], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was loaded before they were compiled has none, and the bits that it had; one loaded afterwards has."""
    monkeypatch.setattr(attending, "_own", [])
    monkeypatch.setattr(compiled, "attention", lambda: None)
    monkeypatch.setattr(traced, "USES", 1)
    before, after = (dual("qwen3", num_hidden_layers=1).to(dtype) for _ in range(2))

    def logits(model: PreTrainedModel) -> list[Tensor]:
        with torch.inference_mode():
            passes = Passes(model, ScratchCache(rows=1, capacity=64))
            passes.prefill(slice(0, 1), [[3, 4, 5]], chunk=64)
            return [passes.verify(slice(0, 1), torch.tensor([[6, 7, 8]])) for _ in range(3)]

    use_own(before)
    alone, key = logits(before), key_of(before)
    assert operators_of(before) == []
    monkeypatch.setattr(compiled, "attention", lambda: attend)
    for module in (rewritten, fingerprint):
        monkeypatch.setattr(module, "between", lambda: (f"normed_{own[0]}", f"rotated_{own[0]}"))
    use_own(after)
    beside = logits(after)
    assert operators_of(after) == ["attention", "norm", "rotary"]
    graphs = Counter[str]()
    monkeypatch.setattr(traced, "rewrite", lambda graph: graphs.update(["rewritten"]) or rewritten.rewrite(graph))
    attachment_of(before).memo("recorder").clear()
    assert all(map(torch.equal, logits(before), alone))
    assert (operators_of(before), key_of(before), sum(graphs.values())) == ([], key, 0)
    assert not all(map(torch.equal, beside, alone)), "here the operators have other bits"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("family", "plan"), [("llama", "ar"), ("qwen3", "full"), ("gemma3_text", "tree:6"), ("phi3", "onepass:2")]
)
def test_float32_texts_are_those_of_hugging_face(family: str, plan: str) -> None:
    model = dual(family)
    use_own(model)
    engine = Engine(model, rows=2, capacity=96, plan=steps.parse(plan))
    for prompt, row in zip(PROMPTS, decode(engine, PROMPTS, Options(max_new_tokens=16)), strict=True):
        assert row.token_ids == reference.greedy_text(tiny(family), prompt, 16)
    kinds = attachment_of(model).memo("recorder")[""]._kinds.values()
    assert any(kind.graph is not None for kind in kinds)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3"])
def test_recorded_passes_write_and_attend_at_once(
    family: str, own: tuple[str, Operator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every layer, of plain steps, draft passes and those that verify, and their texts are those of eager passes."""
    counts: list[int] = []

    def rewrite(graph: Any) -> bool:
        changed = rewritten.rewrite(graph)
        counts.append(sum(node.kind() == f"orthrus::attended_{own[0]}" for node in graph.nodes()))
        return changed

    monkeypatch.setattr(rewritten, "between", lambda: (f"normed_{own[0]}", f"rotated_{own[0]}"))
    monkeypatch.setattr(traced, "rewrite", rewrite)
    model = dual(family, num_hidden_layers=2)
    use_own(model)
    for plan in ("ar", "full"):
        row = decode(Engine(model, rows=1, capacity=96, plan=steps.parse(plan)), PROMPTS[:1], OPTIONS)[0]
        assert row.token_ids == reference.greedy_text(tiny(family, num_hidden_layers=2), PROMPTS[0], 16)
    recorded = [kind for kind in attachment_of(model).memo("recorder")[""]._kinds.values() if kind.graph is not None]
    assert len(counts) == len(recorded) >= 3
    assert {*counts} == {2}


@pytest.mark.usefixtures("here")
def test_exact_tokens_of_all_plans_in_bfloat16() -> None:
    """Rows of any number, in passes of any width, down to one token."""
    model = dual("qwen3").to(torch.bfloat16)
    use_own(model)
    texts = []
    for plan, rows in (("ar", 1), ("full", 1), ("full", 3), ("onepass:2", 2), ("tree:6", 2)):
        engine = Engine(model, rows=rows, capacity=96, plan=steps.parse(plan), exact="token")
        assert engine.finding is not None
        assert engine.finding.holds
        texts.append([row.token_ids for row in decode(engine, PROMPTS, Options(max_new_tokens=12))])
    assert all(text == texts[0] for text in texts)


@pytest.mark.usefixtures("here")
@torch.inference_mode()
def test_a_recording_over_few_rows_serves_no_more() -> None:
    """Wider passes attend otherwise, and are another kind."""
    model = dual("llama")
    use_own(model)
    passes = Passes(model, ScratchCache(rows=1, capacity=128))
    passes.prefill(slice(0, 1), [[3, 4, 5]], chunk=64)
    recorder = attachment_of(model).memo("recorder")[""]
    for width in (FEW, FEW + 1, FEW - 1, FEW, FEW + 1, FEW + 2):
        token_BQ = torch.arange(width)[None]
        recorded = passes.verify(slice(0, 1), token_BQ)
        with patch.object(recorder, "logits", lambda _: None):
            assert torch.equal(passes.verify(slice(0, 1), token_BQ), recorded)
    assert sum(kind.graph is not None for kind in recorder._kinds.values()) == 2
