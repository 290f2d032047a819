"""`exact="token"`: in bfloat16 every plan, batch and block writes plain decoding's very tokens, or falls back aloud."""

import warnings
from collections.abc import Callable
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

import orthrus
from orthrus.decode import exact, trials
from orthrus.decode.engine import Engine
from orthrus.decode.exact import SPAN, Finding
from orthrus.decode.learned import begin_anew
from orthrus.decode.options import Options, Sampling
from orthrus.kernels import attention as functions
from orthrus.kernels import packed
from orthrus.kernels.attention import attention
from orthrus.model.config import OrthrusConfig
from orthrus.policy import steps
from tests.conftest import PROBED, PROBED_TOKENS
from tests.decode.drive import BLOCK, decode, dual
from tests.families import perturb, tiny

PROMPTS = [[5, 6, 7], [*range(30, 43)], [*range(30, 33), *range(60, 70)], [8], [9, 10, 11, 12, 13]]
PLANS = ("ar", "full", "fixed:4", "tree:6", "onepass", "auto")
GREEDY = Options(max_new_tokens=8)
SAMPLED = Options(max_new_tokens=8, sampling=Sampling(do_sample=True, temperature=0.8, top_k=20), seed=3)

Noise: TypeAlias = Callable[[Tensor], Tensor | float]
"""From a layer's input `[B, Q, C]` to what its output moves by, relatively."""


@cache
def low(family: str) -> PreTrainedModel:
    """A tiny dual-view model in bfloat16, where near-ties are everywhere."""
    return dual(family).to(torch.bfloat16)


def texts(
    model: PreTrainedModel, name: str, *, batch: int = 1, options: Options = GREEDY, count: int = len(PROMPTS)
) -> list[list[int]]:
    """What `exact="token"` writes after the first so many prompts with this plan, so many rows at once."""
    engine = Engine(model, rows=batch, capacity=96, plan=steps.parse(name), exact="token")
    return [row.token_ids for row in decode(engine, PROMPTS[:count], options)]


@pytest.fixture
def every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let probes try all widths of passes and of prefill, over as many tokens as in earnest."""
    for name in ("_WIDTHS", "_CHUNKS"):
        monkeypatch.setattr(exact, name, PROBED[name])
    for name, count in PROBED_TOKENS.items():
        monkeypatch.setattr(trials, name, count)


@pytest.mark.usefixtures("every_shape")
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "mixtral"])
def test_bfloat16_texts_equal_plain_decoding(family: str, options: Options) -> None:
    """Six plans, alone or four rows at once with rows that join as others end: not one token differs."""
    model = low(family)
    expected = texts(model, "ar", options=options)
    assert len({tuple(text) for text in expected}) == len(PROMPTS)
    sizes = cycle(((4, 5), (1, 2)) if options is GREEDY else ((1, 2), (4, 5)))
    for name, (batch, count) in zip(PLANS, sizes, strict=False):
        found = texts(model, name, batch=batch, options=options, count=count)
        assert found == expected[:count], (name, batch)


def test_sampled_texts_do_not_depend_on_the_trained_block() -> None:
    """One seed, one text: views trained for blocks of 8 and of 5 verify in passes of other widths, in float32."""
    found = set()
    for block in (8, 5):
        model = orthrus.attach(tiny("qwen3"), OrthrusConfig(block_size=block), attn_implementation="orthrus")
        perturb(model)
        found |= {str(texts(model, name, batch=2, options=SAMPLED, count=3)) for name in ("ar", "full", "fixed:3")}
    assert len(found) == 1
    other = Options(max_new_tokens=8, sampling=SAMPLED.sampling, seed=4)
    assert str(texts(model, "full", options=other, count=3)) not in found


# ---------------------------------------------------------------- what the probe finds


def test_the_probe_finds_a_geometry_once_per_state_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single rows at fixed width hold on the CPU; asking again probes only when its state has changed."""
    model = dual()
    finding = exact.finding_for(model, width=BLOCK)
    assert finding.holds
    assert (finding.geometry.widths[-1], finding.geometry.tails[-1]) == (BLOCK, finding.geometry.span)
    probed: list[torch.dtype] = []

    def count(model: PreTrainedModel, *, width: int, rows: int) -> Finding:
        probed.append(model.dtype)
        return finding

    monkeypatch.setattr(exact, "probe", count)
    assert exact.finding_for(model, width=BLOCK) is finding
    assert probed == []
    exact.finding_for(model.to(torch.bfloat16), width=BLOCK)
    exact.finding_for(model, width=BLOCK)
    assert probed == [torch.bfloat16]
    packed.pack(model)
    exact.finding_for(model, width=BLOCK)
    assert len(probed) == 2
    mixed(model)
    exact.finding_for(model, width=BLOCK)
    assert len(probed) == 3
    with torch.autocast("cpu", torch.bfloat16):
        exact.finding_for(model, width=BLOCK)
    exact.finding_for(model, width=BLOCK)
    assert len(probed) == 4


