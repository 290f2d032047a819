"""Attention in bfloat16 on CPUs where there are many scores: plain matrix products, one head after another.

Shapes: B rows, N key/value heads, G queries per key/value head, Q query rows, S keys, D head dimension.
"""

from functools import cache

import torch
from torch import Tensor

from orthrus.kernels.recorded import is_recording

_MANY = 1 << 14  # scores of one query head
_AT_ONCE = 128  # query rows whose scores stay in fast memory


def pays(like: Tensor, queries: int, keys: int) -> bool:
    """Tell whether products are faster than torch's kernel for so many queries over so many keys, tensors like one."""
    serves = like.dtype == torch.bfloat16 and like.device.type == "cpu" and not torch.is_grad_enabled()
    return serves and queries * keys >= _MANY and _multiplies()


@cache
def _multiplies() -> bool:
    """Tell whether the CPU multiplies vectors in bfloat16; with tiles (AMX) torch's kernel does so itself."""
    abilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.13
    return bool(abilities.get("avx512_bf16")) and not abilities.get("amx_tile")


def attend(query_BNGQD: Tensor, key_BNSD: Tensor, value_BNSD: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attend to all keys, or those that an additive or boolean mask `[B or 1, 1, Q or 1, S]` lets each query see.

    Keys that no query of a block of rows sees, at the end, are left out: a prompt costs half of its square.
    """
    B, N, G, Q, D = query_BNGQD.shape
    S = key_BNSD.shape[2]
    query = query_BNGQD * scaling
    out = query.new_empty(B, N, G, Q, value_BNSD.shape[3])
    mask_BQS = None if mask is None else mask[:, 0].expand(B, Q, S)
    # A recording serves other numbers of rows, so it may count none of their blocks.
    blocks = [slice(None)] if is_recording() else [slice(start, start + _AT_ONCE) for start in range(0, Q, _AT_ONCE)]
    for rows in blocks:
        end = S if mask_BQS is None or len(blocks) == 1 else _end(mask_BQS[:, rows], S - Q)
        for b in range(B):
            for n in range(N):
                scores = query[b, n, :, rows].reshape(-1, D) @ key_BNSD[b, n, :end].T
                if mask_BQS is not None:
                    _hide(scores.view(G, -1, end), mask_BQS[b, rows, :end])
                out[b, n, :, rows] = (scores.softmax(-1) @ value_BNSD[b, n, :end]).view(G, -1, out.shape[4])
    return out


def _end(mask_BQS: Tensor, start: int) -> int:
    """Return one past the last key that any query sees, from a start on which all keys are taken to be seen."""
    last = mask_BQS[..., max(start, 0) :].amax((0, 1))
    seen = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min
    return max(start, 0) + int(seen.nonzero().max()) + 1 if seen.any() else mask_BQS.shape[2]


def _hide(scores_GQS: Tensor, mask_QS: Tensor) -> None:
    if mask_QS.dtype == torch.bool:
        scores_GQS.masked_fill_(~mask_QS, torch.finfo(scores_GQS.dtype).min)
    else:
        scores_GQS += mask_QS
