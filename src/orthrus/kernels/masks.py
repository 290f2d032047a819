"""Masks are pure functions of positions: who may look at whom, in one place.

Slots of the cache are numbered by position, so "sees everything up to position p" is a comparison. Every mask is
written once as a boolean rule and made dense here (a 4-D additive tensor, which every architecture takes), or
handed to FlexAttention as a block mask, which skips what nobody sees.

Shapes: B rows, Q query rows of a pass, S cache slots in view, T positions of a packed row, N blocks, K block length.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

_ROWS: Final = 128  # whose scores stay in fast memory
_KEYS: Final = 64  # a group sees whole stretches of so many, since every new shape of a product costs milliseconds


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerMasks:
    """The additive masks of one pass: one for full attention, one for each sliding window in the model.

    Attributes:
        full: `[B, 1, Q, S]`, 0 where a query may look and the dtype's lowest value where it may not; or the same
            as a block mask, in blocks, in parts, or as a chain.
        windowed: the same, narrowed to each window length.
    """

    full: "Mask"
    windowed: Mapping[int, "Mask"] = field(default_factory=dict)

    def of(self, window: int | None) -> "Mask":
        """Return the mask of a layer with this window (None: full attention)."""
        return self.full if window is None else self.windowed[window]


class Group(NamedTuple):
    """Blocks of one packed row that stand side by side, and what they see.

    Attributes:
        keys: from the first to the last of the earlier keys that any of them sees.
        additive: `[q, s + q]`, over those keys and over the blocks' own.
    """

    row: int
    queries: slice
    keys: slice
    additive: Tensor


@dataclass(frozen=True, slots=True)
class InBlocks:
    """The mask of a training pass whose rows see much fewer keys than there are: a row's document, a block's text."""

    groups: Sequence[Group]
    trained: bool


@dataclass(frozen=True, slots=True)
class Behind:
    """The mask of a decoding pass in parts: what queries see of the text, and of the pass's own slots behind it.

    Its size does not depend on the text's, nor does anything about it that the host must know.

    Attributes:
        length_B: tokens of each row's text, which stand in its first slots.
        self_BQW: whether a query sees the slots `length … length + W - 1`.
        first_BQ: the first slot of the text that a query sees, in layers with a sliding window.
    """

    length_B: Tensor
    self_BQW: Tensor
    first_BQ: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Chain:
    """The mask of a pass that reads prompts, as many tokens of each: a chain behind texts of one length, in no window.

    `start` is the slot of its first row, which sees all slots up to its own; `rest` what rows behind its `rows` see.
    """

    start: int
    rows: int
    rest: Tensor | None = None


Mask = Tensor | BlockMask | InBlocks | Behind | Chain


def rows_of(mask: Mask, part: slice) -> Tensor | Behind | Chain:
    """Return the mask of some of a decoding pass's query rows, of the chain's or of those behind it where it is one."""
    if isinstance(mask, Chain):
        if part.start is None:
            return Chain(mask.start, mask.rows)
        assert mask.rest is not None
        return mask.rest
    if isinstance(mask, Behind):
        first_BQ = None if mask.first_BQ is None else mask.first_BQ[:, part]
        return Behind(mask.length_B, mask.self_BQW[:, part].contiguous(), first_BQ)
    assert isinstance(mask, Tensor)
    return mask[:, :, part]


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a boolean mask into an additive one of the given dtype, same shape."""
    lowest = torch.full(allowed.shape, torch.finfo(dtype).min, dtype=dtype, device=allowed.device)
    return lowest.masked_fill_(allowed, 0.0)


def layer_masks(
    allowed_BQS: Tensor,
    *,
    query_position_BQ: Tensor,
    key_position_BS: Tensor,
    windows: Iterable[int],
    dtype: torch.dtype,
) -> LayerMasks:
    """Make the masks of one pass dense: the rule as given, and narrowed to each sliding window.

    A window of w lets a query at position p see keys at positions greater than p - w, as transformers defines it.
    """

    def near(window: int) -> Tensor:
        return allowed_BQS & (query_position_BQ[:, :, None] - key_position_BS[:, None, :] < window)

    return LayerMasks(
        full=additive(allowed_BQS, dtype)[:, None],
        windowed={w: additive(near(w), dtype)[:, None] for w in windows},
    )