@cache
def clean_finding() -> Finding:
    return exact.probe(dual(), width=BLOCK, rows=2)


@pytest.fixture
def probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Keep findings in a folder of the test's own; the numbers of rows that were probed for, once in earnest."""
    finding, rows_probed = clean_finding(), list[int]()
    monkeypatch.setenv("ORTHRUS_CACHE", str(tmp_path))

    def count(model: PreTrainedModel, *, width: int, rows: int) -> Finding:
        rows_probed.append(rows)
        return finding

    monkeypatch.setattr(exact, "probe", count)
    return rows_probed


@pytest.mark.parametrize("noise", ["by_rows", "by_tokens", "by_place"])
def test_the_next_process_looks_in_brief_at_what_was_found(probed: list[int], noise: str) -> None:
    """A model of the same weights is not probed again, unless its kernels have other ways by now, or on a whim."""
    finding = exact.finding_for(dual(), width=BLOCK, rows=2)
    assert exact.finding_for(dual(), width=BLOCK, rows=2) == finding
    assert probed == [2]
    exact.finding_for(dual(), width=BLOCK, rows=4)
    exact.finding_for(dual("llama"), width=BLOCK, rows=2)
    assert probed == [2, 4, 2]
    disturbed = dual()
    for layer in disturbed.model.layers:  # the same weights, and the same name of every one
        layer.mlp.register_forward_hook(lambda _, given, out: out * (1 + globals()[noise](given[0])))
    exact.finding_for(disturbed, width=BLOCK, rows=2)
    assert len(probed) == 4
    alone = dual()
    begin_anew(alone)
    exact.finding_for(alone, width=BLOCK, rows=2)
    assert len(probed) == 5


def test_what_was_found_is_looked_at_alone_and_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row by itself may have another kernel in the next process."""
    groups, finding = set[int](), clean_finding()

    def note(trials: exact.Trials, width: int, *, group: int = 0, **_: object) -> bool:
        groups.add(group)
        return True

    monkeypatch.setattr(exact.Trials, "agrees", note)
    monkeypatch.setattr(exact.Trials, "keys", lambda trials, chunk: torch.zeros(1))
    assert exact._confirmed(dual(), finding, width=BLOCK, rows=2)
    assert groups == {0, 1, finding.geometry.group}


def test_the_code_of_operators_is_of_what_a_finding_rests_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "digest_of", lambda code: code)
    assert b"TORCH_LIBRARY_FRAGMENT" in exact._code.__wrapped__()


def mixed(model: PreTrainedModel) -> PreTrainedModel:
    """Let one row be multiplied by the weights and several by copies, as where that was measured to be faster."""
    packed.pack(model)
    for layer in model.modules():
        if isinstance(layer, packed.PackedLinear):
            layer.as_is = packed.AsIs(one=True)
    return model


def test_texts_are_the_same_where_one_row_takes_another_kernel() -> None:
    """Passes of one token are filled up where that moves a bit, alone and beside others."""
    model = mixed(dual().to(torch.bfloat16))
    expected = texts(model, "ar")
    for name, batch, count in (("ar", 4, 5), ("full", 1, 2), ("onepass", 4, 5), ("auto", 4, 5)):
        assert texts(model, name, batch=batch, count=count) == expected[:count], (name, batch)


class Noisy(nn.Module):
    """An MLP whose result moves with the shape of the pass it runs in, as a kernel's might."""

    def __init__(self, mlp: nn.Module, noise: Noise) -> None:
        super().__init__()
        self.mlp = mlp
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(x)
        return out * (1 + self.noise(x))


