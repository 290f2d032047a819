"""The objective against a plain specification of one slot at a time: equal in value and in gradient."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orthrus.train import objective

C, V, R, B, N, J = 5, 11, 9, 2, 3, 4
SCORED = torch.tensor([[[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]]).bool()
"""Blocks of full length, cut short by the end of an answer, and one that is not there."""


def specified(
    student: Tensor,
    teacher: Tensor,
    row: Tensor,
    target: Tensor,
    head: nn.Linear,
    *,
    terms: dict[str, float],
    acceptance: str = "target",
    decay: float | None = None,
    prefix: bool = False,
    focus: float = 0.0,
    chain: float = 0.0,
) -> tuple[Tensor, float]:
    """Rows, blocks, slots and words in plain loops; returns the sum and the weight."""
    total, whole = torch.zeros(()), 0.0
    for b in range(B):
        for n in range(N):
            reached = torch.ones(())
            for j in range(J):
                if not SCORED[b, n, j]:
                    continue
                q = torch.softmax(head(student[b, n, j]).float(), -1)
                p = torch.softmax(head(teacher[row[b, n, j]]).float(), -1)
                goal = int(target[b, n, j])
                kl = sum((p[v] * (p[v].log() - q[v].log()) for v in range(V)), torch.zeros(()))
                overlap = sum((min(p[v], q[v]) for v in range(V)), torch.zeros(()))
                variation = 1 - overlap
                share = math.exp(-3.0 * overlap.item())
                losses = {
                    "kl": kl,
                    "cross_entropy": -q[goal].log(),
                    "tv": variation,
                    "lk": share * kl + (1 - share) * variation,
                }
                kept = q[goal] if acceptance == "target" else overlap
                weight = 1.0 if decay is None else math.exp(-j / decay)
                if prefix:
                    weight *= reached.item()
                if focus:
                    weight *= 1 + focus * reached.item() * (1 - kept.item())
                reached = reached * kept
                total = total + weight * sum(losses[name] * factor for name, factor in terms.items())
                total = total + chain * (1 - reached)
                whole += weight
    return total, whole


CASES: list[dict[str, Any]] = [
    {"terms": {"kl": 1.0}},
    {"terms": {"cross_entropy": 1.0}, "decay": 7.0},
    {"terms": {"tv": 1.0}},
    {"terms": {"lk": 1.0}},
    {"terms": {"tv": 0.9, "cross_entropy": 0.1}},
    {"terms": {"kl": 1.0}, "prefix": True},
    {"terms": {"kl": 1.0}, "focus": 2.0, "decay": 4.0},
    {"terms": {"cross_entropy": 1.0}, "chain": 0.5},
    {"terms": {"lk": 0.7}, "acceptance": "overlap", "prefix": True, "focus": 1.5, "chain": 2.0, "decay": 3.0},
]


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(f"{k}" for k in [*case["terms"], *list(case)[1:]]))
def test_the_objective_is_the_specified_one(case: dict[str, Any], chunk: int) -> None:
    """Values to 1e-6 and gradients to 1e-5, whatever the chunk; the teacher gets none."""
    torch.manual_seed(1)
    head = nn.Linear(C, V, dtype=torch.float64).requires_grad_(False)
    student = torch.randn(B, N, J, C, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(R, C, dtype=torch.float64, requires_grad=True)
    row, target = torch.randint(0, R, (B, N, J)), torch.randint(0, V, (B, N, J))
    acceptance = case.get("acceptance", "target")
    scores = objective.chunked(
        objective.mixture(case["terms"], lk_decay=3.0),
        student[SCORED],
        objective.Teacher(teacher, row[SCORED]),
        target[SCORED],
        head=head,
        kept=objective.ACCEPTANCE[acceptance],
        chunk=chunk,
    )
    total, weight = objective.combine(
        scores,
        SCORED,
        objective.slot_weights(J, case.get("decay")),
        prefix_weighting=case.get("prefix", False),
        first_error_focus=case.get("focus", 0.0),
        chain_weight=case.get("chain", 0.0),
    )
    expected, whole = specified(student, teacher, row, target, head, **case)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)
    assert float(weight) == pytest.approx(whole, rel=1e-5)
    mine, other = torch.autograd.grad(total, [student, teacher], allow_unused=True)
    assert other is None
    torch.testing.assert_close(mine, torch.autograd.grad(expected, student)[0], rtol=1e-5, atol=1e-6)
    chosen = head(student).float().argmax(-1)[SCORED]
    assert scores.agrees_M.tolist() == (chosen == target[SCORED]).tolist()


def test_the_teachers_logits_are_computed_once_per_row() -> None:
    """Twelve slots that learn from three rows: the head sees twelve rows of the student and three of the teacher."""
    seen: list[int] = []

    def head(hidden: Tensor) -> Tensor:
        seen.append(len(hidden))
        return hidden

    rows = torch.arange(12) % 3
    with torch.no_grad():
        objective.chunked(
            objective.forward_kl,
            torch.randn(12, C),
            objective.Teacher(torch.randn(R, C), rows),
            torch.zeros(12, dtype=torch.long),
            head=head,
        )
    assert seen == [12, 3]


def test_kl_of_equal_distributions_is_zero_and_pulls_nowhere() -> None:
    """A view that says what the backbone says has nothing to learn."""
    logits = torch.randn(3, 8, requires_grad=True)
    known = logits.detach().log_softmax(-1)
    loss = objective.forward_kl(logits.log_softmax(-1), known, torch.zeros(3, dtype=torch.long)).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss.detach(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)


def test_no_slots_no_loss() -> None:
    """A batch without a scored slot gives zero, not an error."""
    scores = objective.chunked(
        objective.cross_entropy,
        torch.empty(0, C, requires_grad=True),
        None,
        torch.empty(0).long(),
        head=nn.Linear(C, V),
    )
    total, weight = objective.combine(scores, torch.zeros(1, 2, J).bool(), torch.ones(J), chain_weight=1.0)
    total.backward()
    assert (total.item(), float(weight), scores.agrees_M.numel()) == (0.0, 0.0, 0)


def test_slot_weights_fade() -> None:
    """Uniform without a decay; with one, each slot weighs exp(-1/decay) of the slot before."""
    assert objective.slot_weights(3, None).tolist() == [1.0, 1.0, 1.0]
    faded = objective.slot_weights(4, 7.0)
    torch.testing.assert_close(faded[1:] / faded[:-1], torch.full((3,), -1 / 7).exp())