def behind(
    self_BQW: Tensor,
    *,
    length_B: Tensor,
    query_position_BQ: Tensor,
    key_position_BW: Tensor,
    windows: Iterable[int],
) -> LayerMasks:
    """Make the masks of one pass in parts, from the rule for its own slots and with the same windows as `layer_masks`.

    All queries see the text but for what lies outside their windows; `key_position_BW` are those of the own slots.
    """
    self_BQW = self_BQW.contiguous()

    def near(window: int) -> Behind:
        seen_BQW = self_BQW & (query_position_BQ[:, :, None] - key_position_BW[:, None, :] < window)
        return Behind(length_B, seen_BQW, (query_position_BQ - window + 1).clamp_min(0))

    return LayerMasks(full=Behind(length_B, self_BQW), windowed={w: near(w) for w in windows})


def block_masks(
    allowed_BQS: Tensor, *, query_position_BQ: Tensor, key_position_BS: Tensor, windows: Iterable[int]
) -> LayerMasks:
    """Make the masks of one pass for FlexAttention, from the same rule and with the same windows as `layer_masks`.

    Blocks of the score matrix that nobody looks at are skipped, which is most of them where many blocks draft at once.
    """
    B, Q, S = allowed_BQS.shape

    def make(window: int | None) -> BlockMask:
        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = allowed_BQS[b, q, k]
            if window is None:
                return seen
            return seen & (query_position_BQ[b, q] - key_position_BS[b, k] < window)

        return create_block_mask(sees, B, None, Q, S, device=allowed_BQS.device)

    return LayerMasks(full=make(None), windowed={w: make(w) for w in windows})


