"""Recorded passes: the same bits as eager ones, over texts and widths that were not recorded, or no recording."""

import copy
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from orthrus.checkpoints.load import ready
from orthrus.decode import tree
from orthrus.decode.engine import Engine
from orthrus.decode.frames import Reading
from orthrus.decode.geometry import Geometry
from orthrus.decode.options import Options
from orthrus.decode.passes import Logits, Passes
from orthrus.decode.prepared import record_passes
from orthrus.decode.runner import Eager, Recorded
from orthrus.kernels import attention, int8, packed, products
from orthrus.kernels.recorded import is_recording
from orthrus.model import markov, traced
from orthrus.model.attachment import attachment_of
from orthrus.model.cache import ScratchCache
from orthrus.model.call import Call
from orthrus.model.traced import Kind, Recorder
from orthrus.policy import steps
from tests import reference
from tests.decode.drive import configure, decode, dual
from tests.families import FAMILIES, HYBRID, MOE, tiny

PROMPTS = [[5, 6, 7, 8] * 3, [9, 10, 11], [3]]
ROW = slice(0, 1)
DENSE = [family for family in FAMILIES if family not in MOE]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind of pass is recorded when it is met for the second time."""
    monkeypatch.setattr(traced, "USES", 1)


def recorder_of(model: PreTrainedModel) -> Recorder:
    recorder: Recorder = attachment_of(model).memo("recorder")[""]
    return recorder


def recordings(model: PreTrainedModel) -> list[Kind]:
    return [kind for kind in recorder_of(model)._kinds.values() if kind.graph is not None]


def passes_of(model: PreTrainedModel, geometry: Geometry | None = None) -> Passes:
    """One text, read."""
    passes = Passes(model, ScratchCache(rows=1, capacity=128), geometry)
    with torch.inference_mode():
        passes.prefill(ROW, PROMPTS[:1], chunk=64)
    return passes


@torch.inference_mode()
def token(passes: Passes, width: int = 1) -> Tensor:
    """Verify some tokens and keep the first, so that the next pass stands elsewhere."""
    logits = passes.verify(ROW, torch.arange(20, 20 + width)[None])
    passes.cache.commit(ROW, [1])
    return logits


@torch.inference_mode()
def read(passes: Passes) -> None:
    """Begin another text, which is when weights are looked at."""
    passes.cache.set_length(0, 0)
    passes.prefill(ROW, PROMPTS[:1], chunk=64)


RECURRENT = [family for family in HYBRID if family in ("qwen3_5_text", "olmo_hybrid")]


def shortest(family: str) -> dict[str, Any]:
    """One layer of each kind that a family has."""
    if family in HYBRID:
        return {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    return {} if family in ("gemma2", "gemma3_text") else {"num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("family", "plan"),
    [
        *((family, "full") for family in DENSE),
        *(("gemma3_text", "tree:6"), ("qwen3", "onepass:2"), ("llama", "ar")),
        *zip(RECURRENT * 2, ("ar", "full", "tree:6", "onepass:2"), strict=True),
    ],
)
def test_recorded_texts_are_those_of_the_plain_loop(family: str, plan: str) -> None:
    """Windows, soft caps, norms of queries and keys, recurrent states, rows that join and leave: each is recorded."""
    model, plain = dual(family, **shortest(family)), tiny(family, **shortest(family))
    engine = Engine(model, rows=2, capacity=96, plan=steps.parse(plan))
    for prompt, row in zip(PROMPTS, decode(engine, PROMPTS, Options(max_new_tokens=16)), strict=True):
        assert row.token_ids == reference.greedy_text(plain, prompt, 16)
    assert isinstance(engine.passes.runner, Recorded)
    assert len(recordings(model)) >= 2


@pytest.mark.parametrize(
    ("family", "fixed", "dtype"),
    [
        (RECURRENT[0], False, torch.float32),
        (RECURRENT[0], True, torch.bfloat16),
        (RECURRENT[1], False, torch.bfloat16),
        (RECURRENT[1], True, torch.float32),
    ],
)
def test_a_recording_of_a_hybrid_leaves_the_states_of_eager_passes(
    family: str, fixed: bool, dtype: torch.dtype
) -> None:
    """Bit for bit, at widths that are new, wider than any before, and over texts that go on.

    With fixed shapes the rule goes token by token, and each width is recorded apart.
    """
    model, geometry = dual(family, **shortest(family)).to(dtype), None
    if fixed:
        geometry = Geometry(widths=(1, 4, 16), chunks=(32,), span=64, tails=(64,), chunk_tails=(64,), group=1)
    made, plain = passes_of(model, geometry), passes_of(model, geometry)
    plain.runner = Eager(model, plain.cache)
    for width in (2, 5, 5, 5, 7, 3, 9, 9, 2, 1, 1, 1):
        assert torch.equal(token(made, width), token(plain, width))
        for one, other in zip(made.cache.states.buffers(), plain.cache.states.buffers(), strict=True):
            assert torch.equal(one, other)
    assert len(recordings(model)) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pack", [True, False])
def test_a_recording_has_the_bits_of_eager_passes_at_other_lengths_and_widths(dtype: torch.dtype, pack: bool) -> None:
    model = ready(dual(num_hidden_layers=2).to(dtype), compile=False, pack=pack)
    passes = passes_of(model)
    eager = Passes(model, passes.cache)
    eager.runner = Eager(model, passes.cache)
    for width in (2, 5, 5, 7, 3, 2):
        expected = token(eager, width)
        passes.cache.set_length(0, passes.cache.lengths[0] - 1)
        assert torch.equal(token(passes, width), expected)
    assert len(recordings(model)) == 1, "one for several rows, whatever their number"


def grown(texts: int) -> Reading:
    """A tree for each of so many texts."""
    scores = torch.randn(texts, 3, 50, generator=torch.Generator().manual_seed(texts))
    made = tree.grow(scores, nodes=6, anchor_B=torch.arange(texts))
    token_BP = torch.cat([torch.arange(texts)[:, None], made.token_BN], dim=1)
    return Reading(token_BQ=token_BP, depth_BQ=made.depth_BP, ancestor_BQQ=made.ancestor_BPP)


def each_kind(passes: Passes, rows: slice) -> list[Tensor | None]:
    """The logits of one pass of each kind over these rows."""
    B = rows.stop - rows.start
    anchor_B, token_BQ = torch.arange(B) + 7, torch.arange(4 * B).view(B, 4)
    stop_BS = torch.tensor([[0, 2]]).expand(B, -1)
    made = [
        Logits(passes.verify(rows, token_BQ[:, :1])),
        Logits(passes.verify(rows, token_BQ)),
        Logits(*passes.draft(rows, anchor_B, 3)[:2]),
        passes.run(rows, grown(B)),
        passes.run(rows, Reading(token_BQ=token_BQ, stop_BS=stop_BS, drafts=3)),
    ]
    return [logits for pair in made for logits in pair]


@pytest.mark.parametrize(
    ("family", "pack", "dtype"),
    [
        *(("qwen3", pack, dtype) for pack in (True, False) for dtype in (torch.float32, torch.bfloat16)),
        *(("gemma3_text", False, torch.bfloat16), (RECURRENT[0], False, torch.float32)),
        (RECURRENT[1], False, torch.bfloat16),
    ],
)
@torch.inference_mode()
def test_a_recording_of_three_texts_serves_any_number_of_them(family: str, pack: bool, dtype: torch.dtype) -> None:
    """Bit for bit, whichever rows of the cache they stand in, level or not; and keys are those of eager passes.

    One text has recordings of its own. None touches the rows beside the pass's, when it is made or when it is run.
    """
    model = ready(dual(family, **shortest(family)).to(dtype), compile=False, pack=pack)
    made, plain = (Passes(model, ScratchCache(rows=9, capacity=96)) for _ in range(2))
    plain.runner = Eager(model, plain.cache)
    places = [(0, 3), (0, 3), (0, 2), (2, 6), (1, 8), (0, 1), (0, 1), (0, 9), (4, 5), (6, 8)]
    for first, last in places:
        rows = slice(first, last)
        for one, other in zip(each_kind(made, rows), each_kind(plain, rows), strict=True):
            assert one is other is None or torch.equal(one, other)
        for passes in (made, plain):
            passes.verify(rows, torch.full((last - first, 2), 9))
            passes.cache.commit(rows, [1 + row % 2 for row in range(first, last)] if first else [1] * (last - first))
        for name in ("keys", "values"):
            assert all(map(torch.equal, getattr(made.cache, name), getattr(plain.cache, name)))
    kinds = recorder_of(model)._kinds
    assert [key for key, kind in kinds.items() if kind.graph is None] == []
    assert len(kinds) == 2 * (5 if family in RECURRENT else 4), "trees are verified as chains are, but by hybrids"


def test_each_number_of_texts_is_recorded_apart_where_attention_takes_them_in_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "_multiplies", lambda: True)
    monkeypatch.setattr(products, "_MANY", 0)
    passes = Passes(dual(num_hidden_layers=1).to(torch.bfloat16), ScratchCache(rows=4, capacity=96))
    eager = Passes(passes.model, passes.cache)
    eager.runner = Eager(passes.model, passes.cache)
    with torch.inference_mode():
        passes.prefill(slice(0, 4), [[5] * (3 + row) for row in range(4)], chunk=64)
        for count in (3, 2, 4) * 3:
            token_BQ = torch.arange(2 * count).view(count, 2)
            expected = eager.verify(slice(0, count), token_BQ)
            assert torch.equal(passes.verify(slice(0, count), token_BQ), expected)
    assert len(recordings(passes.model)) == 3


def test_recordings_of_fixed_shapes_serve_any_number_of_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention never takes these in turn, however many scores there are."""
    monkeypatch.setattr(products, "_multiplies", lambda: True)
    monkeypatch.setattr(products, "_MANY", 0)
    geometry = Geometry(widths=(1, 4, 16), chunks=(32,), span=64, tails=(64,), chunk_tails=(64,), group=4)
    passes = Passes(dual(num_hidden_layers=1).to(torch.bfloat16), ScratchCache(rows=4, capacity=96), geometry)
    eager = Passes(passes.model, passes.cache, geometry)
    eager.runner = Eager(passes.model, passes.cache)
    with torch.inference_mode():
        passes.prefill(slice(0, 4), [[5] * (3 + row) for row in range(4)], chunk=32)
        for count in (4, 2) * 2:
            token_BQ = torch.arange(2 * count).view(count, 2)
            expected = eager.verify(slice(0, count), token_BQ)
            assert torch.equal(passes.verify(slice(0, count), token_BQ), expected)
    assert len(recordings(passes.model)) == 1


