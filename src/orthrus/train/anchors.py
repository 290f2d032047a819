"""Where training blocks start, and which of their slots have something to predict.

An anchor is the last token a block may see; its slots predict the tokens after it. Blocks are anchored where the next
token belongs to an answer, the last prompt token included, as at decoding.

Shapes: T positions of a row, B rows, N blocks, J = K - 1 predicted slots.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Blocks(NamedTuple):
    """Blocks of one batch.

    Attributes:
        anchor_BN: index of each block's anchor in its row.
        valid_BN: False where a row had fewer places than blocks; such blocks train nothing.
        target_BNJ: index in the row of the token each slot predicts (within the row even where not scored).
        scored_BNJ: whether the slot has a token of the same answer to predict.
        blind_BN: whether the anchor is masked too (the block does not know the token it follows).
        shown_BN: how many tokens after the anchor the block is shown, as a second denoising step is; slots that would
            predict them are not scored.
    """

    anchor_BN: Tensor
    valid_BN: Tensor
    target_BNJ: Tensor
    scored_BNJ: Tensor
    blind_BN: Tensor
    shown_BN: Tensor


def sample(
    document_BT: Tensor,
    answer_BT: Tensor,
    *,
    blocks: int,
    block_length: int,
    blind_share: float,
    shown_share: float = 0.0,
    inside: bool = False,
    generators: Sequence[torch.Generator],
) -> Blocks:
    """Draw distinct anchors for each row, uniformly over the places where a block can start, in ascending order.

    `inside` keeps to anchors that belong to an answer themselves: a block behind the backbone's row is never anchored
    at the prompt's last token, which that row reads. Each row draws from its own generator.
    """
    device = document_BT.device
    draws_BT = torch.stack([torch.rand(document_BT.shape[1], generator=g) for g in generators]).to(device)
    blind_BN = torch.stack([torch.rand(blocks, generator=g) < blind_share for g in generators]).to(device)
    shown_BN = torch.zeros_like(blind_BN, dtype=torch.long)
    if shown_share > 0:
        draws = [torch.rand(2, blocks, generator=g) for g in generators]
        count_BN = torch.stack([1 + (draw[0] * (block_length - 2)).long() for draw in draws]).to(device)
        shown_BN = count_BN * torch.stack([draw[1] < shown_share for draw in draws]).to(device) * ~blind_BN
    starts_BT = starts(document_BT, answer_BT)
    key_BT = torch.where(starts_BT & answer_BT if inside else starts_BT, draws_BT, draws_BT - 2)
    count = min(blocks, document_BT.shape[1])
    best = key_BT.topk(count, dim=1)
    ordered = best.indices.sort(dim=1)  # neighbours see much the same keys, which attention reads once for them
    pad = (0, blocks - count)
    anchor_BN = torch.nn.functional.pad(ordered.values, pad)
    valid_BN = torch.nn.functional.pad((best.values >= 0).gather(1, ordered.indices), pad, value=False)
    target_BNJ, scored_BNJ = targets(document_BT, answer_BT, anchor_BN, slots=block_length - 1)
    hidden_BNJ = torch.arange(block_length - 1, device=device) >= shown_BN[:, :, None]
    scored_BNJ = scored_BNJ & valid_BN[:, :, None] & hidden_BNJ
    return Blocks(anchor_BN, valid_BN, target_BNJ, scored_BNJ, blind_BN, shown_BN)


def starts(document_BT: Tensor, answer_BT: Tensor) -> Tensor:
    """Say where a block can start: the next token is an answer's, in the same document; `[B, T]` boolean."""
    follows = torch.zeros_like(answer_BT)
    follows[:, :-1] = answer_BT[:, 1:] & (document_BT[:, 1:] == document_BT[:, :-1]) & (document_BT[:, 1:] >= 0)
    return follows


def targets(document_BT: Tensor, answer_BT: Tensor, anchor_BN: Tensor, *, slots: int) -> tuple[Tensor, Tensor]:
    """Return what each slot predicts and whether it counts: both `[B, N, J]`.

    Slot j predicts the token j + 1 places after the anchor; it counts as long as every token up to there belongs to
    the same answer of the same document.
    """
    T = document_BT.shape[1]
    index_BNJ = anchor_BN[:, :, None] + torch.arange(1, slots + 1, device=anchor_BN.device)
    inside = index_BNJ < T
    target_BNJ = index_BNJ.clamp_max(T - 1)
    flat = target_BNJ.flatten(1)
    answers = answer_BT.gather(1, flat).view_as(target_BNJ)
    same = document_BT.gather(1, flat).view_as(target_BNJ) == document_BT.gather(1, anchor_BN)[:, :, None]
    return target_BNJ, (inside & answers & same).long().cumprod(2).bool()
