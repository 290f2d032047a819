"""Attention of decoding passes on CUDA: few queries, many keys, split over all of the device's processors.

How many keys there are is read on the device, so that one CUDA graph serves every length. A kernel of our own because
those of torch either take no mask, or leave most of the device idle where there is one. Needs Triton.

Shapes: B rows, N key/value heads, R query rows (the G queries that share a head, one after another), Q queries,
W slots of the pass itself, S cache slots, D head dimension.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from orthrus.kernels.masks import Behind

_ROWS = 64  # query rows per program at most
_SHAPES = ((128, 2), (64, 2), (64, 1), (32, 1), (16, 1))  # keys at a time, and loads in flight: the first that fits
_TILE = 128  # keys per program, where that is fixed
_AT_ONCE = 16  # of those programs' results put together at once
_SHARED = 96 << 10  # bytes of shared memory where the device does not say
_PER_PROCESSOR = 2  # programs that a multiprocessor works on at once


def split_attention(
    query_BNRD: Tensor,
    key_BNSD: Tensor,
    value_BNSD: Tensor,
    mask: Behind,
    *,
    scaling: float,
    softcap: float | None = None,
    sink_NR: Tensor | None = None,
    in_order: bool = False,
) -> Tensor:
    """Attend to a text and to what follows it in the cache; returns `[B, N, R, D]`.

    Args:
        mask: who sees what; row r of R belongs to query `r % Q`.
        scaling: what scores are multiplied by.
        softcap: scores become `softcap * tanh(score / softcap)` before the mask.
        sink_NR: a logit per row which takes part in the softmax and in nothing else.
        in_order: programs take a fixed number of keys each and their results are put together in order, so that the
            bits of a result depend on nothing but its own keys; otherwise keys are shared out evenly over the device.
    """
    B, N, R, D = query_BNRD.shape
    size = value_BNSD.shape[3]
    Q, W = mask.self_BQW.shape[1:]
    first_BQ = mask.self_BQW if mask.first_BQ is None else mask.first_BQ  # any tensor, where it is not read
    query = query_BNRD.contiguous()
    sizes = {"D": D, "DV": size, "BLOCK_D": _padded(D), "BLOCK_DV": _padded(size)}
    block, keys, stages = _shape(query, R, _padded(D), _padded(size))
    blocks = triton.cdiv(R, block)
    if in_order:
        splits = triton.cdiv(key_BNSD.shape[2], _TILE)
    else:
        splits = max(1, min(64, _PER_PROCESSOR * _processors(query.device) // (B * N * blocks)))
    parts = query.new_empty(B * N, splits, R, size, dtype=torch.float32)
    tops, totals = query.new_empty(2, B * N, splits, R, dtype=torch.float32)
    _part[(B * N, blocks, splits)](
        query,
        key_BNSD,
        value_BNSD,
        mask.length_B,
        mask.self_BQW,
        first_BQ,
        parts,
        tops,
        totals,
        *key_BNSD.stride()[:3],
        *value_BNSD.stride()[:3],
        *mask.self_BQW.stride()[:2],
        *first_BQ.stride()[:2],
        scaling,
        softcap or 1.0,
        Q,
        W,
        R,
        N,
        SPLITS=splits,
        TILE=_TILE if in_order else 0,
        CAPPED=softcap is not None,
        WINDOWED=mask.first_BQ is not None,
        BLOCK_M=block,
        BLOCK_N=keys,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        **sizes,
        num_warps=8 if block == _ROWS else 4,
        num_stages=stages,
    )
    out = query.new_empty(B, N, R, size)
    _join[(B * N, R)](
        parts,
        tops,
        totals,
        out if sink_NR is None else sink_NR,
        out,
        mask.length_B,
        W,
        R,
        N,
        SPLITS=splits,
        TILE=_TILE if in_order else 0,
        AT_ONCE=_AT_ONCE if in_order else triton.next_power_of_2(splits),
        SINKS=sink_NR is not None,
        DV=size,
        BLOCK_DV=_padded(size),
    )
    return out


def write(keys: Tensor, values: Tensor, key_BNQD: Tensor, value_BNQD: Tensor, row_B1: Tensor, slot_BQ: Tensor) -> None:
    """Write the keys and values of a pass, `[B, N, Q, D]`, into slots of `[R, S, N, D]` buffers."""
    B, N, Q, D = key_BNQD.shape
    size = value_BNQD.shape[3]
    _write[(B, Q)](
        keys,
        values,
        key_BNQD,
        value_BNQD,
        row_B1,
        slot_BQ,
        *keys.stride()[:2],
        *values.stride()[:2],
        *key_BNQD.stride(),
        *value_BNQD.stride(),
        *slot_BQ.stride(),
        D=D,
        DV=size,
        ALL=N * D,
        ALL_V=N * size,
        BLOCK=triton.next_power_of_2(N * max(D, size)),
    )


def _shape(query: Tensor, rows: int, size: int, value_size: int) -> tuple[int, int, int]:
    """Return query rows per program, keys at a time and loads in flight: as many as the device has memory for."""
    shared, bytes_each = _SHARED, query.element_size()
    if query.is_cuda:
        properties: Any = torch.cuda.get_device_properties(query.device)  # typed without this one
        shared = properties.shared_memory_per_block_optin
    most = int(max(16, min(_ROWS, triton.next_power_of_2(rows))))
    for block in (most, 16):
        for keys, stages in _SHAPES if block == _ROWS else _SHAPES[1:]:
            tiles = stages * keys * (size + value_size) + block * size
            if tiles * bytes_each + 4 * block * keys <= shared:
                return block, keys, stages
    return 16, *_SHAPES[-1]


def _padded(size: int) -> int:
    return int(max(16, triton.next_power_of_2(size)))


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@triton.jit  # type: ignore[untyped-decorator]
def _part(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    length,
    visible,
    first,
    parts,
    tops,
    totals,
    key_b,
    key_n,
    key_s,
    value_b,
    value_n,
    value_s,
    visible_b,
    visible_q,
    first_b,
    first_q,
    scaling,
    softcap,
    Q,
    W,
    R,
    N,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
) -> Any:
    """Attend with a block of query rows over one split of the keys, in a running softmax."""
    bn = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    b = bn // N
    n = bn % N
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = row < R
    at_query = row % Q
    text = tl.load(length + b)
    end = text + W
    earliest, begin = 0, row
    if WINDOWED:
        begin = tl.load(first + b * first_b + at_query * first_q, mask=there, other=0)
        earliest = tl.minimum(tl.min(tl.where(there, begin, end), axis=0), text) // BLOCK_N * BLOCK_N
    start, stop = _share(split, earliest, end, SPLITS, TILE, BLOCK_N)

    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    q = tl.load(query + (bn * R + row[:, None]) * D + d[None], mask=there[:, None] & (d[None] < D), other=0.0)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    keys = key + b * key_b + n * key_n
    values = value + b * value_b + n * value_n
    table = visible + b * visible_b + at_query[:, None] * visible_q
    # Whole blocks of text first, which need no table of who sees what; then what the pass itself has written. In order
    # all go the latter way: compilers round the two differently, and which a key takes depends on the text's length.
    whole = start
    if not TILE:
        whole = tl.maximum(start, tl.minimum(stop, text // BLOCK_N * BLOCK_N))
    for inside in tl.static_range(2):
        for at in range(whole if inside else start, stop if inside else whole, BLOCK_N):
            slot = at + tl.arange(0, BLOCK_N)
            if inside:
                reached = slot < stop
                k = tl.load(keys + slot[None] * key_s + d[:, None], mask=reached[None] & (d[:, None] < D), other=0.0)
                v = tl.load(
                    values + slot[:, None] * value_s + dv[None], mask=reached[:, None] & (dv[None] < DV), other=0.0
                )
            else:
                k = tl.load(keys + slot[None] * key_s + d[:, None], mask=d[:, None] < D, other=0.0)
                v = tl.load(values + slot[:, None] * value_s + dv[None], mask=dv[None] < DV, other=0.0)
            score = tl.dot(q, k, input_precision=PRECISION) * scaling
            if CAPPED:
                score = softcap * (2 * tl.sigmoid(2 * score / softcap) - 1)
            if inside:
                seen = _seen(slot, text, stop, begin, table, there, WINDOWED)
                score = tl.where(seen, score, float("-inf"))
            elif WINDOWED:
                score = tl.where(slot[None] >= begin[:, None], score, float("-inf"))
            top, total, sums = _add(score, v, top, total, sums, PRECISION)
    index = (bn * SPLITS + split) * R + row
    tl.store(tops + index, top, mask=there)
    tl.store(totals + index, total, mask=there)
    some = there & (start < stop)
    tl.store(parts + index[:, None] * DV + dv[None], sums, mask=some[:, None] & (dv[None] < DV))


@triton.jit  # type: ignore[untyped-decorator]
def _share(  # type: ignore[no-untyped-def]
    split, earliest, end, SPLITS: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr
) -> Any:
    """Return the first key of a split and the one past its last: so many each, or an even share of whole blocks."""
    if TILE:
        start = split * TILE
        stop = tl.minimum(start + TILE, end)
        start = tl.maximum(start, earliest)
    else:
        share = tl.cdiv(tl.cdiv(end - earliest, BLOCK_N), SPLITS) * BLOCK_N
        start = earliest + split * share
        stop = tl.minimum(start + share, end)
    return start, stop


@triton.jit  # type: ignore[untyped-decorator]
def _seen(slot, text, stop, begin, table, there, WINDOWED: tl.constexpr) -> Any:  # type: ignore[no-untyped-def]
    """Say which keys each query row sees: of the text all in its window, of the pass's own what the table says."""
    reached = slot < stop
    behind = slot - text
    seen = behind[None] < 0
    if WINDOWED:
        seen = seen & (slot[None] >= begin[:, None])
    mine = there[:, None] & (behind[None] >= 0) & reached[None]
    seen = seen | (tl.load(table + behind[None], mask=mine, other=0) != 0)
    return seen & reached[None]