def test_recordings_are_checked_over_a_cache_that_is_laid_out_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Head by head, as torch's attention reads keys faster: elsewhere sums may be associated otherwise."""
    plain, strides = Call.others, []

    def noted(self: Call) -> Any:
        given = plain(self)
        strides.extend(buffer.transpose(1, 2).is_contiguous() for buffer in given[2])
        return given

    monkeypatch.setattr(Call, "others", noted)
    recorded()
    assert strides
    assert all(strides)


@pytest.mark.parametrize("anchor", ["twin", "backbone"])
@pytest.mark.parametrize("plan", ["fixed:3", "auto", "tree:6"])
def test_a_server_whose_load_changes_makes_no_more_recordings(plan: str, anchor: str) -> None:
    """From one stream to eight and back: whatever their number, all passes were recorded before the first request."""
    model = configure(dual(num_hidden_layers=1), anchor=anchor)
    record_passes(model, rows=8)
    before = recordings(model)
    engine = Engine(model, rows=8, capacity=96, plan=steps.parse(plan))
    seen = set()
    for prompt in range(8):
        engine.add([5 + prompt] * (3 + prompt), Options(max_new_tokens=28))
        engine.step()
        seen.add(len(engine.live))
    while engine.busy:
        engine.step()
        seen.add(len(engine.live))
    assert seen >= set(range(1, 8))
    assert recordings(model) == before
    assert all(kind in before for kind in recorder_of(model)._kinds.values()), "none is on its way"