def by_rows(x: Tensor) -> float:
    """Depend on how many texts share the pass."""
    return 0.05 * x.shape[0]


def by_tokens(x: Tensor) -> float:
    """Depend on how many tokens the pass has in all."""
    return 0.002 * x.shape[0] * x.shape[1]


def by_place(x: Tensor) -> Tensor:
    """Depend on where in the pass a token stands."""
    return 0.3 * torch.arange(x.shape[1], dtype=x.dtype)[:, None]


def noisy(noise: Noise) -> PreTrainedModel:
    model = dual()
    for layer in model.model.layers:
        layer.mlp = Noisy(layer.mlp, noise)
    return model


@pytest.mark.parametrize("noise", [by_rows, by_tokens])
def test_noise_that_depends_on_the_pass_is_named_and_rows_then_decode_alone(noise: Noise) -> None:
    """Without the contract such kernels change texts; with it they do not, and the drafts still count."""
    disturbed = noisy(noise)
    finding = exact.probe(disturbed, width=BLOCK, rows=2)
    assert "a token's logits depend on its neighbours in a pass of 2 rows" in finding.broken
    assert (finding.holds, finding.geometry.group) == (True, 1)
    loose = [loosely(disturbed, "ar", 1), loosely(disturbed, "ar", 4), loosely(disturbed, "full", 4)]
    assert not loose[0] == loose[1] == loose[2]
    expected = texts(disturbed, "ar")
    for name in ("ar", "full", "tree:6"):
        assert texts(disturbed, name, batch=4) == expected


def loosely(model: PreTrainedModel, name: str, batch: int) -> list[list[int]]:
    """What `exact="distribution"` writes."""
    engine = Engine(model, rows=batch, capacity=96, plan=steps.parse(name))
    return [row.token_ids for row in decode(engine, PROMPTS, GREEDY)]


@pytest.mark.usefixtures("every_shape")
def test_noise_by_tokens_leaves_passes_of_one_width() -> None:
    """Logits of narrow passes and keys of wide ones would differ: all are filled up to, or cut down to, blocks."""
    finding = exact.probe(noisy(by_tokens), width=BLOCK, rows=2)
    assert "a token's logits depend on the width of its pass: narrow ones (1, 2, 3, 4, 5, 7) are filled up" in (
        finding.broken
    )
    apart = "32, 48, 64, 80, 96, 128, 160, 192, 256"
    assert f"a token's keys depend on the width of its prefill pass: not {apart} tokens at once" in finding.broken
    assert (finding.geometry.widths, finding.geometry.chunks) == ((BLOCK,), (BLOCK,))
    assert exact.probe(noisy(by_rows), width=BLOCK, rows=2).geometry.chunks == (BLOCK, *exact._CHUNKS)


def by_many_tokens(x: Tensor) -> float:
    """Depend on whether a pass has more tokens than any that verifies."""
    return 0.05 * (x.shape[1] > BLOCK)


