"""The attention function equals softmax attention written out in float64 with repeated keys."""

from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from orthrus.kernels import attention as attention_module
from orthrus.kernels import masks
from orthrus.kernels.attention import FEW, NAME, attention, leave_own, register, round_keys
from tests import reference
from tests.families import tiny

CAUSAL = nn.Identity()  # no `is_causal` of its own: transformers' default is causal
SCALING = 0.4


def random_heads(groups: int, queries: int, keys: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 2 * groups, queries, 4, generator=generator)
    key = torch.randn(2, 2, keys, 4, generator=generator)
    value = torch.randn(2, 2, keys, 3, generator=generator)
    return query, key, value


@given(
    groups=st.sampled_from([1, 2, 3]),
    queries=st.integers(1, 4),
    keys=st.integers(1, 6),
    softcap=st.sampled_from([None, 2.0]),
    sinks=st.booleans(),
    boolean=st.booleans(),
    seed=st.integers(0, 9),
)
def test_equals_explicit_softmax(
    groups: int, queries: int, keys: int, softcap: float | None, sinks: bool, boolean: bool, seed: int
) -> None:
    """Grouped queries, masks additive and boolean, soft-capped scores and sinks, in every combination."""
    query, key, value = random_heads(groups, queries, keys, seed=seed)
    allowed_BQS = torch.rand(2, queries, keys, generator=torch.Generator().manual_seed(seed)) < 0.6
    allowed_BQS[:, :, 0] = True
    sink_H = torch.linspace(-1, 1, 2 * groups) if sinks else None
    mask = allowed_BQS[:, None]
    if not boolean:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    out, weights = attention(CAUSAL, query, key, value, mask, scaling=SCALING, softcap=softcap, s_aux=sink_H)
    expected = reference.attention(
        query, key, value, lambda b, q, s: bool(allowed_BQS[b, q, s]), scaling=SCALING, softcap=softcap, sink_H=sink_H
    )
    assert weights is None
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (3, 7), (1, 5)])
def test_without_a_mask_it_is_causal(queries: int, keys: int) -> None:
    """The last query sees every key, each one before it one less; a module or a call may say otherwise."""
    query, key, value = random_heads(2, queries, keys)
    expected = reference.attention(query, key, value, lambda _, q, s: s <= q + keys - queries, scaling=SCALING)
    out, _ = attention(CAUSAL, query, key, value, None, scaling=SCALING)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
    both_ways = reference.attention(query, key, value, lambda *_: True, scaling=SCALING)
    out, _ = attention(CAUSAL, query, key, value, None, scaling=SCALING, is_causal=False)
    torch.testing.assert_close(out.double(), both_ways, rtol=0, atol=2e-6)


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("behind", [0, 2])
@pytest.mark.parametrize("softcap", [None, 2.0])
@torch.no_grad()
def test_a_chain_sees_what_its_dense_mask_would_show(start: int, behind: int, softcap: float | None) -> None:
    """Behind a text or not, rows behind it or not; torch's kernel for CPUs takes it in one or two parts, no mask."""
    rows, keys = 3, start + 3 + behind
    query, key, _ = random_heads(3, rows + behind, keys)
    value = key.flip(2)

    def sees(_: int, q: int, s: int) -> bool:
        return s <= start + q if q < rows else s % 3 != 1

    dense = torch.tensor([[sees(0, q, s) for s in range(keys)] for q in range(rows + behind)])
    rest = masks.additive(dense[None, None, rows:], torch.float32) if behind else None
    with patch("torch.ones", side_effect=AssertionError) if softcap is None else nullcontext():
        out, _ = attention(CAUSAL, query, key, value, masks.Chain(start, rows, rest), scaling=SCALING, softcap=softcap)
    expected = reference.attention(query, key, value, sees, scaling=SCALING, softcap=softcap)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)


@torch.no_grad()
def test_the_parts_of_a_chain_in_bfloat16_are_put_together_in_float32() -> None:
    """All keys weigh alike, and each part is a number that bfloat16 holds: the result is rounded once."""
    query, key, _ = (x.bfloat16() for x in random_heads(1, 3, 8))
    value = torch.ones_like(key)
    value[:, :, 5:] = -1
    out, _ = attention(CAUSAL, torch.zeros_like(query), key, value, masks.Chain(5, 3), scaling=SCALING)
    expected = torch.tensor([4 / 6, 3 / 7, 2 / 8]).bfloat16()
    assert torch.equal(out, expected[None, :, None, None].expand_as(out))