def test_with_fixed_shapes_fillers_tell_no_recordings_apart() -> None:
    geometry = Geometry(widths=(1, 4, 16), chunks=(32,), span=64, tails=(64,), chunk_tails=(64,), group=1)
    passes = passes_of(dual(num_hidden_layers=1), geometry)
    for width in (2, 3, 4, 2, 3, 4):
        token(passes, width)
    assert len(recordings(passes.model)) == 1


def test_short_and_long_texts_are_recorded_apart_where_attention_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_multiplies", lambda: True)
    monkeypatch.setattr(products, "_MANY", 6 * 40)
    passes = passes_of(dual(num_hidden_layers=2).to(torch.bfloat16))
    eager = Passes(passes.model, passes.cache)
    eager.runner = Eager(passes.model, passes.cache)
    for step in range(27):
        width = 5 + step % 3
        expected = token(eager, width)
        passes.cache.set_length(0, passes.cache.lengths[0] - 1)
        assert torch.equal(token(passes, width), expected)
    assert len(recordings(passes.model)) == 2


def test_a_recording_of_products_serves_passes_of_several_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than a block has: none of them may be left out, which were not there when it was recorded."""
    monkeypatch.setattr(products, "_multiplies", lambda: True)
    monkeypatch.setattr(products, "_MANY", 0)
    monkeypatch.setattr(products, "_AT_ONCE", 8)
    passes = passes_of(dual(num_hidden_layers=2).to(torch.bfloat16))
    eager = Passes(passes.model, passes.cache)
    eager.runner = Eager(passes.model, passes.cache)
    for width in (4, 4, 4, 20, 9):
        expected = token(eager, width)
        passes.cache.set_length(0, passes.cache.lengths[0] - 1)
        torch.testing.assert_close(token(passes, width), expected, atol=0.02, rtol=0.02)
    assert len(recordings(passes.model)) == 1


@pytest.mark.parametrize("rank", [0, 4])
def test_a_server_of_known_rows_has_its_passes_recorded_before_the_first_request(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one row and of several: plain steps, verifications, drafts; texts are as ever, and no draft is taken for a
    change of weights.
    """
    monkeypatch.setattr(traced, "USES", 1000)
    model = dual(num_hidden_layers=1)
    markov.install(model, markov.untrained(model, rank))
    record_passes(model, rows=3)
    recorder = recorder_of(model)
    assert len(recordings(model)) == 6
    assert not recorder.at_once
    before = recorder._passes
    plain = tiny("qwen3", num_hidden_layers=1)
    for prompts, plan in ((PROMPTS, "full"), (PROMPTS[:1], "full"), (PROMPTS, "ar")):
        engine = Engine(model, rows=3, capacity=96, plan=steps.parse(plan))
        rows = decode(engine, prompts, Options(max_new_tokens=3))
        assert [row.token_ids for row in rows] == [reference.greedy_text(plain, prompt, 3) for prompt in prompts]
    assert [kind.uses for kind in recordings(model)] == [1001] * 6
    assert sum(kind.used > before for kind in recordings(model)) >= 5


