"""Operations over long vocabularies that are slow on CPUs: the place of the highest score, and top-p filtering."""

import math
from typing import Final

import numpy as np
import torch
from torch import Tensor
from transformers import TopPLogitsWarper

_LONG: Final = 1 << 12  # vocabularies for which values alone are sorted, some thirty times as fast
_RUN: Final = 128  # scores, among which the place of the highest is looked for; it divides long vocabularies
_MANY: Final = 8  # choices, from which on two stages take less time


def highest(score_BQV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the highest scores and the first tokens that have them.

    CPUs find the largest of numbers far faster than its place, so many choices look for the place in one run alone.
    """
    B, Q, V = score_BQV.shape
    if score_BQV.device.type != "cpu" or B * Q < _MANY or V % _RUN:
        most = score_BQV.max(dim=-1)
        return most.values, most.indices
    runs_BQNR = score_BQV.view(B, Q, V // _RUN, _RUN)
    most = runs_BQNR.amax(-1).max(-1)
    run_BQR = runs_BQNR.take_along_dim(most.indices[..., None, None], dim=2)[:, :, 0]
    return most.values, most.indices * _RUN + run_BQR.argmax(-1)


class NucleusWarper(TopPLogitsWarper):  # type: ignore[misc]
    """Keep the likeliest tokens whose chances add up to `top_p`.

    The same ones as transformers' warper, which leaves open which of those that tie at the edge go.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores `[N, V]` with all other tokens at minus infinity."""
        if scores.device.type != "cpu" or scores.shape[1] < _LONG:
            kept: Tensor = super().__call__(input_ids, scores)
            return kept
        rising_NV = torch.from_numpy(np.sort(scores.numpy(), axis=1))
        rest_N1 = torch.full((len(scores), 1), 1 - self.top_p)
        gone_N1 = torch.searchsorted(rising_NV.softmax(1).cumsum(1), rest_N1, right=True).clamp_max(scores.shape[1] - 1)
        least_N1 = rising_NV.gather(1, gone_N1)
        out = scores.masked_fill(scores < least_N1, -math.inf)
        # Of the tokens that tie with the least likely one that stays, those of low ids go.
        tied_N1 = gone_N1 - torch.searchsorted(rising_NV, least_N1)
        for row in tied_N1[:, 0].nonzero()[:, 0].tolist():
            out[row, (scores[row] == least_N1[row]).nonzero()[: int(tied_N1[row]), 0]] = -math.inf
        return out
