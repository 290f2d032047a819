"""What the diffusion view is trained towards: losses between its slots and the backbone, never holding all logits.

Shapes: M slots, C hidden size, V vocabulary, R rows of the backbone, B rows, N blocks, J predicted slots of a block.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from orthrus.model.markov import Before

SlotLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Student and teacher log-probabilities `[M, V]` and targets `[M]` to one number per slot, `[M]`."""
Head = Callable[[Tensor], Tensor]


def forward_kl(student_MV: Tensor, teacher_MV: Tensor, target_M: Tensor) -> Tensor:
    """KL(teacher || student) per slot, over the whole vocabulary (paper, equation 5)."""
    return (teacher_MV.exp() * (teacher_MV - student_MV)).sum(-1)


def cross_entropy(student_MV: Tensor, teacher_MV: Tensor, target_M: Tensor) -> Tensor:
    """Negative log-probability of the target token per slot; the teacher is not looked at."""
    return -log_probability(student_MV, target_M)


def total_variation(student_MV: Tensor, teacher_MV: Tensor, target_M: Tensor) -> Tensor:
    """Half the absolute difference of the distributions: the chance that rejection sampling refuses the draft."""
    return (teacher_MV.exp() - student_MV.exp()).abs().sum(-1) / 2


def likely_kept(student_MV: Tensor, teacher_MV: Tensor, target_M: Tensor, *, decay: float) -> Tensor:
    """KL while drafts are mostly refused, total variation once they are kept (the LK hybrid, arXiv 2602.23881).

    KL weighs `exp(-decay * chance of being kept)`, without a gradient, and total variation the rest.
    """
    variation = total_variation(student_MV, teacher_MV, target_M)
    share = torch.exp(-decay * (1 - variation.detach()))
    return share * forward_kl(student_MV, teacher_MV, target_M) + (1 - share) * variation


LOSSES: dict[str, SlotLoss] = {"kl": forward_kl, "cross_entropy": cross_entropy, "tv": total_variation}


def mixture(terms: Mapping[str, float], *, lk_decay: float) -> SlotLoss:
    """The weighted sum of losses by name: those of `LOSSES`, and "lk" with its decay."""
    parts = [(LOSSES.get(name, partial(likely_kept, decay=lk_decay)), weight) for name, weight in terms.items()]

    def loss(student_MV: Tensor, teacher_MV: Tensor, target_M: Tensor) -> Tensor:
        return torch.stack([part(student_MV, teacher_MV, target_M) * weight for part, weight in parts]).sum(0)

    return loss


def log_probability(student_MV: Tensor, target_M: Tensor) -> Tensor:
    """The log-probability that a slot gives its target."""
    return student_MV.gather(-1, target_M[:, None])[:, 0]


def kept_greedily(student_MV: Tensor, teacher_MV: Tensor, target_M: Tensor) -> Tensor:
    """The chance that a draft drawn from the student is the target: what greedy verification keeps."""
    return log_probability(student_MV, target_M).exp()


def kept_by_sampling(student_MV: Tensor, teacher_MV: Tensor, target_M: Tensor) -> Tensor:
    """The mass that both distributions share: what rejection sampling keeps of the student's drafts."""
    return torch.minimum(student_MV, teacher_MV).exp().sum(-1)


ACCEPTANCE: dict[str, SlotLoss] = {"target": kept_greedily, "overlap": kept_by_sampling}


class Teacher(NamedTuple):
    """The backbone's hidden states `[R, C]`, and the row of them that each slot learns from, `[M]`."""

    hidden_RC: Tensor
    row_M: Tensor


class SlotScores(NamedTuple):
    """Per slot: its loss and the chance that it is kept (with gradients), and whether it chose the target (boolean)."""

    loss_M: Tensor
    kept_M: Tensor
    agrees_M: Tensor