def test_of_a_model_that_another_drafter_serves_no_draft_pass_is_recorded() -> None:
    model = dual(num_hidden_layers=1)
    attachment_of(model).drafter = SimpleNamespace(taps=())
    record_passes(model, rows=3)
    assert len(recordings(model)) == 4


@pytest.mark.parametrize(("more", "count"), [({}, 2), ({"plain": False}, 0), ({"plain": False, "drafts": False}, 2)])
def test_what_a_drafter_reads_hidden_states_of_is_not_recorded(more: dict[str, bool], count: int) -> None:
    """Hooks would keep its recordings from being run; plain decoding, which has none, is recorded if it is wanted."""
    model = dual(num_hidden_layers=1)
    attachment_of(model).drafter = SimpleNamespace(taps=(0,))
    record_passes(model, rows=3, **more)
    made = attachment_of(model).memo("recorder")
    assert len(recordings(model) if made else []) == count


@pytest.mark.skipif(not int8.is_exact(), reason="no exact products of 8-bit integers here")
def test_int8_passes_are_recorded() -> None:
    model = ready(dual(num_hidden_layers=2), compile=False, pack=None, integers="int8")
    passes = passes_of(model)
    eager = Passes(model, passes.cache)
    eager.runner = Eager(model, passes.cache)
    for _ in range(4):
        expected = token(eager)
        passes.cache.set_length(0, passes.cache.lengths[0] - 1)
        assert torch.equal(token(passes), expected)
    assert recordings(model)


def test_changed_weights_are_recorded_anew() -> None:
    """Whether they are written to or replaced, packed or not."""
    model = ready(dual(num_hidden_layers=1).to(torch.bfloat16), compile=False, pack=True)
    passes = passes_of(model)
    for _ in range(3):
        token(passes)
    first = recordings(model)
    assert first
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    read(passes)
    assert recordings(model) == []
    for _ in range(3):
        token(passes)
    assert recordings(model)
    model.model.layers[0].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight.data.clone()
    read(passes)
    assert recordings(model) == []


