"""EAGLE-3 in the engine: chains with one pass of the layer per draft, and trees grown level by level.

Two further layers of the engine's cache hold the backbone's features and the drafter's keys. An entry's keys depend
only on its token and the previous feature, so keys of accepted tokens need no attention.

Shapes: B rows, W entries to catch up with, Q nodes of a level, S slots, H hidden size, V vocabulary, M drafts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from orthrus.checkpoints.load import locate
from orthrus.decode.drafters import TreeDrafter
from orthrus.decode.passes import Passes, Proposal
from orthrus.decode.rows import Row
from orthrus.decode.tree import Candidates, Tree, tolled
from orthrus.kernels import masks
from orthrus.model.attach import layers_of
from orthrus.model.cache import ScratchCache
from orthrus.peers import eagle3_model
from orthrus.peers.eagle3_model import Eagle3
from orthrus.peers.serial import Reader, unread

TOP = 10
"""Nodes of a level that are expanded, and children of each (EAGLE-2, arXiv 2406.16858)."""


class Level(NamedTuple):
    """Entries of the latest pass: outputs of the layer, logits, and the slots that each entry sees."""

    output_BQH: Tensor
    logits_BQV: Tensor
    seen_BQS: Tensor


class Eagle3Drafter(TreeDrafter):
    """Draft for one backbone with one EAGLE-3 layer."""

    name = "eagle3"

    def __init__(self, model: PreTrainedModel, drafter: Eagle3) -> None:
        self.drafter = drafter
        self.taps = drafter.config.taps
        self.proposals = drafter.config.drafts
        self._embed = model.get_input_embeddings()
        self._head, self._vocabulary = eagle3_model.head_of(model)
        self._features = len(layers_of(model))
        self._keys = self._features + 1

    def reset(self, row: Row) -> Reader:
        """Return the state of a new row, for which the layer has no keys yet."""
        return Reader(row)

    def read(self, cache: ScratchCache, hidden: Sequence[Tensor]) -> None:
        """Keep the fused features of a pass."""
        feature_B1QH = self.drafter.fuse(hidden)[:, None]
        cache.update(feature_B1QH, feature_B1QH[..., :1], self._features)  # a store needs values too: one number

    def propose(self, passes: Passes, rows: slice, anchor_B: Tensor, drafts: int, states: Sequence[Reader]) -> Proposal:
        """Return logits of a chain, each draft the likeliest token after those before it."""
        cache = passes.cache
        level, slot_B1 = self._begin(cache, rows, states, room=drafts)
        out = [level.logits_BQV]
        for _ in range(1, drafts):
            slot_B1 = slot_B1 + 1
            token_B1 = out[-1].argmax(-1)
            level = self._run(cache, rows, token_B1, level.output_BQH, slot_B1, slot_B1, level.seen_BQS)
            out.append(level.logits_BQV)
        return Proposal(torch.cat(out, dim=1), passes=drafts)

    def grow(
        self, passes: Passes, rows: slice, anchor_B: Tensor, drafts: int, nodes: int, states: Sequence[Reader]
    ) -> tuple[Tree, int]:
        """Return a tree of the `nodes` likeliest paths that a beam search visits, and the number of passes."""
        cache = passes.cache
        # Keys of the beam stand in the slots that the tree's own will take.
        wide = max(1, min(TOP, self._vocabulary, nodes // max(1, drafts - 1)))
        level, root_B1 = self._begin(cache, rows, states, room=1 + wide * (drafts - 1))
        B, span = len(root_B1), level.seen_BQS.shape[2]
        candidates = Candidates(B, root_B1.device)
        path_BQ, node_BQ = level.output_BQH.new_zeros(B, 1, dtype=torch.float32), root_B1.new_zeros(B, 1)
        for depth in range(1, drafts + 1):
            best = level.logits_BQV.float().log_softmax(-1).topk(wide, dim=-1)
            score_BC = (path_BQ[:, :, None] + tolled(best.values)).flatten(1)
            token_BC = best.indices.flatten(1)
            node_BC = candidates.add(token_BC, score_BC, node_BQ.repeat_interleave(wide, dim=1))
            if depth == drafts:
                break
            path_BQ, pick_BQ = score_BC.topk(wide, dim=1)
            pick_BQ, order_BQ = pick_BQ.sort(dim=1)
            path_BQ, node_BQ, parent_BQ = path_BQ.gather(1, order_BQ), node_BC.gather(1, pick_BQ), pick_BQ // wide
            slot_BQ = root_B1 + 1 + (depth - 1) * wide + torch.arange(wide, device=root_B1.device)
            output_BQH = level.output_BQH.gather(1, parent_BQ[:, :, None].expand(-1, -1, level.output_BQH.shape[2]))
            seen_BQS = level.seen_BQS.gather(1, parent_BQ[:, :, None].expand(-1, -1, span))
            position_BQ = (root_B1 + depth).expand_as(slot_BQ)
            level = self._run(cache, rows, token_BC.gather(1, pick_BQ), output_BQH, slot_BQ, position_BQ, seen_BQS)
        return candidates.best(nodes), drafts

    def _begin(self, cache: ScratchCache, rows: slice, states: Sequence[Reader], *, room: int) -> tuple[Level, Tensor]:
        """Write the entries of accepted tokens and run the anchor's; returns its level and slot."""
        window = unread(cache, rows, states)
        slot_BW = window.slot_BW
        feature_BSH = cache.stores[self._features].keys[rows, :, 0]
        before_BW = (slot_BW - 1).clamp_min(0)
        feature_BWH = feature_BSH.gather(1, before_BW[:, :, None].expand(-1, -1, feature_BSH.shape[2]))
        feature_BWH = feature_BWH * (slot_BW > 0)[:, :, None]  # nothing is before a text's first token
        joined_BWE = self.drafter.join(self._embed(window.token_BW), feature_BWH)
        span = max(cache.lengths[rows]) + room
        cache.begin(rows, slot_BW, end=span)
        key, value = cache.update(*self.drafter.keys(joined_BWE, slot_BW), self._keys)
        last = slice(slot_BW.shape[1] - 1, None)
        anchor_B1 = slot_BW[:, last]
        # The first token's entry has no feature, so only that entry itself sees it.
        seen_B1S = masks.up_to(anchor_B1, span=span)
        seen_B1S[:, :, 0] &= anchor_B1 == 0
        output_B1H = self.drafter.attend(joined_BWE[:, last], feature_BWH[:, last], anchor_B1, key, value, seen_B1S)
        return self._level(output_B1H, seen_B1S), anchor_B1

    def _run(
        self,
        cache: ScratchCache,
        rows: slice,
        token_BQ: Tensor,
        feature_BQH: Tensor,
        slot_BQ: Tensor,
        position_BQ: Tensor,
        seen_BQS: Tensor,
    ) -> Level:
        """Run entries of drafts, which see themselves and all that their parents saw."""
        joined_BQE = self.drafter.join(self._embed(token_BQ), feature_BQH)
        cache.begin(rows, slot_BQ, end=seen_BQS.shape[2])
        key, value = cache.update(*self.drafter.keys(joined_BQE, position_BQ), self._keys)
        seen_BQS = seen_BQS.scatter(2, slot_BQ[:, :, None], True)
        output_BQH = self.drafter.attend(joined_BQE, feature_BQH, position_BQ, key, value, seen_BQS)
        return self._level(output_BQH, seen_BQS)

    def _level(self, output_BQH: Tensor, seen_BQS: Tensor) -> Level:
        return Level(output_BQH, self.drafter.logits(output_BQH, self._head, self._vocabulary), seen_BQS)


def load(source: str, model: PreTrainedModel) -> Eagle3Drafter:
    """Load a drafter of a dual-view model from a directory or the Hub.

    Raises CheckpointError: nothing there, or no drafter of this backbone.
    """
    return Eagle3Drafter(model, eagle3_model.load(Path(locate(source)), model))
