"""Each pass computes what the whole model would over the whole text, over the slots it says, and no logits more."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from orthrus.decode.frames import Reading, _form, known_layout, lay_out
from orthrus.decode.passes import Logits, Passes
from orthrus.errors import CacheFull, ConfigError
from orthrus.kernels import masks
from orthrus.model.attach import config_of, windows_of
from orthrus.model.cache import ScratchCache
from orthrus.model.dual import View
from tests.decode.drive import configure, dual
from tests.families import FAMILIES, WINDOWED

VARIANTS = [*((family, {}) for family in FAMILIES), *WINDOWED.items()]
TEXTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [20, 21], [30, 31, 32, 33, 34, 35]]
BLOCK = [[40, 41, 42], [43, 44, 45], [46, 47, 48]]
ALL = slice(0, 3)
NEAR = {"rtol": 0.0, "atol": 2e-5}

each_variant = pytest.mark.parametrize(("family", "overrides"), VARIANTS)


def passes_over(model: PreTrainedModel, *, chunk: int = 512) -> Passes:
    """Three rows of different length, read and committed."""
    passes = Passes(model, ScratchCache(rows=3, capacity=48))
    passes.prefill(ALL, TEXTS, chunk=chunk)
    assert passes.cache.lengths == [len(t) for t in TEXTS]
    return passes


def whole(model: PreTrainedModel, text: list[int]) -> Tensor:
    """Logits `[T, V]` of one plain forward over a text, without any cache."""
    logits: Tensor = model(input_ids=torch.tensor([text]), use_cache=False).logits[0]
    return logits


@each_variant
@torch.no_grad()
def test_verify_equals_one_plain_forward(family: str, overrides: dict[str, object]) -> None:
    """Prefilled whole and in chunks, ragged rows: logits as if each row's text had been read at once, alone."""
    model = dual(family, attn=None, **overrides)
    for chunk in (512, 4):
        logits = passes_over(model, chunk=chunk).verify(ALL, torch.tensor(BLOCK))
        for row in range(3):
            torch.testing.assert_close(logits[row], whole(model, TEXTS[row] + BLOCK[row])[-3:], **NEAR)


def whole_pass(model: PreTrainedModel, text: list[int], reading: Reading, row: int) -> tuple[Tensor, Tensor]:
    """The specification of a pass over one text: every AR row and every block by itself, its text read from the start.

    An AR row is a plain forward over its path. A block is a forward of the twin over its own slots alone, behind the
    frozen view's keys of the text it continues: no other row, no other block, no cache. Returns `[Q, V]`, `[S, M, V]`.
    """
    config, tokens = config_of(model), reading.token_BQ[row].tolist()
    if reading.ancestor_BQQ is None:
        paths = [list(range(q + 1)) for q in range(len(tokens))]
    else:
        paths = [[j for j, on in enumerate(path) if on] for path in reading.ancestor_BQQ[row].tolist()]
    ar = torch.stack([whole(model, text + [tokens[i] for i in path])[-1] for path in paths])
    if reading.stop_BS is None:
        return ar, ar[:0, None]
    shown = [] if reading.shown_BJ is None else reading.shown_BJ[row].tolist()
    last = config.block_attention == "bidirectional" and config.anchor == "twin"
    block = [*shown, *[config.mask] * (reading.skip + reading.drafts + last - len(shown))]
    ahead = []
    for stop in reading.stop_BS[row].tolist():
        behind = text + ([] if stop < 0 else [tokens[i] for i in paths[stop]])
        logits = block_alone(model, behind, block)
        ahead.append(logits[reading.skip : reading.skip + reading.drafts])
    return ar, torch.stack(ahead)