def in_blocks(
    allowed_BQS: Tensor,
    *,
    block: int,
    query_position_BQ: Tensor,
    key_position_BS: Tensor,
    windows: Iterable[int],
    dtype: torch.dtype,
    trained: bool,
) -> LayerMasks:
    """Make the masks of a training pass from the same rule and with the same windows as `layer_masks`, in blocks.

    The last Q keys are the rows' own; no row may see one behind its own block. Attention reads what a few blocks see at
    a time: least where blocks come in the order of their anchors.

    Args:
        block: rows of a block; 1 for causal attention.
        trained: whether the earlier keys get gradients too.
    """
    B, Q, S = allowed_BQS.shape
    before, blocks = S - Q, Q // block
    rows = block * -(-blocks // -(-blocks // max(1, _ROWS // block)))
    distance_BQS = query_position_BQ[:, :, None] - key_position_BS[:, None, :]

    def group(seen_QS: Tensor, row: int, queries: slice) -> Group:
        own = slice(before + queries.start, before + queries.stop)
        reach = seen_QS[queries, : own.start].any(0).nonzero()[:, 0].tolist() or [0, -1]
        keys = slice(reach[0] // _KEYS * _KEYS, min(own.start, -(-(reach[-1] + 1) // _KEYS) * _KEYS))
        return Group(row, queries, keys, additive(torch.cat([seen_QS[queries, keys], seen_QS[queries, own]], 1), dtype))

    def make(seen_BQS: Tensor) -> InBlocks:
        parts = [slice(start, min(start + rows, Q)) for start in range(0, Q, rows)]
        return InBlocks([group(seen_BQS[row], row, part) for row in range(B) for part in parts], trained)

    return LayerMasks(full=make(allowed_BQS), windowed={w: make(allowed_BQS & (distance_BQS < w)) for w in windows})


def up_to(limit_BQ: Tensor, *, span: int) -> Tensor:
    """Let each query see the slots up to and including its limit: `[B, Q, S]` boolean.

    With the query's own position as limit this is causal attention; with the block's last position for all of its slots
    it is the draft mask: the whole prefix and the whole block (causal blocks draft under the former).
    """
    return torch.arange(span, device=limit_BQ.device) <= limit_BQ[:, :, None]


def tree(length_B: Tensor, ancestors_BNN: Tensor, *, span: int) -> Tensor:
    """Let node i of a draft tree see the prefix and its own ancestors, itself included: `[B, N, S]` boolean.

    Node i is stored in slot `length + i`; `ancestors_BNN[b, i, j]` says that j is on i's path from the root.
    """
    B, N, _ = ancestors_BNN.shape
    slot_S = torch.arange(span, device=length_B.device)
    node_BS = slot_S - length_B[:, None]
    inside_BS = (node_BS >= 0) & (node_BS < N)
    index_BNS = node_BS.clamp(0, N - 1)[:, None].expand(B, N, span)
    own_BNS = ancestors_BNN.gather(2, index_BNS) & inside_BS[:, None]
    return own_BNS | (node_BS < 0)[:, None]


def ahead(text_BSS: Tensor, length_B: Tensor, *, rows: int, block: int, causal: bool = False) -> Tensor:
    """Draft mask of a fused pass: `[B, S*K, span]` boolean.

    Behind a row's `rows` AR slots lie its S blocks of K slots. A slot of block s sees the slots `text_BSS[:, s]` of the
    text that the block continues, and its own block in both directions, or up to itself where blocks are causal.
    """
    _, S, span = text_BSS.shape
    slot_S = torch.arange(span, device=length_B.device)
    owner_BS = (slot_S - (length_B + rows)[:, None]).div(block, rounding_mode="floor")
    own_BSS = owner_BS[:, None] == torch.arange(S, device=length_B.device)[:, None]
    allowed_BMS = (text_BSS | own_BSS).repeat_interleave(block, dim=1)
    if not causal:
        return allowed_BMS
    own_slot_BM = (length_B + rows)[:, None] + torch.arange(S * block, device=length_B.device)
    return allowed_BMS & (slot_S <= own_slot_BM[:, :, None])


def packed(document_BT: Tensor) -> Tensor:
    """Causal attention inside each document of a packed row: `[B, T, T]` boolean; padding (-1) sees itself only."""
    T = document_BT.shape[1]
    same = document_BT[:, :, None] == document_BT[:, None, :]
    causal = torch.ones(T, T, dtype=torch.bool, device=document_BT.device).tril()
    alone = torch.eye(T, dtype=torch.bool, device=document_BT.device)
    return (same & causal & (document_BT >= 0)[:, :, None]) | alone


def doubled(document_BT: Tensor, block_BT: Tensor) -> Tensor:
    """Training mask of block-diffusion models over a noisy row and, behind it, the clean one: `[B, 2T, 2T]` boolean.

    In its document a noisy token sees its own block and the clean blocks before it; a clean one sees clean blocks up to
    its own (arXiv 2503.09573). Padding sees itself only.
    """
    T = document_BT.shape[1]
    real_BT = document_BT >= 0
    same_BTT = (document_BT[:, :, None] == document_BT[:, None, :]) & real_BT[:, :, None]
    before_BTT = same_BTT & (block_BT[:, :, None] > block_BT[:, None, :])
    own_BTT = same_BTT & (block_BT[:, :, None] == block_BT[:, None, :])
    noisy_BTU = torch.cat([own_BTT, before_BTT], dim=2)
    clean_BTU = torch.cat([torch.zeros_like(own_BTT), own_BTT | before_BTT], dim=2)
    return torch.cat([noisy_BTU, clean_BTU], dim=1) | torch.eye(2 * T, dtype=torch.bool, device=document_BT.device)


def training(document_BT: Tensor, anchor_BN: Tensor, valid_BN: Tensor, *, block: int, causal: bool = False) -> Tensor:
    """Training mask of the draft rows: `[B, N*K, T + N*K]` boolean (paper, section 3.3).

    Slot j of block b sees the AR keys of its own document strictly before the anchor, and its own block in both
    directions, or up to itself where blocks are causal. Blocks that are not valid see only themselves, so that no
    softmax is empty.
    """
    B, T = document_BT.shape
    N = anchor_BN.shape[1]
    device = document_BT.device
    index_T = torch.arange(T, device=device)
    own_document_BNT = document_BT.gather(1, anchor_BN)[:, :, None] == document_BT[:, None, :]
    prefix_BNT = (index_T < anchor_BN[:, :, None]) & own_document_BNT & valid_BN[:, :, None]
    block_M = torch.arange(N * block, device=device) // block
    own_MM = block_M[:, None] == block_M[None, :]
    if causal:
        own_MM = own_MM.tril()
    return torch.cat([prefix_BNT.repeat_interleave(block, dim=1), own_MM.expand(B, N * block, N * block)], dim=2)