def test_fused_passes_are_taken_only_where_they_leave_the_bits_alone() -> None:
    """Drafting ahead makes a pass wide: where that shows in the AR view's logits, a pass of its own drafts instead."""
    clean, moved = low("qwen3"), noisy(by_many_tokens)
    for model, fuses in ((clean, True), (moved, False)):
        finding = exact.finding_for(model, width=BLOCK, rows=2)
        assert finding.holds
        assert exact.can_fuse(model, finding, rows=2, drafts=3, stops=2) is fuses
        engine = Engine(model, rows=1, capacity=96, plan=steps.parse("onepass"), exact="token")
        (row,) = decode(engine, PROMPTS[:1], GREEDY)
        assert (row.stats.forwards < 1 + 2 * row.stats.cycles) is fuses
        assert [row.token_ids] == texts(model, "ar", count=1)


def disturb(monkeypatch: pytest.MonkeyPatch, moving: Callable[..., Tensor]) -> None:
    """Put another attention in place, of which nothing is known yet."""
    monkeypatch.setattr(functions, "_by_blocks", moving)
    monkeypatch.setattr(exact, "_ALIKE", {})


def test_noise_by_reach_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that moves with the number of slots it is handed, masked ones included, cannot verify drafts."""
    real = functions._by_blocks

    def moving(grouped: Tensor, key: Tensor, *rest: Any) -> Tensor:
        return real(grouped, key, *rest) * (1 + 1e-3 * key.shape[2])

    disturb(monkeypatch, moving)
    finding = exact.probe(dual(), width=BLOCK, rows=2)
    assert finding.broken[0] == "a token's logits depend on masked cache slots in reach"
    assert (finding.holds, finding.geometry.group) == (False, 1)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_attention_without_tiles_is_never_trusted(attn: str) -> None:
    """It may agree at the lengths that are probed and part at longer ones."""
    assert (
        "a token's logits depend on masked cache slots in reach"
        in exact.probe(dual(attn=attn), width=BLOCK, rows=2).broken
    )


def test_noise_by_place_leaves_only_plain_decoding_and_says_so() -> None:
    """Where not even one row's slots agree, no draft can be verified: plain steps, with a warning, and equal texts.

    Prompts that begin alike are read from their start again, since reading on would put tokens in other places.
    """
    model = noisy(by_place)
    finding = exact.finding_for(model, width=BLOCK)
    assert (finding.holds, finding.geometry.group, finding.geometry.chunks) == (False, 1, (BLOCK,))
    with pytest.warns(UserWarning, match="cannot verify drafts here .a token's logits depend on its place"):
        expected = texts(model, "ar")
    for name, batch in (("ar", 4), ("full", 1), ("tree:6", 4)):
        with pytest.warns(UserWarning, match="decoding plainly"):
            engine = Engine(model, rows=batch, capacity=96, plan=steps.parse(name), exact="token")
        rows = decode(engine, PROMPTS, GREEDY)
        assert [row.token_ids for row in rows] == expected, (name, batch)
        assert {row.stats.cycles for row in rows} == {0}


def test_no_warning_where_the_contract_holds() -> None:
    """Nor does the default ask the probe anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Engine(low("qwen3"), rows=1, capacity=96, plan=steps.parse("full"), exact="token")
        assert Engine(low("qwen3"), rows=1, capacity=96, plan=steps.parse("full")).finding is None


