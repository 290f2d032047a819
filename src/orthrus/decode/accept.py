"""Acceptance: which drafts the backbone keeps, as pure functions of tensors.

Three rules: `greedy` keeps the prefix that equals the backbone's own choices; `rejection` keeps each draft with
the probability that leaves the backbone's distribution untouched (Leviathan et al., 2211.17192, algorithm 1); and
`greedy` over noised scores, where draft and backbone choose with the same noise, keeps the very tokens that plain
sampling would have drawn. Knows no model, no cache and no options.

Shapes: B rows, M drafts, V vocabulary. Scores are processed logits in float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Verdict(NamedTuple):
    """What a verify pass decided: `tokens[b, :accepted[b] + 1]` are the row's next tokens, the last one the bonus.

    Where the logits after `n` tokens are no numbers (`sound`), `-1 - n` are accepted and there is no bonus.
    """

    tokens_BM1: Tensor
    accepted_B: Tensor


def greedy(draft_BM: Tensor, score_BM1V: Tensor) -> Verdict:
    """Keep the longest prefix of drafts that equals the argmax of the scores; ties go to the lowest id."""
    own_BM1 = score_BM1V.argmax(dim=-1)
    return Verdict(own_BM1, _prefix(draft_BM == own_BM1[:, :-1]))


def rejection(
    draft_BM: Tensor,
    draft_score_BMV: Tensor,
    score_BM1V: Tensor,
    *,
    accept_BM: Tensor,
    residual_BM1V: Tensor,
) -> Verdict:
    """Keep each draft x with probability min(1, p(x)/q(x)); draw the next token from what p has more than q.

    Args:
        draft_BM: tokens drawn from softmax(draft_score).
        draft_score_BMV: processed scores the drafts were drawn from (q).
        score_BM1V: the backbone's processed scores at the same slots and one more (p).
        accept_BM: uniform noise in (0, 1), independent of the drafts.
        residual_BM1V: Gumbel noise, independent of both.
    """
    p_BM1V = score_BM1V.softmax(-1)
    q_BMV = draft_score_BMV.softmax(-1)
    p_BM = p_BM1V[:, :-1].gather(2, draft_BM[:, :, None])[:, :, 0]
    q_BM = q_BMV.gather(2, draft_BM[:, :, None])[:, :, 0]
    accepted_B = _prefix(accept_BM * q_BM < p_BM)
    # Beyond the last draft nothing was proposed: q is zero there and the residual is p itself.
    q_BM1V = torch.cat([q_BMV, torch.zeros_like(p_BM1V[:, :1])], dim=1)
    at_B1V = accepted_B[:, None, None].expand(-1, 1, p_BM1V.shape[2])
    p_BV, q_BV, noise_BV = (x.gather(1, at_B1V)[:, 0] for x in (p_BM1V, q_BM1V, residual_BM1V))
    left_BV = (p_BV - q_BV).clamp_min(0)
    # p = q up to rounding leaves nothing; a rejection there has probability zero, so any draw from p will do.
    left_BV = torch.where(left_BV.sum(1, keepdim=True) > 0, left_BV, p_BV)
    bonus_B = (left_BV.log() + noise_BV).argmax(-1)
    tokens = torch.cat([draft_BM, bonus_B[:, None]], dim=1)
    return Verdict(tokens.scatter(1, accepted_B[:, None], bonus_B[:, None]), accepted_B)


def sound(verdict: Verdict, peak_BM1: Tensor) -> Verdict:
    """Keep no token from the first slot on whose logits are NaN, infinite, or all impossible; `-1 - n` marks the row.

    `peak_BM1` is the largest logit of each verified slot, NaN where any is.
    """
    slot_M1 = torch.arange(peak_BM1.shape[1], device=peak_BM1.device)
    broken_BM1 = ~peak_BM1.isfinite() & (slot_M1 <= verdict.accepted_B[:, None])
    before_B = broken_BM1.long().argmax(1)  # the first one
    return verdict._replace(accepted_B=torch.where(broken_BM1.any(1), -1 - before_B, verdict.accepted_B))


def _prefix(kept_BM: Tensor) -> Tensor:
    """Count the leading True values of each row."""
    if kept_BM.shape[1] == 0:
        return kept_BM.new_zeros(len(kept_BM), dtype=torch.long)
    return kept_BM.long().cumprod(dim=1).sum(dim=1)
