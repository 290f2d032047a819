"""Muon by heads beside torch's own on whole matrices."""

import pytest
import torch
from torch import Tensor, nn

from orthrus.model.attach import attach
from orthrus.model.config import OrthrusConfig
from orthrus.train.muon import Muon, heads_of
from orthrus.train.optim import hidden_matrices
from tests.families import tiny


def moved(start: Tensor, gradients: list[Tensor], heads: int) -> Tensor:
    parameter = nn.Parameter(start.clone())
    muon = Muon({parameter: heads}, lr=0.02, weight_decay=0.1)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        muon.step()
    return parameter.detach()


def moved_by_torch(start: Tensor, gradients: list[Tensor]) -> Tensor:
    parameter = nn.Parameter(start.clone())
    muon = torch.optim.Muon([parameter], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        parameter.grad = gradient.clone()
        muon.step()
    return parameter.detach()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("heads", [1, 3, -1, -4])
def test_a_matrix_moves_as_its_heads_do_by_themselves(
    monkeypatch: pytest.MonkeyPatch, heads: int, native: bool
) -> None:
    """In bfloat16 as torch's own, and in float32 where the CPU lacks products in bfloat16."""
    monkeypatch.setattr("orthrus.train.muon.multiplies", lambda dtype: native)
    torch.manual_seed(0)
    start, gradients = torch.randn(24, 32), [torch.randn(24, 32) for _ in range(3)]
    dim = 0 if heads > 0 else 1
    parts = zip(start.chunk(abs(heads), dim), *(g.chunk(abs(heads), dim) for g in gradients), strict=True)
    alone = torch.cat([moved_by_torch(part, list(own)) for part, *own in parts], dim)
    # bfloat16 inside torch's: not rounded as products of a batch are, nor as those in float32.
    torch.testing.assert_close(moved(start, gradients, heads), alone, atol=2e-4 if native else 6e-4, rtol=0)


@pytest.mark.parametrize("native", [True, False])
def test_steps_take_the_type_that_the_cpu_multiplies(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr("orthrus.train.muon.multiplies", lambda dtype: native)
    taken = []
    monkeypatch.setattr("orthrus.train.muon.orthogonal", lambda matrix: taken.append(matrix.dtype) or matrix)
    moved(torch.randn(8, 4), [torch.randn(8, 4)], 1)
    assert taken == [torch.bfloat16 if native else torch.float32]


def test_heads_are_found_by_the_attentions_own_size() -> None:
    model = attach(tiny("llama"), OrthrusConfig(block_size=4))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = {id(p): name for name, p in trainable.items()}
    heads = heads_of(model, {name: trainable[name] for name in hidden_matrices(model, trainable)})
    config = model.config
    expected = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    expected |= {"v_proj": config.num_key_value_heads, "o_proj": -config.num_attention_heads}
    assert {names[id(p)].split(".")[-2]: count for p, count in heads.items()} == expected