class Recorder:
    """A cache for one pass: frozen keys of a prefix are recorded first, then served to a block of the twin."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        if layer_idx not in self.layers:
            self.layers[layer_idx] = (key, value)
            return key, value
        old_key, old_value = self.layers[layer_idx]
        return torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0


def block_alone(model: PreTrainedModel, text: list[int], block: list[int]) -> Tensor:
    """A block of the twin behind a text, by concatenation: no scratch cache, no other rows. Logits of all slots."""
    n, K, recorder = len(text), len(block), Recorder()

    def run(ids: list[int], start: int, limit: list[int], view: str) -> Tensor:
        positions = torch.arange(start, start + len(ids))[None]
        made = masks.layer_masks(
            masks.up_to(torch.tensor([limit]), span=start + len(ids)),
            query_position_BQ=positions,
            key_position_BS=torch.arange(start + len(ids))[None],
            windows=windows_of(model),
            dtype=torch.float32,
        )
        logits: Tensor = model(
            input_ids=torch.tensor([ids]),
            attention_mask=made.full,
            position_ids=positions,
            past_key_values=recorder,
            use_cache=True,
            view=View(name=view, masks=made),  # type: ignore[arg-type]
        ).logits[0]
        return logits

    run(text, 0, list(range(n)), "ar")
    causal = config_of(model).block_attention == "causal"
    return run(block, n, [n + (j if causal else K - 1) for j in range(K)], "diffusion")


STOPS = torch.tensor([[0, 2], [1, 0], [2, 1]])
#            root   1  2  3  4       1 and 2 are children of the root, 3 of 1, 4 of 2
DEPTH = torch.tensor([[0, 1, 1, 2, 2]] * 3)
ANCESTORS = torch.tensor(
    [[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]]] * 3, dtype=torch.bool
)
NODES = torch.tensor([[40, 41, 42, 43, 44]] * 3)
ANCHORS = torch.tensor([[40], [43], [46]])

READINGS: dict[str, Reading] = {
    "a plain step": Reading(token_BQ=ANCHORS),
    "a chain": Reading(token_BQ=torch.tensor(BLOCK)),
    "a tree": Reading(token_BQ=NODES, depth_BQ=DEPTH, ancestor_BQQ=ANCESTORS),
    "a row and masks behind it": Reading(token_BQ=ANCHORS, stop_BS=torch.zeros(3, 1, dtype=torch.long), drafts=3),
    "a row and a block that holds it": Reading(
        token_BQ=ANCHORS, stop_BS=torch.full((3, 1), -1), shown_BJ=ANCHORS, skip=1, drafts=3
    ),
    "a block with settled drafts": Reading(
        token_BQ=ANCHORS, stop_BS=torch.full((3, 1), -1), shown_BJ=torch.tensor(BLOCK), skip=2, drafts=3
    ),
    "a chain and two blocks": Reading(token_BQ=torch.tensor(BLOCK), stop_BS=STOPS, drafts=3),
    "a tree and two blocks": Reading(
        token_BQ=NODES, depth_BQ=DEPTH, ancestor_BQQ=ANCESTORS, stop_BS=torch.tensor([[0, 4], [3, 1], [2, 0]]), drafts=3
    ),
}
VIEWS = [("bidirectional", "twin"), ("bidirectional", "backbone"), ("causal", "twin"), ("causal", "backbone")]


@pytest.mark.parametrize("shape", READINGS)
@each_variant
@torch.no_grad()
def test_every_pass_equals_its_rows_and_blocks_alone(family: str, overrides: dict[str, object], shape: str) -> None:
    """Ragged rows together, and each one alone (whose lone row sees the same as all): every kind of block."""
    model, reading = dual(family, **overrides), READINGS[shape]
    kinds = VIEWS if reading.stop_BS is not None and family in ("qwen3", "gemma3_text") else VIEWS[:1]
    for attention, anchor in kinds:
        configure(model, block_attention=attention, anchor=anchor)
        logits = passes_over(model).run(ALL, reading)
        for row, text in enumerate(TEXTS):
            ar_QV, ahead_SMV = whole_pass(model, text, reading, row)
            own = slice(row, row + 1)
            for part in (
                Logits(*(x if x is None else x[own] for x in logits)),
                passes_over(model).run(own, reading.rows(own)),
            ):
                torch.testing.assert_close(part.ar_BQV[0], ar_QV, **NEAR)
                if part.ahead_BSMV is not None:
                    torch.testing.assert_close(part.ahead_BSMV[0], ahead_SMV, **NEAR)


@pytest.mark.parametrize("anchor", ["twin", "backbone"])
@each_variant
@torch.no_grad()
def test_reading_a_prompt_drafts_what_follows(family: str, overrides: dict[str, object], anchor: str) -> None:
    """Ragged rows, read whole and in chunks: the proposals of a pass of their own, and the keys of plain reading."""
    model = dual(family, attn=None, **overrides)
    configure(model, anchor=anchor)
    apart = passes_over(model)
    expected = apart.draft(ALL, ANCHORS[:, 0], drafts=3)
    for chunk in (512, 11, 4):
        passes = Passes(model, ScratchCache(rows=3, capacity=48))
        made = passes.prefill(ALL, TEXTS, chunk=chunk, anchors=[40, 43, 46], drafts=3)
        assert made is not None
        torch.testing.assert_close(made.logits_BMV, expected.logits_BMV, **NEAR)
        torch.testing.assert_close(made.first_B1V, expected.first_B1V, **NEAR)
        assert passes.cache.lengths == apart.cache.lengths
        block = torch.tensor(BLOCK)
        torch.testing.assert_close(passes.verify(ALL, block), apart.verify(ALL, block), **NEAR)
        passes.cache.commit(ALL, [1] * 3)  # the anchor's keys are there


@pytest.mark.parametrize("anchor", ["twin", "backbone"])
@each_variant
@torch.no_grad()
def test_passes_leave_only_verified_keys(family: str, overrides: dict[str, object], anchor: str) -> None:
    """Draft, keep the anchor, verify, commit part, do it again: rejected keys and the twin's own show nowhere."""
    model = dual(family, attn=None, **overrides)
    configure(model, anchor=anchor)
    passes = passes_over(model)
    passes.draft(ALL, torch.tensor([40, 43, 46]), drafts=7)
    passes.cache.commit(ALL, [1, 1, 1])
    passes.verify(ALL, torch.tensor(BLOCK)[:, 1:])
    passes.cache.commit(ALL, [0, 1, 2])
    passes.draft(ALL, torch.tensor([50, 51, 52]), drafts=2)
    passes.cache.commit(ALL, [1, 1, 1])
    logits = passes.verify(ALL, torch.tensor([[60], [61], [62]]))
    for row, kept in enumerate((1, 2, 3)):
        text = [*TEXTS[row], *BLOCK[row][:kept], 50 + row, 60 + row]
        torch.testing.assert_close(logits[row], whole(model, text)[-1:], **NEAR)


