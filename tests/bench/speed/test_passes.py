"""Passes are timed one by one, in turns, and leave the cache as it was."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from orthrus.bench.peers.hf import plain
from orthrus.bench.shapes import shaped
from orthrus.bench.speed import passes as module
from orthrus.bench.speed.passes import ALL, Pass, costs, kinds
from orthrus.bench.speed.report import Report
from orthrus.bench.speed.tables import tables
from orthrus.decode.frames import Reading
from orthrus.decode.passes import Passes
from orthrus.decode.runner import Recorded
from orthrus.errors import CheckpointError, ConfigError
from orthrus.kernels.packed import PackedLinear, unpack
from orthrus.model.attach import config_of, duals
from orthrus.model.cache import ScratchCache
from tests.bench.conftest import Ticks

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def never_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes take as long as they will at once."""
    monkeypatch.setattr(Recorded, "uses", 0)


def test_the_plain_step_comes_first_and_drafts_need_two_positions() -> None:
    assert kinds([4, 1, 2, 4]) == [
        Pass("ar", 1),
        Pass("draft", 2),
        Pass("verify", 2),
        Pass("draft", 4),
        Pass("verify", 4),
    ]


def test_every_pass_has_its_repeats_at_every_context_and_batch(loaded: Loaded, ticks: Ticks) -> None:
    counted: list[None] = []
    found = list(
        costs(
            loaded[0],
            widths=(1, 4),
            contexts=(5, 9),
            batches=(1, 2),
            repeats=3,
            clock=ticks,
            on_pass=lambda: counted.append(None),
        )
    )
    places = [(cost.batch, cost.context, cost.what.kind, cost.what.width) for cost in found]
    each = [("ar", 1), ("draft", 4), ("verify", 4)]
    assert places == [(b, c, *kind) for b in (1, 2) for c in (5, 9) for kind in each]
    assert {tuple(cost.repeats_seconds) for cost in found} == {(1.0, 1.0, 1.0)}
    assert found[0].to_dict()["seconds"] == 1.0
    assert len(counted) == 36