@pytest.mark.parametrize("from_slots", [128, SPAN])
def test_noise_by_reach_within_a_span_is_found(from_slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that moves where it is handed fewer slots than a span: those numbers of slots are filled up."""
    real = functions._by_blocks

    def moving(grouped: Tensor, key: Tensor, *rest: Any) -> Tensor:
        return real(grouped, key, *rest) * (1 if key.shape[2] >= from_slots else 1.01)

    clean = clean_finding().geometry
    assert clean.tails[0] == clean.chunk_tails[0] == 64
    disturb(monkeypatch, moving)
    finding = exact.probe(dual(), width=BLOCK, rows=2)
    assert finding.geometry.tails == tuple(tail for tail in clean.tails if tail >= from_slots)
    assert finding.geometry.chunk_tails == tuple(tail for tail in clean.chunk_tails if tail >= from_slots)
    assert (finding.holds, finding.geometry.span) == (True, SPAN)


@pytest.mark.parametrize(("fewest", "most"), [(1, 2 * BLOCK - 1), (2 * BLOCK + 1, 1 << 20)])
def test_noise_by_reach_is_found_for_decoding_and_for_reading_apart(
    fewest: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention over fewer slots than a span moves for few queries, or for many: those passes look at whole spans."""
    real = functions._by_blocks

    def moving(grouped: Tensor, key: Tensor, *rest: Any) -> Tensor:
        moved = fewest <= grouped.shape[2] <= most and key.shape[2] % SPAN
        return real(grouped, key, *rest) * (1.01 if moved else 1)

    clean = clean_finding().geometry
    disturb(monkeypatch, moving)
    geometry = exact.probe(dual(), width=BLOCK, rows=2).geometry
    few, many = (clean.tails, (SPAN,)) if fewest > 1 else ((SPAN,), clean.chunk_tails)
    assert (geometry.tails, geometry.chunk_tails) == (few, many)


def test_noise_that_moves_few_numbers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One result in some 200,000 of attention over fewer slots than a span."""
    real, calls = functions._by_blocks, list[int]()

    def moving(grouped: Tensor, key: Tensor, *rest: Any) -> Tensor:
        out = real(grouped, key, *rest)
        if key.shape[2] % SPAN:
            calls.append(1)
            out[0, 0, 0, 0] *= 1.01 if len(calls) % 130 == 0 else 1
        return out

    disturb(monkeypatch, moving)
    monkeypatch.setattr(exact, "_NUMBERS", PROBED["_NUMBERS"])
    monkeypatch.setattr(exact, "_TAILS", (64,))
    assert exact.probe(dual(), width=BLOCK, rows=1).geometry.tails == (SPAN,)


def test_noise_by_reach_beyond_a_span_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that moves with the size of the last block, but of no other than the second: no tails."""
    real = functions._by_blocks

    def moving(grouped: Tensor, key: Tensor, *rest: Any) -> Tensor:
        return real(grouped, key, *rest) * (1.01 if SPAN < key.shape[2] < 2 * SPAN else 1)

    disturb(monkeypatch, moving)
    finding = exact.probe(dual(), width=BLOCK, rows=2)
    assert (finding.holds, finding.geometry.tails, finding.geometry.chunk_tails) == (True, (SPAN,), (SPAN,))


# ---------------------------------------------------------------- attention by blocks and tiles

TILE = 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("queries", [1, 2, 3, 8, 32, 256])
def test_masked_blocks_change_no_bit_of_the_kernel(rows: int, queries: int, dtype: torch.dtype) -> None:
    """Whatever the slots out of reach hold, one block of them or five; and a window hides whole blocks before."""
    reach, keys = SPAN + 300, 7 * SPAN
    query = torch.randn(rows, 4, queries, 16).to(dtype)
    key, value = (torch.randn(rows, 2, keys, 16).to(dtype) for _ in range(2))
    for window in (keys, 200):
        place = reach - queries + torch.arange(queries)[:, None]
        sees = (torch.arange(keys) <= place) & (torch.arange(keys) > place - window)
        mask = torch.where(sees, 0.0, torch.finfo(dtype).min).to(dtype)[None, None]

        def attend(slots: int, mask: Tensor = mask) -> Tensor:
            cut = key[:, :, :slots], value[:, :, :slots], mask[..., :slots]
            return attention(nn.Identity(), query, *cut, scaling=0.3, tile=SPAN)[0]

        first = attend(2 * SPAN)
        assert torch.equal(attend(3 * SPAN), first)
        assert torch.equal(attend(keys), first)
        wide = [x.float() for x in (query, key, value, mask)]
        plain = attention(nn.Identity(), *wide, scaling=0.3)[0]
        torch.testing.assert_close(first.float(), plain, rtol=0, atol=2e-6 if dtype == torch.float32 else 3e-2)


@given(
    groups=st.sampled_from([1, 2]),
    queries=st.integers(1, 4),
    softcap=st.sampled_from([None, 2.0]),
    sinks=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 9),
)
def test_masked_tiles_change_no_bit_of_tiled_attention(
    groups: int, queries: int, softcap: float | None, sinks: bool, dtype: torch.dtype, seed: int
) -> None:
    """Whatever the slots out of reach hold, however many they are; and the result is plain attention's, rounded.

    What neither caps scores nor has sinks takes the kernel's blocks, but in float16.
    """
    assume(softcap is not None or sinks or dtype == torch.float16)
    generator = torch.Generator().manual_seed(seed)
    heads, reach, keys = 2, 2 * TILE - 1, 8 * TILE
    query = torch.randn(2, heads * groups, queries, 8, generator=generator).to(dtype)
    key, value = (torch.randn(2, heads, keys, 8, generator=generator).to(dtype) for _ in range(2))
    mask = torch.zeros(2, 1, queries, keys, dtype=dtype)
    mask[..., reach:] = torch.finfo(dtype).min
    more = {"scaling": 0.4, "softcap": softcap, "s_aux": torch.linspace(-1, 1, heads * groups) if sinks else None}

    def tiled(slots: int) -> Tensor:
        cut = key[:, :, :slots], value[:, :, :slots], mask[..., :slots]
        return attention(nn.Identity(), query, *cut, tile=TILE, **more)[0]

    first = tiled(2 * TILE)
    for slots in (reach, 3 * TILE, 3 * TILE + 1, 5 * TILE, keys):
        assert torch.equal(tiled(slots), first)
    wide = [x.float() for x in (query, key[:, :, :reach], value[:, :, :reach], mask[..., :reach])]
    plain = attention(nn.Identity(), *wide, **more)[0]
    torch.testing.assert_close(first.float(), plain, rtol=0, atol=2e-6 if dtype == torch.float32 else 3e-2)