# ---------------------------------------------------------------- what is not computed


@contextmanager
def projected(model: PreTrainedModel) -> Iterator[list[int]]:
    """Note how many positions per row the output head sees in each pass."""
    seen: list[int] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].shape[1])

    handle = model.get_output_embeddings().register_forward_pre_hook(note)
    yield seen
    handle.remove()


@torch.no_grad()
def test_no_logits_are_computed_in_vain() -> None:
    """A prompt is projected nowhere; of a draft pass the AR row and the drafts are; a verify pass is everywhere."""
    model = dual()
    with projected(model) as seen:
        passes = passes_over(model, chunk=4)
        assert seen == []
        passes.draft(ALL, torch.tensor([40, 43, 46]), drafts=5)
        passes.verify(ALL, torch.tensor(BLOCK))
    assert seen == [1 + 5, 3]


@torch.no_grad()
def test_prompts_that_begin_level_are_read_without_a_mask() -> None:
    """Only the block behind them has one: an anchor, three drafts and the last mask, all behind one row."""
    model, made = dual(), []
    passes = Passes(model, ScratchCache(rows=3, capacity=48))

    def noted(name: str) -> Any:
        plain = getattr(masks, name)
        return lambda rows, *rest, **more: made.append((name, rows.shape[1])) or plain(rows, *rest, **more)

    with patch.multiple(masks, additive=noted("additive"), up_to=noted("up_to")):
        passes.prefill(slice(0, 2), [[*range(3, 20)], [*range(4, 20)]], chunk=8)
        assert made == []
        passes.prefill(slice(2, 3), [[*range(3, 15)]], chunk=8, anchors=[40], drafts=3)
    assert made == [("up_to", 1), ("additive", 5)]


@pytest.mark.parametrize(("attention", "anchor"), VIEWS)
@torch.no_grad()
def test_no_slot_is_read_in_vain(attention: str, anchor: str) -> None:
    """A block's last slot, which predicts nothing, is there only where others see it and were trained to."""
    model = dual()
    configure(model, block_attention=attention, anchor=anchor)
    passes, read = passes_over(model), []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda _, given: read.append(given[0].shape[1]))
    passes.draft(ALL, ANCHORS[:, 0], drafts=5)
    passes.run(ALL, READINGS["a chain and two blocks"])
    handle.remove()
    last, own = (attention, anchor) == ("bidirectional", "twin"), anchor == "twin"
    assert read == [1 + own + 5 + last, 3 + 2 * (3 + last)]


def test_layouts_that_are_kept_are_on_the_cpu_whatever_torch_makes_tensors_on() -> None:
    reading = Reading(token_BQ=torch.tensor([[5, 6, 7]]), stop_BS=torch.tensor([[2]]), drafts=3)
    length_B, how = torch.tensor([4]), {"mask": 1, "last": True}
    _form.cache_clear()
    with torch.device("meta"):
        known = known_layout(reading, length_B, causal=False, dtype=torch.float32, **how)
    assert known is not None
    assert known.own.device.type == "cpu"
    for found, expected in zip(known[:3], lay_out(reading, length_B, **how), strict=False):
        assert torch.equal(found, expected)


@torch.no_grad()
def test_a_full_cache_is_said_before_anything_is_written() -> None:
    """Neither keys nor lengths change when a pass would run past the end."""
    passes = Passes(dual(), ScratchCache(rows=3, capacity=12))
    passes.prefill(ALL, TEXTS, chunk=512)
    before = [buffer.clone() for buffer in (*passes.cache.keys, *passes.cache.values)]
    with pytest.raises(CacheFull, match="needs 14 cache positions, the cache has 12"):
        passes.verify(ALL, torch.tensor(BLOCK))
    with pytest.raises(CacheFull, match="needs 17 cache positions, the cache has 12"):
        passes.draft(ALL, torch.tensor([1, 2, 3]), drafts=3)
    after = (*passes.cache.keys, *passes.cache.values)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert passes.cache.lengths == [11, 2, 6]


def test_attention_functions_without_dense_masks_are_refused() -> None:
    """Named, with the way out."""
    model = dual()
    # Switching for real would load the compiler, which takes a minute.
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(ConfigError, match=r"takes dense masks \(orthrus, sdpa, eager\), found 'flex_attention'"):
        Passes(model, ScratchCache(rows=1, capacity=8))
