"""The loss of a batch of blocks, filled by a view or a drafter: loss per slot, weights of slots, accepted drafts.

Shapes: B rows, T positions, N blocks, J predicted slots of a block, C hidden size, M scored slots.
"""

import numpy as np
import torch
from torch import Tensor

from orthrus.data.packing import PackedRows
from orthrus.model.markov import Before, Markov
from orthrus.train import objective
from orthrus.train.anchors import Blocks
from orthrus.train.objective import Head
from orthrus.train.sections import BlockObjective, Vocabulary
from orthrus.train.step import Loss

MOST_LOGITS = 1 << 26
"""Most logits that a step keeps for the backward pass with a reduced vocabulary (256 MB); else they are recomputed."""


def score(
    goal: BlockObjective,
    student_BNJC: Tensor,
    teacher_BTC: Tensor,
    token_BT: Tensor,
    blocks: Blocks,
    *,
    head: Head,
    markov: Markov | None,
    tokens: Tensor | None = None,
    apart: bool = False,
) -> Loss:
    """Weight and sum the slots' losses; slot j's teacher is the backbone's row at anchor + j.

    Args:
        head: maps hidden states to logits, of `tokens` if given: those of the softmax, in ascending order.
        markov: the correction by the previous token; None for none.
        apart: count blocks with a masked anchor separately.
    """
    scored = blocks.scored_BNJ
    target_M = token_BT.gather(1, blocks.target_BNJ.flatten(1)).view_as(blocks.target_BNJ)[scored]
    few = tokens is not None and len(target_M) * len(tokens) <= MOST_LOGITS
    if tokens is not None:
        target_M = torch.searchsorted(tokens, target_M)
    teacher = None
    if goal.needs_teacher:
        first_B11 = torch.arange(len(token_BT), device=token_BT.device)[:, None, None] * token_BT.shape[1]
        teacher = objective.Teacher(teacher_BTC.flatten(0, 1), (first_B11 + blocks.target_BNJ - 1)[scored])
    scores = objective.chunked(
        objective.mixture(goal.mixture, lk_decay=goal.lk_decay),
        student_BNJC[scored],
        teacher,
        target_M,
        head=head,
        kept=objective.ACCEPTANCE[goal.acceptance],
        before=None if markov is None else before(token_BT, blocks, markov, tokens),
        recompute=not few,
    )
    total, weight = objective.combine(
        scores,
        scored,
        objective.slot_weights(scored.shape[2], goal.slot_decay).to(token_BT.device),
        prefix_weighting=goal.prefix_weighting,
        first_error_focus=goal.first_error_focus,
        chain_weight=goal.chain_weight,
    )
    agree_BNJ = torch.zeros_like(scored).masked_scatter(scored, scores.agrees_M)
    kept_BN = agree_BNJ.long().cumprod(2).sum(2)
    began_BN = scored[:, :, 0]  # blocks that are shown some tokens draft less and are not counted
    kinds = {"accepted": began_BN}
    if apart:
        kinds = {"accepted_known": began_BN & ~blocks.blind_BN, "accepted_blind": began_BN & blocks.blind_BN}
    counts = {name: (kept_BN[kind].sum(), kind.sum()) for name, kind in kinds.items()}
    return Loss(total=total, weight=weight, metrics={"agreement": (scores.agrees_M.sum(), scored.sum()), **counts})


def before(token_BT: Tensor, blocks: Blocks, markov: Markov, tokens: Tensor | None) -> Before:
    """Return the text's token before each scored slot: after a draft that differs from the text, no slot counts.

    The first slot of a block with a masked anchor gets that anchor, because decoding has it when it chooses the draft.
    """
    token_BNJ = token_BT.gather(1, (blocks.target_BNJ - 1).flatten(1)).view_as(blocks.target_BNJ)
    return Before(token_BNJ[blocks.scored_BNJ], markov, tokens)


def softmax_tokens(
    vocabulary: Vocabulary, rows: PackedRows, device: torch.device, *, markov: Markov | None = None
) -> Tensor | None:
    """Return the tokens of a softmax in ascending order, None for all.

    Where they are those of the training answers, the correction's rows of all others become zero.
    """
    if vocabulary == "all":
        return None
    tokens = torch.from_numpy(np.unique(rows.token_ids[rows.answer])).long().to(device)
    if markov is not None:
        others_V = torch.ones(len(markov.after_VR), dtype=torch.bool, device=device)
        others_V[tokens] = False
        with torch.no_grad():
            markov.after_VR[others_V] = 0.0
    return tokens
