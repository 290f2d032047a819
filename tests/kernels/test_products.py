from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from orthrus.kernels import masks, products
from orthrus.kernels.attention import attention


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take products on any CPU, for the few scores of a test, in blocks of few rows."""
    monkeypatch.setattr(products, "_multiplies", lambda: True)
    monkeypatch.setattr(products, "_MANY", 0)
    monkeypatch.setattr(products, "_AT_ONCE", 4)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def cached(*shape: int) -> Tensor:
    """Return keys as a cache holds them: heads side by side, and more slots than are in reach."""
    B, N, S, D = shape
    return random(B, S + 3, N, D).bfloat16()[:, :S].transpose(1, 2)


def chain(length_B: list[int], queries: int, span: int) -> Tensor:
    limit_BQ = torch.tensor(length_B)[:, None] + torch.arange(queries)
    return masks.up_to(limit_BQ, span=span)[:, None]


@pytest.mark.usefixtures("few")
@torch.inference_mode()
@pytest.mark.parametrize("additive", [True, False])
@pytest.mark.parametrize("lengths", [[0], [7], [7, 2]])
def test_products_are_attention_up_to_rounding(lengths: list[int], additive: bool) -> None:
    B, Q = len(lengths), 10
    S = max(lengths) + Q
    query, key, value = random(B, 6, Q, 8).bfloat16(), cached(B, 2, S, 8), cached(B, 2, S, 4)
    allowed = chain(lengths, Q, S)
    mask = masks.additive(allowed, torch.bfloat16) if additive else allowed
    out, _ = attention(nn.Identity(), query, key, value, mask)
    exact, _ = attention(nn.Identity(), query.float(), key.float(), value.float(), allowed)
    torch.testing.assert_close(out.float(), exact, atol=0.03, rtol=0.03)


@pytest.mark.usefixtures("few")
@torch.inference_mode()
def test_a_training_pass_takes_products_too() -> None:
    """Causal documents of a packed row, by `masks.in_blocks`."""
    document, position = torch.tensor([[0] * 5 + [1] * 7]), torch.tensor([[*range(5), *range(7)]])
    query, key, value = random(1, 6, 12, 8).bfloat16(), random(1, 2, 12, 8).bfloat16(), random(1, 2, 12, 8).bfloat16()
    allowed = masks.packed(document)
    where = {"query_position_BQ": position, "key_position_BS": position}
    packed = masks.in_blocks(allowed, block=1, windows=(), dtype=torch.bfloat16, trained=False, **where)
    with patch.object(products, "attend", wraps=products.attend) as taken:
        out, _ = attention(nn.Identity(), query, key, value, packed.full)
    assert taken.called
    exact, _ = attention(nn.Identity(), query.float(), key.float(), value.float(), allowed[:, None])
    torch.testing.assert_close(out.float(), exact, atol=0.03, rtol=0.03)


@pytest.mark.usefixtures("few")
@torch.inference_mode()
def test_keys_that_later_rows_alone_see_change_no_bit_of_earlier_ones() -> None:
    query, key, value = random(1, 4, 10, 8).bfloat16(), cached(1, 2, 15, 8), cached(1, 2, 15, 8)
    mask = masks.additive(chain([5], 10, 15), torch.bfloat16)
    out, _ = attention(nn.Identity(), query, key, value, mask)
    key[:, :, 9:], value[:, :, 9:] = float("nan"), float("nan")
    again, _ = attention(nn.Identity(), query, key, value, mask)
    assert torch.equal(out[:, :4], again[:, :4])
    assert again[:, 4:].isnan().all()


def test_products_are_for_many_scores_in_bfloat16_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_multiplies", lambda: True)
    query = torch.zeros(1, dtype=torch.bfloat16)
    assert not products.pays(query, 16, 4096)
    with torch.inference_mode():
        assert products.pays(query, 16, 1024)
        assert not products.pays(query, 16, 512)
        assert not products.pays(query, 1, 8192)
        assert not products.pays(query.float(), 16, 4096)
