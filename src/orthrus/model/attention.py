"""An attention function that never repeats keys: grouped queries are folded into the query axis instead.

Registered with transformers as `attn_implementation="orthrus"`, for any architecture. Handles what scaled dot
product attention lacks (soft-capped scores, attention sinks) by plain arithmetic on the same grouped shapes.
Knows no view and no cache.

Shapes: B rows, H query heads, G queries per key/value head, Q query rows, S keys, D head dimension.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "orthrus"


def attention(
    module: nn.Module,
    query_BHQD: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend with `[B, H, Q, D]` queries over `[B, H/G, S, D]` keys and values; returns `[B, Q, H, D]`.

    Args:
        attention_mask: additive or boolean, `[B, 1, Q, S]`; None means causal for several queries, all for one.
        softcap: scores become `softcap * tanh(score / softcap)` before the mask (Gemma 2).
        s_aux: one sink logit per head, which takes part in the softmax and in nothing else (gpt-oss).
    """
    B, H, Q, D = query_BHQD.shape
    heads = key.shape[1]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and Q > 1 and causal:
        attention_mask = torch.ones(Q, key.shape[2], dtype=torch.bool, device=key.device).tril(key.shape[2] - Q)
        attention_mask = attention_mask[None, None]
    grouped = query_BHQD.reshape(B, heads, (H // heads) * Q, D)
    mask = None if attention_mask is None else _fold(attention_mask[:, :, :, : key.shape[2]], H // heads)
    if softcap is None and s_aux is None:
        out = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    else:
        out = _explicit(grouped, key, value, mask, scaling or D**-0.5, softcap, s_aux, Q)
    return out.reshape(B, H, Q, value.shape[-1]).transpose(1, 2).contiguous(), None


def _fold(mask_B1QS: Tensor, groups: int) -> Tensor:
    """Repeat the mask for the queries that share a key/value head: `[B, 1, G*Q, S]`."""
    return mask_B1QS if groups == 1 or mask_B1QS.shape[2] == 1 else mask_B1QS.repeat(1, 1, groups, 1)


def _explicit(
    grouped: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sink_H: Tensor | None,
    queries: int,
) -> Tensor:
    scores = grouped @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if sink_H is None:
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value
    sinks = sink_H.view(key.shape[1], -1).repeat_interleave(queries, dim=1)
    sinks = sinks[None, :, :, None].expand(scores.shape[0], -1, -1, 1).to(scores.dtype)
    weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1, dtype=torch.float32)
    return weights[..., :-1].to(value.dtype) @ value


def register() -> str:
    """Make `attn_implementation="orthrus"` known to transformers (again and again is fine); returns the name."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