def test_fused_passes_come_by_width_and_stops_and_carry_a_block_for_each_stop(
    loaded: Loaded, ticks: Ticks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All stops of a pass are as many as it verifies; more than that are no pass of their own."""
    rows: list[tuple[int, int]] = []
    real = Passes.run

    def spy(passes: Passes, where: slice, reading: Reading) -> object:
        width = reading.token_BQ.shape[1]
        if width > 1 and reading.stop_BS is not None:
            rows.append((width, passes.scratch(reading) - width))
        return real(passes, where, reading)

    monkeypatch.setattr(Passes, "run", spy)
    found = [
        cost
        for cost in costs(
            loaded[0], widths=(1, 2, 4), stops=(1, 2, ALL), contexts=(5,), batches=(2,), repeats=1, clock=ticks
        )
        if cost.what.kind == "fused"
    ]
    places = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
    assert [cost.what for cost in found] == [Pass("fused", *place) for place in places]
    assert sorted(rows[:5]) == [(one.what.width, one.what.rows - one.what.width) for one in found]
    assert found[-1].to_dict()["stops"] == 4


def test_fused_passes_are_reported_in_plain_passes() -> None:
    """Rows in all, milliseconds, and two ratios: 20 rows that cost three plain passes, three quarters of two passes."""
    place = {"model": "tiny", "dtype": "float32", "batch": 1, "context": 9}
    seconds = {("ar", 1, 0): 1.0, ("draft", 4, 0): 1.5, ("verify", 4, 0): 2.5, ("fused", 4, 4): 3.0, ("fused", 8, 1): 2}
    passes = [
        {**place, "pass": kind, "width": width, "stops": stops, "seconds": s / 1000}
        for (kind, width, stops), s in seconds.items()
    ]
    apart, fused = tables(Report(provenances=[], summaries=[], passes=passes))
    assert [row[4] for row in apart.rows] == ["1", "4"]
    assert fused.rows == [
        ["tiny", "float32", "1", "9", "4", "4", "20", "3.00", "3.00", "0.75"],
        ["tiny", "float32", "1", "9", "8", "1", "16", "2.00", "2.00", "–"],
    ]


def test_passes_take_turns_over_a_cache_of_the_right_length(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times round, the first of them for warming up, in orders of chance."""
    order: list[str] = []

    def note(passes: Passes, rows: slice, token_BQ: object, what: Pass) -> None:
        assert passes.cache.lengths == [7, 7]
        order.append(what.kind[0])

    monkeypatch.setattr(module, "_run", note)
    list(costs(loaded[0], widths=(2,), contexts=(7,), batches=(2,), repeats=2))
    turns = [order[start : start + 3] for start in range(0, len(order), 3)]
    assert [sorted(turn) for turn in turns] == 3 * [["a", "d", "v"]]
    assert len({*map(tuple, turns)}) > 1


@pytest.mark.parametrize(
    "given",
    [
        {"widths": (0,)},
        {"contexts": ()},
        {"batches": (0,)},
        {"repeats": 0},
        {"stops": (0,)},
        {"contexts": (500,), "widths": (64,)},
    ],
)
def test_numbers_that_cannot_be_are_refused(loaded: Loaded, given: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="must"):
        list(costs(loaded[0], **given))


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_the_floor_multiplies_by_every_matrix_of_a_verify_pass(loaded: Loaded, kept: torch.dtype) -> None:
    """Counted by torch (which counts neither attention on a CPU nor packed layers); drafting's own are left out.

    Keys may be narrower than the model, as int8 and int4 models keep them.
    """
    model, counts = loaded[0], []
    unpack(model)
    for kind in ("verify", "matmul"):
        cache = ScratchCache(rows=2, capacity=40)
        passes, rows = Passes(model, cache), slice(0, 2)
        token_BQ = torch.zeros(2, 4, dtype=torch.long)
        with torch.inference_mode():
            passes.verify(rows, token_BQ)
            cache.set_lengths_of(rows, [20, 20])
            for store in cache.stores.values() if kind == "matmul" else ():
                store.keys, store.values = store.keys.to(kept), store.values.to(kept)
            with FlopCounterMode(display=False) as counter:
                module._run(passes, rows, token_BQ, Pass(kind, 4))
        counts.append(counter.get_flop_counts()["Global"])
    verify, floor = counts
    assert floor[torch.ops.aten.mm] == verify[torch.ops.aten.mm] > 0
    config = model.config
    queries, keys = 2 * 4 * config.num_attention_heads, 24
    assert floor[torch.ops.aten.bmm] == config.num_hidden_layers * 4 * queries * keys * config.head_dim


def test_the_floor_comes_last_and_its_columns_when_asked_for() -> None:
    assert kinds([1, 4], floor=True)[-4:] == [Pass("matmul", 1), Pass("matmul", 4), Pass("read", 1), Pass("copy", 1)]
    seconds = {("ar", 1): 1.0, ("draft", 4): 3.0, ("verify", 4): 5.0, ("matmul", 4): 1.5, ("read", 1): 0.5}
    place = {"model": "tiny", "dtype": "float32", "batch": 1, "context": 9}
    passes = [{**place, "pass": kind, "width": width, "seconds": s / 1000} for (kind, width), s in seconds.items()]
    (grid,) = tables(Report(provenances=[], summaries=[], passes=passes))[:1]
    assert grid.header[-3:] == ["matmul ms", "read ms", "cycle / floor"]
    assert grid.rows[-1][-6:] == ["–", "3.00", "5.00", "1.50", "–", "2.00"]


def test_bytes_are_those_a_pass_must_read(loaded: Loaded) -> None:
    """The weights it multiplies by and the keys in reach, but for the table of embeddings, of which it reads rows."""
    model = loaded[0]
    cache = ScratchCache(rows=2, capacity=40)
    passes, rows = Passes(model, cache), slice(0, 2)
    with torch.inference_mode():
        passes.verify(rows, torch.zeros(2, 4, dtype=torch.long))
    cache.set_lengths_of(rows, [20, 20])
    named = dict(model.named_parameters())
    assert not model.config.tie_word_embeddings
    own = sum(p.nbytes for name, p in named.items() if ".diffusion." not in name and "embed_tokens" not in name)
    twin = sum(p.nbytes for name, p in named.items() if ".diffusion." in name)
    config = model.config
    keys = 2 * config.num_hidden_layers * 2 * 20 * config.num_key_value_heads * config.head_dim * 4
    assert module._bytes(passes, rows, Pass("read", 1)) == keys
    assert module._bytes(passes, rows, Pass("verify", 4)) == own + keys
    assert module._bytes(passes, rows, Pass("draft", 4)) == own + twin + keys
    assert module._bytes(passes, rows, Pass("fused", 4, 1)) == own + twin + keys
    assert module._bytes(passes, rows, Pass("matmul", 4)) is None
    copied = [cost.bytes for cost in costs(model, widths=(1,), contexts=(9,), repeats=1, floor=True)][-1]
    assert copied == 2 * module.COPIED["cpu"]


def test_prompts_are_read_and_leave_the_cache_as_it_was(loaded: Loaded) -> None:
    """To the first token without a view, plainly, and with a block: the last two commit what they read."""
    model = loaded[0]
    cache = ScratchCache(rows=1, capacity=60)
    passes, rows = Passes(model, cache), slice(0, 1)
    cache.set_length(0, 20)
    with torch.inference_mode():
        for width in (0, 1, 4):
            module._read(passes, rows, 20, width, plain(model))
            assert cache.lengths == [20]
    found = [cost.what for cost in costs(model, widths=(1, 4), contexts=(20,), repeats=1, prompt=True)]
    assert found[-3:] == [Pass("prompt", 0), Pass("prompt", 1), Pass("prompt", 4)]


def test_shares_of_bandwidth_and_first_tokens_have_their_columns() -> None:
    place = {"model": "tiny", "dtype": "float32", "batch": 1, "context": 9}
    given = [("ar", 1, 2.0, 600), ("verify", 4, 3.0, 600), ("copy", 1, 1.0, 400)]
    given += [("prompt", 0, 7.0, None), ("prompt", 1, 8.0, None), ("prompt", 4, 9.0, None)]
    passes = [{**place, "pass": kind, "width": w, "seconds": s / 1000, "bytes": b} for kind, w, s, b in given]
    of_passes, prompts = tables(Report(provenances=[], summaries=[], passes=passes))[:2]
    assert of_passes.header[-1] == "of bandwidth"
    assert [row[-1] for row in of_passes.rows] == ["75.0 %", "50.0 %"]
    assert prompts.rows == [["tiny", "float32", "1", "9", "7.0", "8.0", "9.0"]]


def test_a_shape_is_made_from_its_configuration_alone(tmp_path: Path) -> None:
    """Random weights of the precision asked for, a view of 32 slots; what is no configuration is named."""
    shape = {"model_type": "qwen3", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(shape))
    model = shaped(str(file), dtype="bfloat16", device="cpu")
    assert (model.dtype, config_of(model).block_size, len(duals(model))) == (torch.bfloat16, 32, 2)
    assert any(p.abs().sum() > 0 for p in model.parameters())
    assert isinstance(shaped(str(file), dtype="float32", device="cpu", pack=True).lm_head, PackedLinear)
    with pytest.raises(ConfigError, match="drop one"):
        shaped(str(file), device="cpu", compile=True, pack=True)
    (tmp_path / "other.json").write_text("{}")
    for name in ("other.json", "missing.json"):
        with pytest.raises(CheckpointError, match=name):
            shaped(str(tmp_path / name), device="cpu")


@pytest.mark.parametrize("file", sorted((ROOT / "recipes/shapes").glob("*.json")), ids=lambda file: file.stem)
def test_shapes_that_come_along_are_configurations(file: Path) -> None:
    """Without making their weights, which are gigabytes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(file))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    least, most = {"qwen3-60m": (55, 65), "qwen3-1.7b": (1600, 2100), "qwen3-8b": (8000, 8400)}[file.stem]
    assert least < millions < most
