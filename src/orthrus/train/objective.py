"""What the diffusion view is trained towards: losses between its slots and the backbone, never holding all logits.

A loss maps student logits, teacher logits and target tokens to one number per slot. `chunked` applies it a few
slots at a time and recomputes logits in the backward pass, so that memory does not grow with slots times
vocabulary. Knows hidden states and an output head; knows no model, rows or anchors.

Shapes: M slots, C hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SlotLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
Head = Callable[[Tensor], Tensor]


def forward_kl(student_MV: Tensor, teacher_MV: Tensor, target_M: Tensor) -> Tensor:
    """KL(teacher || student) per slot, over the whole vocabulary (paper, equation 5)."""
    teacher = teacher_MV.log_softmax(-1)
    return (teacher.exp() * (teacher - student_MV.log_softmax(-1))).sum(-1)


def cross_entropy(student_MV: Tensor, teacher_MV: Tensor, target_M: Tensor) -> Tensor:
    """Negative log-probability of the target token per slot; the teacher's logits are not looked at."""
    return F.cross_entropy(student_MV, target_M, reduction="none")


LOSSES: dict[str, SlotLoss] = {"kl": forward_kl, "cross_entropy": cross_entropy}
NEEDS_TEACHER = frozenset({"kl"})


class SlotScores(NamedTuple):
    """The weighted sum of slot losses (a scalar with a gradient) and which slots chose the target: `[M]` boolean."""

    total: Tensor
    agrees_M: Tensor


def chunked(
    loss: SlotLoss,
    student_MC: Tensor,
    teacher_MC: Tensor | None,
    target_M: Tensor,
    weight_M: Tensor,
    *,
    head: Head,
    chunk: int = 1024,
) -> SlotScores:
    """Sum `weight * loss` over slots, `chunk` of them at a time; equal to the plain sum in value and gradient.

    Args:
        student_MC: the diffusion view's hidden states.
        teacher_MC: the backbone's hidden states at the rows that predict the same tokens; None when the loss does
            not look at the teacher.
        target_M: token ids.
        weight_M: float32 weights.
        head: hidden states to logits.
    """
    total = student_MC.new_zeros((), dtype=torch.float32)
    agrees = []
    for start in range(0, len(target_M), chunk):
        part = slice(start, start + chunk)
        teacher = None if teacher_MC is None else teacher_MC[part]
        value, agree = checkpoint(
            _part, loss, head, student_MC[part], teacher, target_M[part], weight_M[part], use_reentrant=False
        )
        total = total + value
        agrees.append(agree)
    return SlotScores(total, torch.cat(agrees) if agrees else target_M.bool())


def _part(
    loss: SlotLoss, head: Head, student: Tensor, teacher: Tensor | None, target: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    logits = head(student).float()
    with torch.no_grad():
        teacher_logits = logits.new_empty(0) if teacher is None else head(teacher).float()
        agree = logits.argmax(-1) == target
    return (loss(logits, teacher_logits, target) * weight).sum(), agree


def slot_weights(slots: int, decay: float | None) -> Tensor:
    """Weight of each slot: 1, or exp(-j / decay), since a late draft counts only if all before it were kept."""
    j = torch.arange(slots, dtype=torch.float32)
    return torch.ones(slots) if decay is None else torch.exp(-j / decay)