@pytest.mark.parametrize(("rows", "tile", "rounds"), [(FEW + 1, None, True), (FEW, None, False), (FEW + 1, 64, False)])
@torch.no_grad()
def test_models_that_round_keys_attend_in_bfloat16_over_prompts_alone(
    rows: int, tile: int | None, rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a text or not; few rows, exact passes and rows behind the chain in float32."""
    monkeypatch.setattr(attention_module, "multiplies", lambda dtype: True)
    model = nn.Sequential(nn.Module())
    model[0].is_causal = True
    round_keys(model)
    for start in (0, 31):
        query, key, value = random_heads(2, rows + 1, start + rows + 1)
        rest = masks.additive(torch.ones(1, 1, 1, start + rows + 1).bool(), torch.float32)
        chain, how = masks.Chain(start, rows, rest), {"scaling": SCALING, "tile": tile}
        out = attention(model[0], query, key, value, chain, **how)[0]
        plain = attention(CAUSAL, query, key, value, chain, **how)[0]
        half = (
            attention(CAUSAL, *(x.bfloat16() for x in (query, key, value)), chain, **how)[0].float()
            if rounds
            else plain
        )
        assert out.dtype == torch.float32
        assert torch.equal(out[:, :rows], half[:, :rows])
        assert torch.equal(out[:, rows:], plain[:, rows:])
        assert not rounds or not torch.equal(out[:, :rows], plain[:, :rows])
    leave_own(model)
    assert not vars(model[0]).keys() - vars(nn.Module()).keys() - {"is_causal"}


def test_a_chain_behind_a_text_has_gradients() -> None:
    """The sums by which its two parts are weighed have none: the kernel takes a mask then."""
    query, key, _ = random_heads(1, 3, 5)
    key.requires_grad_()
    attention(CAUSAL, query, key, key, None, scaling=SCALING)[0].square().sum().backward()
    expected = torch.autograd.functional.jacobian(
        lambda k: (
            attention(CAUSAL, query, k, k, torch.ones(3, 5).bool().tril(2)[None, None], scaling=SCALING)[0]
            .square()
            .sum()
        ),
        key.detach(),
    )
    torch.testing.assert_close(key.grad, expected)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_scaling_defaults_to_the_root_of_the_dimension(softcap: float | None) -> None:
    """On the fast path and on the explicit one alike."""
    query, key, value = random_heads(1, 2, 3)
    out, _ = attention(CAUSAL, query, key, value, None, softcap=softcap)
    expected = reference.attention(query, key, value, lambda _, q, s: s <= q + 1, scaling=0.5, softcap=softcap)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("tile", [None, 2, 4])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_mask_of_one_number_stands_for_any_shape(tile: int | None, softcap: float | None) -> None:
    """With tiles and without: every query sees every key."""
    query, key, value = random_heads(2, 3, 4)
    one = torch.zeros(1, 1, 1, 1)
    out, _ = attention(CAUSAL, query, key, value, one, softcap=softcap, tile=tile)
    expected, _ = attention(CAUSAL, query, key, value, one.expand(2, 1, 3, 4), softcap=softcap, tile=tile)
    assert torch.equal(out, expected)


def test_a_mask_longer_than_the_keys_is_cut() -> None:
    """Models that preallocate their mask hand over more columns than there are keys."""
    query, key, value = random_heads(2, 2, 3)
    mask = torch.ones(2, 1, 2, 8, dtype=torch.bool)
    out, _ = attention(CAUSAL, query, key, value, mask, scaling=SCALING)
    expected = reference.attention(query, key, value, lambda *_: True, scaling=SCALING)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)


def test_keys_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped queries are folded into the query axis: the kernel gets keys and values as the cache holds them."""
    seen = []

    def spy(query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
        seen.append((query.shape, key.data_ptr(), value.data_ptr()))
        return query[..., : value.shape[-1]]

    query, key, value = random_heads(3, 4, 5)
    monkeypatch.setattr("orthrus.kernels.attention.scaled_dot_product_attention", spy)
    attention(CAUSAL, query, key, value, None, scaling=SCALING)
    assert seen == [((2, 2, 3 * 4, 4), key.data_ptr(), value.data_ptr())]


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_oss", "mistral"])
@pytest.mark.parametrize("seed", [0, 1])
def test_registered_function_serves_whole_models(family: str, seed: int) -> None:
    """A model switched to it gives the eager logits, padded batches and windows included."""
    model = tiny(family, seed=seed, attn="eager")
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        assert register() == register() == NAME
        model.set_attn_implementation(NAME)
        after = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(after[1, 5:], before[1, 5:], rtol=0, atol=2e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_a_block_mask_gives_what_the_dense_mask_gives(softcap: float | None, sinks: bool, window: int | None) -> None:
    """FlexAttention (its plain form; compiled on CUDA only) over the training mask equals dense attention."""
    torch.manual_seed(0)
    document = torch.tensor([[0] * 9 + [1] * 7, [0] * 14 + [-1] * 2])
    position = torch.tensor([[*range(9), *range(7)], [*range(14), 0, 0]])
    anchor, valid = torch.tensor([[2, 11], [5, 9]]), torch.tensor([[True, True], [True, False]])
    block = 4
    allowed = masks.training(document, anchor, valid, block=block)
    query = (position.gather(1, anchor)[:, :, None] + torch.arange(block)).flatten(1)
    where = {"query_position_BQ": query, "key_position_BS": torch.cat([position, query], 1)}
    dense = masks.layer_masks(allowed, windows=(3,), dtype=torch.float32, **where)
    flex = masks.block_masks(allowed, windows=(3,), **where)
    q, k, v = torch.randn(2, 4, 8, 16), torch.randn(2, 2, 24, 16), torch.randn(2, 2, 24, 16)
    more = {"scaling": 0.3, "softcap": softcap, "s_aux": torch.randn(4) if sinks else None}
    left, _ = attention(torch.nn.Identity(), q, k, v, dense.of(window), **more)
    right, _ = attention(torch.nn.Identity(), q, k, v, flex.of(window), **more)
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@given(
    groups=st.sampled_from([1, 2]),
    blocks=st.integers(1, 3),
    before=st.integers(0, 5),
    softcap=st.sampled_from([None, 2.0]),
    sinks=st.booleans(),
    window=st.sampled_from([None, 2, 4]),
    at_once=st.sampled_from([3, 6, 128]),
    trained=st.booleans(),
    seed=st.integers(0, 9),
)
def test_in_blocks_equals_the_dense_mask(
    groups: int,
    blocks: int,
    before: int,
    softcap: float | None,
    sinks: bool,
    window: int | None,
    at_once: int,
    trained: bool,
    seed: int,
) -> None:
    """A mask in blocks gives what the rule gives made dense, values and gradients, however many blocks are taken at
    once; earlier keys get gradients where they are trained."""
    K, generator = 3, torch.Generator().manual_seed(seed)
    rows = blocks * K
    query, key, value = random_heads(groups, rows, before + rows, seed=seed)
    first = 0 if trained else before
    own = [x.requires_grad_() for x in (query, key[:, :, first:], value[:, :, first:])]
    heads = [query, *(torch.cat([x[:, :, :first], y], dim=2) for x, y in zip((key, value), own[1:], strict=True))]
    prefix_BQT = torch.rand(2, rows, before, generator=generator) < 0.6
    block_Q = torch.arange(rows) // K
    own_QQ = block_Q[:, None] == block_Q[None, :]
    allowed_BQS = torch.cat([prefix_BQT, own_QQ.expand(2, rows, rows)], dim=2)
    start_BN = torch.randint(before + 1, (2, blocks), generator=generator)
    query_BQ = (start_BN[:, :, None] + torch.arange(K)).flatten(1)
    rule = {
        "query_position_BQ": query_BQ,
        "key_position_BS": torch.cat([torch.arange(before).expand(2, before), query_BQ], dim=1),
        "windows": [] if window is None else [window],
        "dtype": torch.float32,
    }
    options = {"scaling": SCALING, "softcap": softcap, "s_aux": torch.linspace(-1, 1, 2 * groups) if sinks else None}
    found = []
    with patch.multiple(masks, _ROWS=at_once, _KEYS=2):
        blockwise = masks.in_blocks(allowed_BQS, block=K, trained=trained, **rule)  # type: ignore[arg-type]
    for layer_masks in (masks.layer_masks(allowed_BQS, **rule), blockwise):  # type: ignore[arg-type]
        out, _ = attention(CAUSAL, *heads, layer_masks.of(window), **options)  # type: ignore[arg-type]
        found.append((out, *torch.autograd.grad(out.square().sum(), own)))
    for dense, inside in zip(*found, strict=True):
        torch.testing.assert_close(inside, dense, rtol=0, atol=5e-6)
