"""The chunked objective against the plain one: equal in value and in gradient."""

import pytest
import torch
from torch import Tensor, nn

from orthrus.train import objective


def plain_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Forward KL by the book: a sum over the vocabulary of p (log p - log q), one slot at a time."""
    total = []
    for s, t in zip(student, teacher, strict=True):
        p, q = torch.softmax(t, -1), torch.softmax(s, -1)
        total.append(sum(p[v] * (p[v].log() - q[v].log()) for v in range(len(p))))
    return torch.stack(total)


@pytest.mark.parametrize("name", ["kl", "cross_entropy"])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunked_equals_plain_in_value_and_gradient(name: str, chunk: int) -> None:
    """Seven slots, float64: the same sum, the same gradients for the student, none for the teacher."""
    torch.manual_seed(0)
    head = nn.Linear(5, 11, dtype=torch.float64).requires_grad_(False)
    student = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(7, 5, dtype=torch.float64)
    target = torch.randint(0, 11, (7,))
    weight = torch.rand(7)
    wide = objective.chunked(
        objective.LOSSES[name], student, teacher, target, weight, head=lambda h: head(h), chunk=chunk
    )
    (gradient,) = torch.autograd.grad(wide.total, student)
    # The objective computes in float32 on purpose; so does the specification.
    logits, goal = head(student).float(), head(teacher).float()
    slots = plain_kl(logits, goal) if name == "kl" else -logits.log_softmax(-1)[torch.arange(7), target]
    expected = (slots * weight).sum()
    torch.testing.assert_close(wide.total.detach(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0], rtol=1e-5, atol=1e-6)
    assert wide.agrees_M.tolist() == (logits.argmax(-1) == target).tolist()


def test_kl_of_equal_distributions_is_zero_and_pulls_nowhere() -> None:
    """A view that says what the backbone says has nothing to learn."""
    logits = torch.randn(3, 8, requires_grad=True)
    loss = objective.forward_kl(logits, logits.detach() + 5.0, torch.zeros(3, dtype=torch.long)).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss.detach(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)


def test_no_slots_no_loss() -> None:
    """A batch without a scored slot gives zero, not an error."""
    empty = torch.empty(0, 5)
    score = objective.chunked(
        objective.cross_entropy, empty, None, torch.empty(0).long(), torch.empty(0), head=nn.Linear(5, 4)
    )
    assert float(score.total) == 0.0
    assert score.agrees_M.numel() == 0


def test_slot_weights_fade() -> None:
    """Uniform without a decay; with one, each slot weighs exp(-1/decay) of the slot before."""
    assert objective.slot_weights(3, None).tolist() == [1.0, 1.0, 1.0]
    faded = objective.slot_weights(4, 7.0)
    torch.testing.assert_close(faded[1:] / faded[:-1], torch.full((3,), -1 / 7).exp())