@triton.jit  # type: ignore[untyped-decorator]
def _add(score, v, top, total, sums, PRECISION: tl.constexpr) -> Any:  # type: ignore[no-untyped-def]
    """Take a block of keys into a running softmax."""
    higher = tl.maximum(top, tl.max(score, axis=1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weight = tl.exp(score - base[:, None])
    shrink = tl.exp(top - base)
    sums = sums * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
    total = total * shrink + tl.sum(weight, axis=1)
    return higher, total, sums


@triton.jit  # type: ignore[untyped-decorator]
def _join(  # type: ignore[no-untyped-def]
    parts,
    tops,
    totals,
    sinks,
    out,
    length,
    W,
    R,
    N,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    SINKS: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
) -> Any:
    """Put the splits of one query row together, so many at once, one lot after another."""
    bn = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    dv = tl.arange(0, BLOCK_DV)
    top = float("-inf")
    total = 0.0
    sums = tl.zeros((BLOCK_DV,), tl.float32)
    splits = SPLITS
    if TILE:
        splits = tl.cdiv(tl.load(length + bn // N) + W, TILE)
    for at in range(0, splits, AT_ONCE):
        split = at + tl.arange(0, AT_ONCE)
        valid = split < splits
        index = (bn * SPLITS + split) * R + row
        part_top = tl.load(tops + index, mask=valid, other=float("-inf"))
        higher = tl.maximum(top, tl.max(part_top, axis=0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp(top - base)
        weight = tl.exp(part_top - base)
        some = valid & (part_top > float("-inf"))
        each = tl.load(parts + index[:, None] * DV + dv[None], mask=some[:, None] & (dv[None] < DV), other=0.0)
        sums = sums * shrink + tl.sum(weight[:, None] * each, axis=0)
        total = total * shrink + tl.sum(weight * tl.load(totals + index, mask=valid, other=0.0), axis=0)
        top = higher
    if SINKS:
        sink = tl.load(sinks + (bn % N) * R + row).to(tl.float32)
        higher = tl.maximum(top, sink)
        shrink = tl.exp(top - higher)
        sums = sums * shrink
        total = total * shrink + tl.exp(sink - higher)
    tl.store(out + (bn * R + row) * DV + dv, (sums / total).to(out.dtype.element_ty), mask=dv < DV)


@triton.jit  # type: ignore[untyped-decorator]
def _write(  # type: ignore[no-untyped-def]
    keys,
    values,
    key,
    value,
    row,
    slot,
    keys_r,
    keys_s,
    values_r,
    values_s,
    key_b,
    key_n,
    key_q,
    key_d,
    value_b,
    value_n,
    value_q,
    value_d,
    slot_b,
    slot_q,
    D: tl.constexpr,
    DV: tl.constexpr,
    ALL: tl.constexpr,
    ALL_V: tl.constexpr,
    BLOCK: tl.constexpr,
) -> Any:
    b = tl.program_id(0).to(tl.int64)
    q = tl.program_id(1)
    target_row = tl.load(row + b).to(tl.int64)
    target_slot = tl.load(slot + b * slot_b + q * slot_q).to(tl.int64)
    at = tl.arange(0, BLOCK)
    k = tl.load(key + b * key_b + (at // D) * key_n + q * key_q + (at % D) * key_d, mask=at < ALL)
    tl.store(keys + target_row * keys_r + target_slot * keys_s + at, k, mask=at < ALL)
    v = tl.load(value + b * value_b + (at // DV) * value_n + q * value_q + (at % DV) * value_d, mask=at < ALL_V)
    tl.store(values + target_row * values_r + target_slot * values_s + at, v, mask=at < ALL_V)
