"""Draft trees over one draft pass: which nodes to verify, and which path the backbone agrees with.

The slots of a block are independent given the text, so any product of their likely tokens is a candidate; the most
probable ones are verified together, each seeing its own ancestors. A node's text decides what the backbone would
write after it (greedily, or with the noise of that position), so the accepted path is what plain decoding writes.
Pure functions of tensors: knows no model, no cache and no options.

Shapes: B rows, M draft slots, N nodes without the root, P = N + 1 nodes with it, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from orthrus.decode.accept import Verdict
from orthrus.model.markov import Markov

BRANCH = 8
"""Likeliest tokens of a slot that may become nodes."""

_LEAST = -30.0
_TOLL = 1e-3


class Tree(NamedTuple):
    """A draft tree for each row, the root (the anchor) first, parents before children.

    Attributes:
        token_BN: tokens of the nodes, the root left out.
        parent_BN: index of each node's parent among the P nodes.
        depth_BP: distance from the root.
        ancestor_BPP: `[b, i, j]` says that j lies on i's path from the root, i itself included.
    """

    token_BN: Tensor
    parent_BN: Tensor
    depth_BP: Tensor
    ancestor_BPP: Tensor

    def rows(self, index_B: Tensor) -> "Tree":
        """Return the trees of some of the rows."""
        return Tree(*(part[index_B] for part in self))


def largest(slots: int, vocabulary: int) -> int:
    """Return how many nodes a tree over so many slots can have (counted up to a bound no plan reaches)."""
    branch, total, level = min(BRANCH, vocabulary), 0, 1
    for _ in range(slots):
        level *= branch
        total += level
        if total > 1 << 20:
            break
    return total


def grow(score_BMV: Tensor, *, nodes: int, anchor_B: Tensor | None = None, markov: Markov | None = None) -> Tree:
    """Pick the `nodes` most probable paths of the slots' distributions, best first.

    A path is never more probable than its prefixes, so the best paths of all lengths form a tree. With `markov`, which
    needs the anchors, a slot's likeliest tokens are weighed anew after each token before them.
    """
    B, M, V = score_BMV.shape
    logp_BMK, token_BMK = score_BMV.log_softmax(-1).topk(min(BRANCH, V), dim=-1)
    path_BF = score_BMV.new_zeros(B, 1)
    before_BF = None if anchor_B is None else anchor_B[:, None]
    scores, tokens, parents = [], [], []
    for slot in range(min(M, nodes)):
        logp_BFK = logp_BMK[:, slot, None]
        if markov is not None and before_BF is not None:
            logp_BFK = _weighed(logp_BFK, markov.pairs(before_BF, token_BMK[:, slot]))
        # Each token costs something, even a certain one, and none costs so much that float32 loses this something in a
        # sum over the block (impossible ones would all cost the same): a path never ties with its prefix; parents are
        # first.
        wide = (path_BF[:, :, None] + (logp_BFK.clamp_min(_LEAST) - _TOLL)).flatten(1)
        path_BF, pick = wide.topk(min(nodes, wide.shape[1]), dim=1)
        before_BF = token_BMK[:, slot].gather(1, pick % logp_BMK.shape[2])
        tokens.append(before_BF)
        parents.append(pick // logp_BMK.shape[2])
        scores.append(path_BF)
    return _select(scores, tokens, parents, nodes)


def _weighed(logp_B1K: Tensor, shift_BFK: Tensor) -> Tensor:
    """Shift a slot's log-probabilities by each token before it; together its tokens stay as probable as they were."""
    return (logp_B1K + shift_BFK).log_softmax(-1) + logp_B1K.logsumexp(-1, keepdim=True)


def _select(scores: list[Tensor], tokens: list[Tensor], parents: list[Tensor], nodes: int) -> Tree:
    """Keep the best candidates of all levels and number them level by level."""
    widths = [level.shape[1] for level in scores]
    start = [sum(widths[:i]) for i in range(len(widths))]
    device = scores[0].device
    # Filled where they are: a copy of the widths from the host would wait for the draft pass.
    level_C = torch.cat([torch.full((width,), level, device=device) for level, width in enumerate(widths)])
    # Parents as numbers among all candidates; those of the first level are the root, before every candidate.
    parent_BC = torch.cat([p + (start[i - 1] if i else -1) for i, p in enumerate(parents)], dim=1)
    kept_BN = torch.cat(scores, dim=1).topk(nodes, dim=1).indices.sort(dim=1).values
    B = kept_BN.shape[0]
    place_BC = torch.zeros_like(parent_BC).scatter(1, kept_BN, torch.arange(1, nodes + 1, device=device).expand(B, -1))
    old_BN = parent_BC.gather(1, kept_BN)
    parent_BN = torch.where(level_C[kept_BN] == 0, 0, place_BC.gather(1, old_BN.clamp_min(0)))
    depth_BP = torch.nn.functional.pad(level_C[kept_BN] + 1, (1, 0))
    token_BN = torch.cat(tokens, dim=1).gather(1, kept_BN)
    return Tree(token_BN, parent_BN, depth_BP, ancestors(parent_BN, depth=len(widths)))


def ancestors(parent_BN: Tensor, *, depth: int) -> Tensor:
    """Return `[B, P, P]`: whether node j lies on node i's path from the root, itself included."""
    B, N = parent_BN.shape
    own = torch.eye(N + 1, dtype=torch.bool, device=parent_BN.device).expand(B, -1, -1)
    up_BP = torch.nn.functional.pad(parent_BN, (1, 0))
    found = own
    for _ in range(depth):
        found = own | found.gather(1, up_BP[:, :, None].expand(-1, -1, N + 1))
    return found


class Path(NamedTuple):
    """The accepted path: its verdict, and the nodes it runs through (`[B, M]`, padded by the node's own place)."""

    verdict: Verdict
    node_BM: Tensor


def walk(tree: Tree, choice_BP: Tensor, *, slots: int) -> Path:
    """Follow the backbone's own choices down the tree as far as they are nodes of it.

    Args:
        tree: what was verified.
        choice_BP: what the backbone writes after each node.
        slots: M, the length of the longest path.
    """
    P = choice_BP.shape[1]
    meets_BN = tree.token_BN == choice_BP.gather(1, tree.parent_BN)
    meets_BP = torch.nn.functional.pad(meets_BN, (1, 0), value=True)
    whole_BP = (meets_BP[:, None] | ~tree.ancestor_BPP).all(2)
    last_B = (tree.depth_BP * whole_BP).argmax(1)
    accepted_B = tree.depth_BP.gather(1, last_B[:, None])[:, 0]
    on_path_BP = tree.ancestor_BPP.gather(1, last_B[:, None, None].expand(-1, 1, P))[:, 0]
    place_P = torch.arange(P, device=choice_BP.device)
    order_BP = torch.where(on_path_BP, place_P, P).sort(dim=1).values
    order_BP = torch.nn.functional.pad(order_BP, (0, max(0, slots + 1 - P)), value=P)[:, 1 : slots + 1]
    index_M = torch.arange(1, slots + 1, device=choice_BP.device)
    inside_BM = index_M <= accepted_B[:, None]
    node_BM = torch.where(inside_BM, order_BP, index_M)
    drafted_BM = tree.token_BN.gather(1, (node_BM - 1).clamp_max(P - 2))
    bonus_B1 = choice_BP.gather(1, last_B[:, None])
    tokens_BM1 = torch.nn.functional.pad(drafted_BM, (0, 1)).scatter(1, accepted_B[:, None], bonus_B1)
    return Path(Verdict(tokens_BM1, accepted_B), node_BM)
