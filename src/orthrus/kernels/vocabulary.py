"""Operations over long vocabularies that are slow on CPUs: the place of the highest score, and top-p filtering."""

import math
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from orthrus.kernels.compiled import chosen

_LONG: Final = 1 << 12  # vocabularies for which values alone are sorted, some thirty times as fast


def best(score_BQV: Tensor) -> Tensor:
    """Return the first token of the highest score, `[B, Q]`, or -1 where no score is the highest of finite ones."""
    if (choose := choosing(score_BQV)) is not None:
        return choose(score_BQV, None, None, None, None)
    most = score_BQV.max(dim=-1)  # of any NaN it is NaN, and where all tokens are forbidden minus infinity
    return torch.where(most.values.isfinite(), most.indices, -1)


def choosing(score_BQV: Tensor) -> Callable[..., Tensor] | None:
    """Return the operator that chooses tokens by scores like these (`choice.cpp`); None where there is none."""
    served = score_BQV.device.type == "cpu" and score_BQV.dtype in (torch.float32, torch.bfloat16)
    return chosen() if served and score_BQV.stride(-1) == 1 else None


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
