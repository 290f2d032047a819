"""The block that the draft pass reads, for rows whose keys and values lie in pages, and how it is drawn slot by slot.

Pure functions of tensors, without data-dependent shapes or copies to the host: both drivers call them, also while a
CUDA graph is in use.

Shapes: B rows, K = drafts + 1 block positions, N pages of a row's page table.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NO_SLOT = -1
"""vLLM's sign for a token whose keys and values are not to be written."""


class Block(NamedTuple):
    """What the draft pass reads and where it writes.

    Attributes:
        position_BK: rotary positions, kept below the longest text.
        slot_BK: cache slots, or `NO_SLOT` where the row owns no room for the position.
        seen_B: keys that every position of the row sees: its prefix and what was written of the block.
    """

    token_BK: Tensor
    position_BK: Tensor
    slot_BK: Tensor
    seen_B: Tensor


def block_inputs(
    length_B: Tensor,
    anchor_B: Tensor,
    room_B: Tensor,
    page_BN: Tensor,
    *,
    drafts: int,
    page_size: int,
    mask: int,
    longest: int,
) -> Block:
    """Lay `[anchor, mask × drafts]` behind each row's text.

    The block is as long as in `decode.passes.draft`, so the same drafts come out. vLLM reserves `drafts` positions
    behind what it verified; the block's last position is written only where the row's pages happen to have room for
    it, so no slot outside a row's own pages is ever written.

    Args:
        length_B: positions whose keys the AR view has written; the anchor stands at this position.
        room_B: positions that the row's pages hold; 0 writes nothing (padding).
        page_BN: page table; entries past the row's room may be anything.
        longest: positions of the longest text that is served.
    """
    ahead_K = torch.arange(drafts + 1, device=length_B.device)
    position_BK = length_B.long()[:, None] + ahead_K
    end_B = room_B.long().clamp(max=longest)
    page_BK = page_BN.long().gather(1, (position_BK // page_size).clamp(max=page_BN.shape[1] - 1))
    slot_BK = torch.where(position_BK < end_B[:, None], page_BK * page_size + position_BK % page_size, NO_SLOT)
    token_BK = torch.where(ahead_K == 0, anchor_B.long()[:, None], mask)
    seen_B = torch.minimum(length_B.long() + drafts + 1, end_B)
    return Block(token_BK, position_BK.clamp(max=longest - 1), slot_BK, seen_B)


def in_turn(
    logits_BMV: Tensor,
    anchor_B: Tensor,
    shift: Callable[[Tensor], Tensor],
    choose: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Choose each slot's draft in turn, its logits shifted by the token before it; returns `[B, M]`.

    `shift` takes tokens `[B]` to what they add to the logits after them, `[B, V]` (`orthrus.model.markov`); `choose` a
    slot's logits `[B, V]` and its number to drafts `[B]`.
    """
    before_B, drafts = anchor_B.long(), []
    for slot in range(logits_BMV.shape[1]):
        before_B = choose(logits_BMV[:, slot].float() + shift(before_B), slot).long()
        drafts.append(before_B)
    return torch.stack(drafts, dim=1)
