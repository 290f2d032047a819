"""Acceptance: which drafts the backbone keeps, as pure functions of tensors.

Three rules: `greedy` keeps the prefix that equals the backbone's own choices; `rejection` keeps each draft with
the probability that leaves the backbone's distribution untouched (Leviathan et al., 2211.17192, algorithm 1); and
`greedy` over noised scores, where draft and backbone choose with the same noise, keeps the very tokens that plain
sampling would have drawn. Knows no model, no cache and no options.

Shapes: B rows, M drafts, V vocabulary. Scores are processed logits in float32.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor

from orthrus.kernels.vocabulary import best

NONE: Final = -1
"""What is chosen where nothing can be: logits that are not numbers, or every token forbidden."""


class Verdict(NamedTuple):
    """What a verify pass decided: `tokens[b, :accepted[b] + 1]` are the row's next tokens, the last one the bonus.

    Where no token can be chosen after them, the bonus is `NONE`.
    """

    tokens_BM1: Tensor
    accepted_B: Tensor


def greedy(draft_BM: Tensor, score_BM1V: Tensor) -> Verdict:
    """Keep the longest prefix of drafts that equals the argmax of the scores; ties go to the lowest id."""
    choice_BM1 = best(score_BM1V)
    return Verdict(choice_BM1, _prefix(draft_BM == choice_BM1[:, :-1]))


def rejection(
    draft_BM: Tensor,
    draft_score_BMV: Tensor,
    score_BM1V: Tensor,
    *,
    accept_BM: Tensor,
    residual: Callable[[Tensor], Tensor],
) -> Verdict:
    """Keep each draft x with probability min(1, p(x)/q(x)); draw the next token from what p has more than q.

    Args:
        draft_BM: tokens drawn from softmax(draft_score).
        draft_score_BMV: processed scores the drafts were drawn from (q).
        score_BM1V: the backbone's processed scores at the same slots and one more (p).
        accept_BM: uniform noise in (0, 1), independent of the drafts.
        residual: the numbers of drafts kept, `[B]`, to Gumbel noise `[B, V]` for the slots after them, independent of
            both.
    """
    M = draft_BM.shape[1]
    p_BM1V = score_BM1V.softmax(-1)
    q_BMV = draft_score_BMV.softmax(-1)
    p_BM = p_BM1V[:, :-1].gather(2, draft_BM[:, :, None])[:, :, 0]
    q_BM = q_BMV.gather(2, draft_BM[:, :, None])[:, :, 0]
    accepted_B = _prefix(accept_BM * q_BM < p_BM)
    row_B = torch.arange(len(draft_BM), device=draft_BM.device)
    left_BV = p_BV = p_BM1V[row_B, accepted_B]
    if M:
        # Beyond the last draft nothing was proposed: q is zero there and the residual is p itself.
        q_BV = q_BMV[row_B, accepted_B.clamp_max(M - 1)]
        left_BV = torch.where(accepted_B[:, None] < M, (p_BV - q_BV).clamp_min(0), p_BV)
    # p = q up to rounding leaves nothing; a rejection there has probability zero, so any draw from p will do.
    left_BV = torch.where(left_BV.sum(1, keepdim=True) > 0, left_BV, p_BV)
    bonus_B1 = best((left_BV.log() + residual(accepted_B))[:, None])
    tokens = torch.cat([draft_BM, bonus_B1], dim=1)
    return Verdict(tokens.scatter(1, accepted_B[:, None], bonus_B1), accepted_B)


def _prefix(kept_BM: Tensor) -> Tensor:
    """Count the leading True values of each row."""
    if kept_BM.shape[1] == 0:
        return kept_BM.new_zeros(len(kept_BM), dtype=torch.long)
    return kept_BM.long().cumprod(dim=1).sum(dim=1)