def test_fixed_shapes_cut_rows_into_powers_of_two() -> None:
    """Seven rows with at most four to a pass: four, two and one; capacity leaves room for fillers, in whole spans."""
    geometry = exact.Geometry(
        widths=(2, 5, 8), chunks=(8, 32), span=SPAN, tails=(64, 128, SPAN), chunk_tails=(128, SPAN), group=4
    )
    assert [geometry.width(tokens) for tokens in (1, 2, 3, 5, 6, 8)] == [2, 2, 5, 5, 8, 8]
    assert [geometry.chunk(tokens) for tokens in (1, 8, 9, 32)] == [8, 8, 32, 32]
    assert geometry.parts(slice(2, 9)) == [slice(2, 6), slice(6, 8), slice(8, 9)]
    reaches = {1: 64, 64: 64, 65: 128, 129: SPAN, SPAN: SPAN, SPAN + 1: SPAN + 64, 2 * SPAN - 1: 2 * SPAN}
    assert {slots: geometry.reach(slots) for slots in reaches} == reaches
    assert [geometry.reach(slots, prefill=True) for slots in (1, 129, SPAN + 1)] == [128, SPAN, SPAN + 128]
    assert geometry.capacity(SPAN - 32) == SPAN
    assert geometry.capacity(SPAN - 31) == 2 * SPAN


@pytest.mark.parametrize("file", ["decode/passes.py", "kernels/attention.py", "model/dual.py"])
def test_findings_rest_on_the_source_of_passes(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another line in a file of theirs, and what was found before is not used."""
    before, read = exact._code.__wrapped__(), Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda self: read(self) + b"#" * self.as_posix().endswith(f"orthrus/{file}")
    )
    assert exact._code.__wrapped__() != before
