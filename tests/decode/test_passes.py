"""Each pass computes what the whole model would over the whole text, over the slots it says, and no logits more."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from orthrus.decode.passes import Branches, Passes
from orthrus.errors import CacheFull, ConfigError
from orthrus.kernels import masks
from orthrus.model.attach import config_of, windows_of
from orthrus.model.cache import ScratchCache
from orthrus.model.dual import View
from tests.decode.drive import dual
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


@each_variant
@torch.no_grad()
def test_draft_is_the_twin_over_the_backbone_s_keys(family: str, overrides: dict[str, object]) -> None:
    """Anchor and masks through the twin, prefix keys from the frozen view, the block open both ways.

    Rows together, which differ in length, and each one alone, whose slots all see the same.
    """
    model = dual(family, attn=None, **overrides)
    passes = passes_over(model)
    anchor_B = torch.tensor([40, 43, 46])
    logits = passes.draft(ALL, anchor_B, drafts=3)
    for row, text in enumerate(TEXTS):
        own = slice(row, row + 1)
        expected = draft_alone(model, text, BLOCK[row][0], drafts=3)
        torch.testing.assert_close(logits[row], expected, **NEAR)
        torch.testing.assert_close(passes.draft(own, anchor_B[own], drafts=3)[0], expected, **NEAR)


@each_variant
@torch.no_grad()
def test_reading_a_prompt_drafts_what_follows(family: str, overrides: dict[str, object]) -> None:
    """Ragged rows, read whole and in chunks: the drafts of a pass of their own, and the keys of plain reading."""
    model = dual(family, attn=None, **overrides)
    apart = passes_over(model)
    anchor_B = torch.tensor([40, 43, 46])
    expected = apart.draft(ALL, anchor_B, drafts=3)
    for chunk in (512, 4):
        passes = Passes(model, ScratchCache(rows=3, capacity=48))
        drafts = passes.prefill(ALL, TEXTS, chunk=chunk, anchor_B=anchor_B, drafts=3)
        assert drafts is not None
        torch.testing.assert_close(drafts, expected, **NEAR)
        assert passes.cache.lengths == apart.cache.lengths
        block = torch.tensor(BLOCK)
        torch.testing.assert_close(passes.verify(ALL, block), apart.verify(ALL, block), **NEAR)


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


def draft_alone(model: PreTrainedModel, text: list[int], anchor: int, *, drafts: int) -> Tensor:
    """The draft pass of one row by concatenation: no scratch cache, no other rows."""
    n, K, recorder = len(text), drafts + 1, Recorder()

    def layer_masks(limit: list[int], positions: Tensor, keys: int) -> masks.LayerMasks:
        return masks.layer_masks(
            masks.up_to(torch.tensor([limit]), span=keys),
            query_position_BQ=positions,
            key_position_BS=torch.arange(keys)[None],
            windows=windows_of(model),
            dtype=torch.float32,
        )

    def run(ids: list[int], start: int, limit: list[int], view: str) -> Tensor:
        positions = torch.arange(start, start + len(ids))[None]
        made = layer_masks(limit, positions, start + len(ids))
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
    return run([anchor, *[config_of(model).mask] * drafts], n, [n + drafts] * K, "diffusion")[:drafts]


@each_variant
@torch.no_grad()
def test_passes_leave_only_verified_keys(family: str, overrides: dict[str, object]) -> None:
    """Draft, verify, commit part, draft and verify again: rejected keys and the twin's own show nowhere."""
    model = dual(family, attn=None, **overrides)
    passes = passes_over(model)
    passes.draft(ALL, torch.tensor([40, 43, 46]), drafts=7)
    passes.verify(ALL, torch.tensor(BLOCK))
    passes.cache.commit(ALL, [1, 2, 3])
    passes.draft(ALL, torch.tensor([50, 51, 52]), drafts=2)
    logits = passes.verify(ALL, torch.tensor([[50, 60], [51, 61], [52, 62]]))
    for row, kept in enumerate((1, 2, 3)):
        text = [*TEXTS[row], *BLOCK[row][:kept], 50 + row, 60 + row]
        torch.testing.assert_close(logits[row], whole(model, text)[-2:], **NEAR)


@each_variant
@torch.no_grad()
def test_fused_pass_equals_its_parts(family: str, overrides: dict[str, object]) -> None:
    """One forward gives the verify pass's logits, and for each stop those of a draft pass made after it.

    The draft pass that follows a stop knows the kept drafts but not the token written after them, so its first slot
    is a mask too.
    """
    model = dual(family, attn="orthrus", **overrides)
    stops, mask = torch.tensor([[0, 2], [1, 0], [2, 1]]), torch.full((3,), config_of(model).mask)
    verified, ahead = passes_over(model).fused(ALL, torch.tensor(BLOCK), stops, drafts=3)
    torch.testing.assert_close(verified, passes_over(model).verify(ALL, torch.tensor(BLOCK)), **NEAR)
    for column in range(2):
        passes = passes_over(model)
        passes.verify(ALL, torch.tensor(BLOCK))
        passes.cache.commit(ALL, [int(stop) + 1 for stop in stops[:, column]])
        torch.testing.assert_close(ahead[:, column], passes.draft(ALL, mask, drafts=3), **NEAR)


@each_variant
@torch.no_grad()
def test_tree_pass_equals_a_plain_forward_per_path(family: str, overrides: dict[str, object]) -> None:
    """Each node's logits are those of the text along its path, whatever its siblings."""
    model = dual(family, attn="orthrus", **overrides)
    #        root    1    2      3    4      with 1 and 2 children of the root, 3 under 1, 4 under 2
    parent = [None, 0, 0, 1, 2]
    tokens, depth = [40, 41, 42, 43, 44], [0, 1, 1, 2, 2]
    paths: list[list[int]] = []
    for node, above in enumerate(parent):
        paths.append([*(paths[above] if above is not None else []), node])
    ancestors = torch.tensor([[[j in path for j in range(5)] for path in paths]] * 3)
    logits = passes_over(model).verify_tree(
        ALL, torch.tensor([tokens] * 3), Branches(torch.tensor([depth] * 3), ancestors)
    )
    for row, text in enumerate(TEXTS):
        for node, path in enumerate(paths):
            expected = whole(model, text + [tokens[i] for i in path])[-1]
            torch.testing.assert_close(logits[row, node], expected, **NEAR)


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
    """A prompt of any length is projected nowhere; a draft pass not at its last slot; a verify pass everywhere."""
    model = dual()
    with projected(model) as seen:
        passes = passes_over(model, chunk=4)
        assert seen == []
        passes.draft(ALL, torch.tensor([40, 43, 46]), drafts=5)
        passes.verify(ALL, torch.tensor(BLOCK))
    assert seen == [5, 3]


@torch.no_grad()
def test_a_full_cache_is_said_before_anything_is_written() -> None:
    """Neither keys nor lengths change when a pass would run past the end."""
    passes = Passes(dual(), ScratchCache(rows=3, capacity=12))
    passes.prefill(ALL, TEXTS, chunk=512)
    before = [buffer.clone() for buffer in (*passes.cache.keys, *passes.cache.values)]
    with pytest.raises(CacheFull, match="needs 14 cache positions, the cache has 12"):
        passes.verify(ALL, torch.tensor(BLOCK))
    with pytest.raises(CacheFull, match="needs 15 cache positions, the cache has 12"):
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
