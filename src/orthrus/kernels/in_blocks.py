"""Attention of a training pass on CPUs, whose rows see few of its keys (`masks.InBlocks`), a few blocks at a time.

Nothing of the scores is kept: the backward pass computes them again. Shapes: B rows, H query heads, N key/value heads,
Q query rows, S keys, D head dimension; of a group of blocks q rows, s keys, and r = q * H / N.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from orthrus.kernels import products
from orthrus.kernels.masks import Group, InBlocks


class Attend(torch.autograd.Function):
    """Attend with `[B, H, Q, D]` queries over `[B, N, S, D]` keys and values under a mask, scaled: `[B, H, Q, D]`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: InBlocks, scaling: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.mask, ctx.scaling = mask, scaling
        B, H, Q, _ = query.shape
        out = query.new_empty(B, Q, H, value.shape[3]).transpose(1, 2)
        for group in mask.groups:
            rows_of(out, group)[:] = _attended(*read(group, query, key, value), group.additive, scaling)
        return out

    @staticmethod
    def backward(ctx: Any, grad_BHQD: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for group in ctx.mask.groups:
            query_HqD, key_NsD, value_NsD = read(group, query, key, value)
            N, s, _ = key_NsD.shape
            query_NrD = query_HqD.reshape(N, -1, query.shape[3]) * ctx.scaling
            grad_NrD = rows_of(grad_BHQD, group).reshape(N, -1, value.shape[3])
            score_Nrs = torch.bmm(query_NrD, key_NsD.mT)
            score_Nrs.view(N, -1, *group.additive.shape).add_(group.additive)
            weight_Nrs = torch.softmax(score_Nrs, -1)
            torch.bmm(grad_NrD, value_NsD.mT, out=score_Nrs)
            score_Nrs = torch._softmax_backward_data(score_Nrs, weight_Nrs, -1, weight_Nrs.dtype)
            rows_of(grad_query, group)[:] = torch.bmm(score_Nrs, key_NsD).mul_(ctx.scaling).view_as(query_HqD)
            first = 0 if ctx.mask.trained else s - len(group.additive)
            _add(grad_key, group, query, torch.bmm(score_Nrs[..., first:].contiguous().mT, query_NrD))
            _add(grad_value, group, query, torch.bmm(weight_Nrs[..., first:].contiguous().mT, grad_NrD))
        return grad_query, grad_key, grad_value, None, None


def _attended(query_HqD: Tensor, key_NsD: Tensor, value_NsD: Tensor, mask: Tensor, scaling: float) -> Tensor:
    one = (query_HqD[None], key_NsD[None], value_NsD[None], mask[None, None])
    if products.pays(query_HqD, *mask.shape):
        grouped = query_HqD.view(1, len(key_NsD), -1, *query_HqD.shape[1:])
        return products.attend(grouped, *one[1:], scaling)[0].flatten(0, 1)
    several = len(query_HqD) != len(key_NsD)
    return scaled_dot_product_attention(*one, scale=scaling, enable_gqa=several)[0]


def read(group: Group, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a group's queries `[H, q, D]`, and the keys and values that they see `[N, s, D]`, their own last."""
    own = _own(group, query, key)
    seen = [torch.cat([x[group.row, :, group.keys], x[group.row, :, own]], dim=1) for x in (key, value)]
    return rows_of(query, group), seen[0], seen[1]


def rows_of(x_BHQD: Tensor, group: Group) -> Tensor:
    """Return a group's rows `[H, q, D]`, as a view."""
    return x_BHQD[group.row, :, group.queries]


def _own(group: Group, query: Tensor, key: Tensor) -> slice:
    before = key.shape[2] - query.shape[2]
    return slice(before + group.queries.start, before + group.queries.stop)


def _add(grad_BNSD: Tensor, group: Group, query: Tensor, seen_NsD: Tensor) -> None:
    """Add the gradients of a group's own keys, and of the earlier ones where there are any, to those of all."""
    queries = len(group.additive)
    grad_BNSD[group.row, :, _own(group, query, grad_BNSD)] = seen_NsD[:, -queries:]
    if seen_NsD.shape[1] > queries:
        grad_BNSD[group.row, :, group.keys] += seen_NsD[:, :-queries]