def agree(passes: Passes) -> bool:
    """Whether a pass has the bits of an eager one."""
    eager = Passes(passes.model, passes.cache)
    eager.runner = Eager(passes.model, passes.cache)
    expected = token(eager)
    passes.cache.set_length(0, passes.cache.lengths[0] - 1)
    return torch.equal(token(passes), expected)


def recorded(**overrides: object) -> Passes:
    """Passes over one text, some of which were recorded."""
    passes = passes_of(dual(num_hidden_layers=1, **overrides))
    for _ in range(3):
        token(passes)
    assert recordings(passes.model)
    return passes


@pytest.mark.parametrize("pack", [False, True])
def test_other_tensors_in_the_place_of_weights_are_met(pack: bool) -> None:
    """A parameter that is set, and all of them by `load_state_dict(assign=True)`; by passes made before, too."""
    model = ready(dual(num_hidden_layers=1).to(torch.bfloat16), compile=False, pack=pack)
    passes = passes_of(model)
    for _ in range(3):
        token(passes)
    assert recordings(model)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 2, requires_grad=False)
    read(passes)
    assert agree(passes)
    for _ in range(3):
        token(passes)
    model.load_state_dict({name: 1.5 * tensor for name, tensor in model.state_dict().items()}, assign=True)
    read(passes)
    assert agree(passes)


