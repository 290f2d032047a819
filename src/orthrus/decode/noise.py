"""Randomness as a pure function of (stream, position, purpose, lane): no generator, no state, no order.

A row's noise depends on its own stream, the position of the token it decides and, unless draft and backbone share it,
the position its cycle began at; never on the batch it runs in or the device, so sampled text can be reproduced
anywhere. Knows no model and no probabilities.

Shapes: B rows, Q positions, L lanes (vocabulary entries, or 1 for a single draw).
"""

import torch
from torch import Tensor

DRAFT, ACCEPT, RESIDUAL, TARGET = range(4)
"""Purposes: draws for different decisions at one position must be independent of each other."""

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, odd, as a signed 64-bit integer
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685

_CHUNK = 1 << 16
"""Numbers that a CPU makes at a time."""


def stream_of(seed: int, index: int) -> int:
    """Return the stream of one row: a 64-bit integer that depends on the user's seed and the prompt's index."""
    mixed = _mix(torch.tensor([seed & 0x7FFFFFFFFFFFFFFF, index]) * _GOLDEN)
    return int(_mix(mixed[:1] + mixed[1:] * _GOLDEN).item())


def fresh(stream_B: Tensor, anchor_B: Tensor) -> Tensor:
    """Return the stream of one cycle of each row, which no cycle that starts at another position draws from.

    A cycle's course (which stops it drafts ahead for, how sure its drafts look) depends on draws for positions past
    the one where it stops. The next cycle decides those positions anew: meeting the same draws again, it would choose
    its proposals by the very noise it then draws with, and the text's distribution would shift.
    """
    return _mix(stream_B ^ _mix((anchor_B + 1) * _GOLDEN))


def uniform(stream_B: Tensor, position_BQ: Tensor, purpose: int, lanes: int) -> Tensor:
    """Return `[B, Q, L]` float32 numbers in the open interval (0, 1): odd multiples of 2^-24, all of them exact."""
    key_BQ1 = _mix(_mix(stream_B)[:, None] + (position_BQ * 4 + purpose) * _GOLDEN)[:, :, None]
    lane_L = torch.arange(1, lanes + 1, device=stream_B.device) * _GOLDEN
    # A CPU takes some lanes at a time: a long vocabulary's 64-bit keys would leave its cache between any two steps.
    chunk = max(_CHUNK // max(key_BQ1.numel(), 1), 64) if stream_B.device.type == "cpu" else lanes
    parts = (_shift(_mix(key_BQ1 + part_L), 41).float() for part_L in torch.split(lane_L, chunk))
    # 23 bits and a half: one bit more would round the largest value up to 1, whose Gumbel noise is infinite.
    return torch.cat([part.add_(0.5).mul_(2.0**-23) for part in parts], dim=2)


def gumbel(stream_B: Tensor, position_BQ: Tensor, purpose: int, lanes: int) -> Tensor:
    """Return `[B, Q, L]` standard Gumbel noise: the argmax of log-probabilities plus it is a sample from them."""
    return uniform(stream_B, position_BQ, purpose, lanes).log_().neg_().log_().neg_()


def _mix(z: Tensor) -> Tensor:
    """Scramble 64-bit integers (the finalizer of SplitMix64: Steele, Lea and Flood, OOPSLA 2014)."""
    z = (_shift(z, 30) ^ z).mul_(_MIX_1)
    z = _shift(z, 27).bitwise_xor_(z).mul_(_MIX_2)
    return _shift(z, 31).bitwise_xor_(z)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift right without the sign, which torch's own shift of signed integers drags along."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)