def chunked(
    loss: SlotLoss,
    student_MC: Tensor,
    teacher: Teacher | None,
    target_M: Tensor,
    *,
    head: Head,
    kept: SlotLoss = kept_greedily,
    before: Before | None = None,
    chunk: int = 1024,
    recompute: bool = True,
) -> SlotScores:
    """Score slots `chunk` at a time; equal to scoring all at once in value and gradient.

    Slots go in the order of their teacher's rows, so that overlapping blocks share the teacher's logits.

    Args:
        teacher: the backbone's side; None when neither `loss` nor `kept` looks at it.
        before: the tokens before the slots, `[M]`, where these shift the student's logits.
        recompute: compute logits again in the backward pass; without, all of them are held.
    """
    order_M = torch.arange(len(target_M), device=target_M.device) if teacher is None else teacher.row_M.argsort()
    parts = []
    for start in range(0, len(target_M), chunk):
        part = order_M[start : start + chunk]
        taught = None if teacher is None else Teacher(teacher.hidden_RC, teacher.row_M[part])
        past = None if before is None else before._replace(token=before.token[part])
        slots = (student_MC[part], taught, target_M[part], past)
        if recompute:
            parts.append(checkpoint(_part, loss, kept, head, *slots, use_reentrant=False))
        else:
            parts.append(_part(loss, kept, head, *slots))
    if not parts:
        nothing = student_MC.sum(-1).float()  # empty, but a gradient can go through
        return SlotScores(nothing, nothing, target_M.bool())
    back_M = order_M.argsort()
    return SlotScores(*(torch.cat(column)[back_M] for column in zip(*parts, strict=True)))


def _part(
    loss: SlotLoss,
    kept: SlotLoss,
    head: Head,
    student: Tensor,
    teacher: Teacher | None,
    target: Tensor,
    before: Before | None,
) -> tuple[Tensor, Tensor, Tensor]:
    logits = head(student).float()
    if before is not None:
        logits = logits + before.shift(before.token, before.after)
    with torch.no_grad():
        teacher_log = logits.new_empty(0) if teacher is None else _teacher_log_probabilities(head, teacher)
        agree = logits.argmax(-1) == target
    spoken = logits.log_softmax(-1)
    return loss(spoken, teacher_log, target), kept(spoken, teacher_log, target), agree


def _teacher_log_probabilities(head: Head, teacher: Teacher) -> Tensor:
    """`[M, V]` from rows in ascending order: each different row goes through the head once."""
    rows, inverse = torch.unique_consecutive(teacher.row_M, return_inverse=True)
    return head(teacher.hidden_RC[rows]).float().log_softmax(-1)[inverse]


def combine(
    scores: SlotScores,
    scored_BNJ: Tensor,
    weight_J: Tensor,
    *,
    prefix_weighting: bool = False,
    first_error_focus: float = 0.0,
    chain_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Add up slots over blocks; returns the sum, with a gradient, and the sum of the weights, without.

    Args:
        scores: of the slots where `scored_BNJ` is true, in its order.
        weight_J: what a slot weighs by its place alone.
        prefix_weighting: a slot also weighs the chance that all before it are kept (dynamic, arXiv 2605.18810).
        first_error_focus: a slot weighs one plus this many times the chance that it is the first one refused
            (arXiv 2606.11552).
        chain_weight: this many times the scored slots less the expected number kept in a row is added; its gradient
            goes through every factor of the products (the chain loss of arXiv 2606.11552).
    """
    loss_BNJ = torch.zeros_like(scored_BNJ, dtype=torch.float32).masked_scatter(scored_BNJ, scores.loss_M)
    kept_BNJ = torch.ones_like(loss_BNJ).masked_scatter(scored_BNJ, scores.kept_M)
    run_BNJ = kept_BNJ.cumprod(2)
    weight_BNJ = weight_J * scored_BNJ
    reached_BNJ = torch.cat([torch.ones_like(run_BNJ[:, :, :1]), run_BNJ[:, :, :-1]], 2).detach()
    if prefix_weighting:
        weight_BNJ = weight_BNJ * reached_BNJ
    if first_error_focus:
        weight_BNJ = weight_BNJ * (1 + first_error_focus * reached_BNJ * (1 - kept_BNJ.detach()))
    total = (loss_BNJ * weight_BNJ).sum()
    if chain_weight:
        total = total + chain_weight * ((1 - run_BNJ) * scored_BNJ).sum()
    return total, weight_BNJ.sum()


def slot_weights(slots: int, decay: float | None) -> Tensor:
    """Weight of each slot: 1, or exp(-j / decay), since a late draft counts only if all before it were kept."""
    j = torch.arange(slots, dtype=torch.float32)
    return torch.ones(slots) if decay is None else torch.exp(-j / decay)