@pytest.mark.parametrize("of_class", [False, True])
def test_another_forward_is_met(of_class: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is set on a module or, as packages of kernels do, on its class: by the next text."""
    passes = recorded()
    mlp = passes.model.model.layers[0].mlp
    plain = type(mlp).forward
    if of_class:
        monkeypatch.setattr(type(mlp), "forward", lambda self, x: 2 * plain(self, x))
    else:
        mlp.forward = lambda x: 2 * plain(mlp, x)
    read(passes)
    assert agree(passes)
    assert agree(Passes(passes.model, passes.cache))


def test_another_module_is_met_by_the_next_text() -> None:
    """One that takes the place of a layer, or of a whole part of it."""
    for name in ("mlp.up_proj", "mlp"):
        passes = recorded()
        layer = passes.model.model.layers[0]
        other = copy.deepcopy(layer.get_submodule(name))
        for parameter in other.parameters():
            torch.nn.init.normal_(parameter, 0, 0.1)
        read(passes)
        before = token(passes)
        layer.set_submodule(name, other)
        read(passes)
        assert not torch.equal(token(passes), before)
        assert agree(passes)


def test_passes_under_autocast_are_eager() -> None:
    """A recording made without it is not used under it, and none is made under it."""
    passes = recorded()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert agree(passes)
    passes = passes_of(dual(num_hidden_layers=1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            token(passes)
    assert agree(passes)


def test_what_raises_while_it_is_recorded_stays_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it raises: a key that is no number, a type that is none of torch's."""
    plain = attention.attention

    def odd(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        assert {True: 1}[is_recording() is False], "a KeyError"
        return plain(module, query, *args, **kwargs)

    monkeypatch.setattr(attention, "attention", odd)
    attention.register()
    try:
        passes = passes_of(dual(num_hidden_layers=1))
        for _ in range(4):
            token(passes)
        assert recordings(passes.model) == []
    finally:
        monkeypatch.undo()
        attention.register()


def test_a_size_that_a_recording_cannot_take_is_passed_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention function that goes another way in Python where texts are long."""
    plain, few = attention.attention, torch.zeros(20)

    def odd(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        out, nothing = plain(module, query, key, *args, **kwargs)
        return (out if key.shape[2] > 20 else out + few[key.shape[2] - 1]), nothing

    monkeypatch.setattr(attention, "attention", odd)
    attention.register()
    try:
        passes = recorded()
        while passes.cache.lengths[0] < 24:
            assert agree(passes)
        assert recordings(passes.model) == []
    finally:
        monkeypatch.undo()
        attention.register()


def test_a_recording_that_is_no_longer_used_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as many as may be kept none is dropped while it is in use."""
    monkeypatch.setattr(traced, "_MOST", 1)
    monkeypatch.setattr(traced, "_STALE", 4)
    passes = recorded()
    (first,) = recordings(passes.model)
    for _ in range(4):
        token(passes, 3)
        token(passes)
    assert recordings(passes.model) == [first]
    for _ in range(8):
        token(passes, 3)
    (second,) = recordings(passes.model)
    assert second is not first
    assert agree(passes)


def test_nothing_is_kept_of_a_model_that_is_no_longer_recorded() -> None:
    """A model on another device would keep its weights on this one."""
    passes = recorded()
    weight = weakref.ref(passes.model.model.layers[0].mlp)
    passes.model.model.layers[0].mlp = torch.nn.Sequential(passes.model.model.layers[0].mlp.up_proj)
    passes.model.model.layers[0].mlp.forward = lambda x: x
    assert traced.recorder_for(passes.model) is None
    del passes.runner
    gc.collect()
    assert weight() is None


def test_the_first_copy_of_a_weight_is_no_change() -> None:
    """The twin's are made in the first draft pass, long after others were recorded."""
    model = ready(dual(num_hidden_layers=1).to(torch.bfloat16), compile=False, pack=True)
    passes = passes_of(model)
    for _ in range(3):
        token(passes)
    before = recordings(model)
    with torch.inference_mode():
        passes.draft(ROW, torch.tensor([7]), 4)
    token(passes)
    assert recordings(model) == before != []


def test_hooks_are_called() -> None:
    """A pass that someone looks into is made eagerly, and recordings are used again afterwards."""
    model = dual(num_hidden_layers=1)
    passes = passes_of(model)
    for _ in range(3):
        token(passes)
    seen: list[object] = []
    hook = model.model.norm.register_forward_hook(lambda *_: seen.append(1))
    token(passes)
    hook.remove()
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append(2))
    token(passes)
    everywhere.remove()
    token(passes)
    assert seen.count(1) == 1
    assert seen.count(2) > 1
    assert recordings(model)


@pytest.mark.parametrize("of_texts", [False, True])
def test_what_takes_a_size_for_fixed_is_not_used(of_texts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention function that goes by the number of keys, or texts, in Python: its passes stay eager, and right."""
    plain = attention.attention

    def odd(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        out, nothing = plain(module, query, key, *args, **kwargs)
        return out * float(int(key.shape[0 if of_texts else 2])), nothing

    monkeypatch.setattr(attention, "attention", odd)
    attention.register()
    try:
        model = dual(num_hidden_layers=1)
        passes = Passes(model, ScratchCache(rows=2, capacity=96))
        with torch.inference_mode():
            for _ in range(4):
                passes.verify(slice(0, 2), torch.ones(2, 1, dtype=torch.long))
        assert recordings(model) == []
    finally:
        monkeypatch.undo()
        attention.register()


def test_a_draft_pass_of_one_mask_is_recorded_where_one_row_has_an_operator_of_its_own() -> None:
    """Which multiplies one row and no more."""

    def one(row: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(row.view(1, 1, weight.shape[1]), weight, bias)

    model, anchor_B = configure(dual(num_hidden_layers=2), anchor="backbone"), torch.tensor([7])
    packed.pack(model)
    for layer in model.modules():
        if isinstance(layer, packed.PackedLinear):
            layer._own = one
    passes, plain = passes_of(model), passes_of(model)
    plain.runner = Eager(model, plain.cache)
    with torch.inference_mode():
        for _ in range(3):
            proposals = (each.draft(ROW, anchor_B, 1) for each in (passes, plain))
            for found, expected in zip(*(proposal[:2] for proposal in proposals), strict=True):
                assert torch.equal(found, expected)
    assert [kind.graph is not None for kind in recorder_of(model)._kinds.values()] == [True]


@pytest.mark.parametrize("family", MOE)
def test_models_with_experts_are_not_recorded(family: str) -> None:
    """Which experts are called is decided in Python."""
    assert traced.recorder_for(dual(family)) is None


def test_replaced_layers_are_met() -> None:
    """An adapter put in a layer's place after passes were recorded."""
    model = dual(num_hidden_layers=1)
    for _ in range(3):
        token(passes_of(model))

    class Doubled(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model.model.layers[0].mlp.up_proj.__class__ = Doubled
    assert traced.recorder_for(model) is None, "nobody knows what it does next time"


def test_nothing_outlives_the_model() -> None:
    """A recording holds weights, and goes with them."""
    model = dual(num_hidden_layers=1)
    passes = passes_of(model)
    for _ in range(3):
        token(passes)
    assert recordings(model)
    weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    del model, passes
    gc.collect()
    assert weight() is None
