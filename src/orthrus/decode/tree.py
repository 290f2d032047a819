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

BRANCH = 16
"""Likeliest tokens of a slot that may become nodes."""


class Tree(NamedTuple):
    """A draft tree for each row, the root (the anchor) first, parents before children.

    Attributes:
        token_BN: tokens of the nodes, the root left out.
        parent_BN: index of each node's parent among the P nodes.
        depth_BP: distance from the root.
        ancestor_BPP: `[b, i, j]` says that j lies on i's path from the root, i itself included.
        likely_BN: how probable each node's path is, by the drafts.
    """

    token_BN: Tensor
    parent_BN: Tensor
    depth_BP: Tensor
    ancestor_BPP: Tensor
    likely_BN: Tensor

    def rows(self, index_B: Tensor) -> "Tree":
        """Return the trees of some of the rows."""
        return Tree(*(part[index_B] for part in self))


def largest(slots: int, vocabulary: int) -> int:
    """Return how many nodes a tree over so many slots can have."""
    return sum(min(BRANCH, vocabulary) ** depth for depth in range(1, slots + 1))


def grow(score_BMV: Tensor, *, nodes: int, anchor_B: Tensor | None = None, markov: Markov | None = None) -> Tree:
    """Pick the `nodes` most probable paths of the slots' distributions, best first.

    A path is never more probable than its prefixes, so the best paths of all lengths form a tree. With `markov`, which
    needs the anchors, a slot's likeliest tokens, by themselves or after those that would be chosen before them, are
    weighed anew after each token before them.
    """
    B, M, V = score_BMV.shape
    K = min(BRANCH, V)
    logp_BMV = score_BMV.log_softmax(-1)
    if markov is None or anchor_B is None:
        logp_BMK, token_BMK = logp_BMV.topk(K, dim=-1)
        step_BMKK = logp_BMK[:, :, None].expand(B, M, K, K)  # the same after each of the tokens before
    else:
        after_BMV = markov.likeliest(score_BMV, anchor_B)[1].log_softmax(-1)
        token_BMK = torch.maximum(logp_BMV, after_BMV).topk(K, dim=-1).indices
        before_BMK = torch.cat([anchor_B[:, None, None].expand(B, 1, K), token_BMK[:, :-1]], dim=1)
        shifted_BMKK = logp_BMV.gather(2, token_BMK)[:, :, None] + markov.pairs(before_BMK, token_BMK)
        # Of a slot these tokens have what they have after the likeliest ones before it, whichever was before.
        share_BM1 = after_BMV.gather(2, token_BMK).logsumexp(-1, keepdim=True)
        step_BMKK = shifted_BMKK.log_softmax(-1) + share_BM1[..., None]
    step_BMKK = tolled(step_BMKK)
    candidates = Candidates(B, token_BMK.device)
    path_BF, last_BF, node_BF = score_BMV.new_zeros(B, 1), token_BMK.new_zeros(B, 1), token_BMK.new_zeros(B, 1)
    for slot in range(min(M, nodes)):
        step_BFK = step_BMKK[:, slot].gather(1, last_BF[:, :, None].expand(-1, -1, K))
        wide = (path_BF[:, :, None] + step_BFK).flatten(1)
        path_BF, pick_BF = wide.topk(min(nodes, wide.shape[1]), dim=1)
        last_BF, parent_BF = pick_BF % K, node_BF.gather(1, pick_BF // K)
        node_BF = candidates.add(token_BMK[:, slot].gather(1, last_BF), path_BF, parent_BF)
    return candidates.best(nodes)


class Candidates:
    """Nodes that a tree may have, level by level, numbered from 1 on; 0 is the root."""

    def __init__(self, rows: int, device: torch.device) -> None:
        none_B0 = torch.zeros(rows, 0, dtype=torch.long, device=device)
        self._tokens, self._parents, self._depths = [none_B0], [none_B0], [none_B0]
        self._scores = [none_B0.float()]
        self._count = 0

    def add(self, token_BC: Tensor, score_BC: Tensor, parent_BC: Tensor) -> Tensor:
        """Add a level, below the nodes of these numbers; returns its own numbers, `[B, C]`."""
        self._tokens.append(token_BC)
        self._scores.append(score_BC)
        self._parents.append(parent_BC)
        self._depths.append(torch.full_like(token_BC, len(self._depths)))
        first, self._count = self._count + 1, self._count + token_BC.shape[1]
        return torch.arange(first, self._count + 1, device=token_BC.device).expand_as(token_BC)

    def best(self, nodes: int) -> Tree:
        """Keep the likeliest nodes, whose parents are always among them, and number them anew."""
        score_BC = torch.cat(self._scores, dim=1)
        nodes = min(nodes, self._count)
        kept_BN = score_BC.topk(nodes, dim=1).indices.sort(dim=1).values
        token_BN, depth_BN, old_BN = (
            torch.cat(parts, dim=1).gather(1, kept_BN) for parts in (self._tokens, self._depths, self._parents)
        )
        number_BN = torch.arange(1, nodes + 1, device=kept_BN.device).expand_as(kept_BN)
        number_BP = torch.zeros(len(kept_BN), self._count + 1, dtype=torch.long, device=kept_BN.device)
        parent_BN = number_BP.scatter(1, kept_BN + 1, number_BN).gather(1, old_BN)
        return Tree(
            token_BN,
            parent_BN,
            torch.nn.functional.pad(depth_BN, (1, 0)),
            ancestors(parent_BN, depth=len(self._depths) - 1),
            score_BC.gather(1, kept_BN).exp(),
        )


def tolled(logp: Tensor) -> Tensor:
    """Return logarithms of probabilities that make a path less probable than its prefix, so that parents come first.

    Each token costs something, even a certain one, and none costs so much that float32 loses this something in a sum
    over the block (impossible ones would all cost the same).
    """
    return logp.clamp_min(-30.0) - 1e-3


def likely_ends(tree: Tree, stops: int) -> Tensor:
    """Return the nodes after which the backbone likeliest leaves the tree, `[B, S]`, if the drafts are right about it.

    The chance to leave at a node is that of its path, less that of the paths through its children.
    """
    reach_BP = torch.nn.functional.pad(tree.likely_BN, (1, 0), value=1.0)
    leave_BP = reach_BP.scatter_add(1, tree.parent_BN, -tree.likely_BN)
    return leave_BP.topk(min(stops, reach_BP.shape[1]), dim=1).indices


def ancestors(parent_BN: Tensor, *, depth: int) -> Tensor:
    """Return `[B, P, P]`: whether node j lies on node i's path from the root, itself included."""
    P = parent_BN.shape[1] + 1
    self_PP = torch.eye(P, device=parent_BN.device)
    up_BP = torch.nn.functional.pad(parent_BN, (1, 0))
    path_BPP = self_PP + self_PP[up_BP]
    for _ in range((depth - 1).bit_length()):  # each round doubles how far up is seen
        path_BPP = (path_BPP @ path_BPP).clamp_max(1.0)
    return path_BPP > 0


class Path(NamedTuple):
    """The accepted path.

    Attributes:
        verdict: its tokens and their number.
        last_B: the node it ends at.
        node_BM: the nodes it runs through, padded by the node's own place.
        chain_B2: of the chain inside the tree, each node the likeliest after the one before, how many nodes are
            accepted and how many there are.
    """

    verdict: Verdict
    last_B: Tensor
    node_BM: Tensor
    chain_B2: Tensor


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
    node_P = torch.arange(P, device=choice_BP.device)
    order_BP = torch.where(on_path_BP, node_P, P).sort(dim=1).values
    order_BP = torch.nn.functional.pad(order_BP, (0, max(0, slots + 1 - P)), value=P)[:, 1 : slots + 1]
    index_M = torch.arange(1, slots + 1, device=choice_BP.device)
    inside_BM = index_M <= accepted_B[:, None]
    node_BM = torch.where(inside_BM, order_BP, index_M)
    drafted_BM = tree.token_BN.gather(1, (node_BM - 1).clamp_max(P - 2))
    bonus_B1 = choice_BP.gather(1, last_B[:, None])
    tokens_BM1 = torch.nn.functional.pad(drafted_BM, (0, 1)).scatter(1, accepted_B[:, None], bonus_B1)
    # Siblings are numbered by likelihood.
    earlier_NN = torch.ones(P - 1, P - 1, dtype=torch.bool, device=choice_BP.device).tril(-1)
    likeliest_BN = ~((tree.parent_BN[:, :, None] == tree.parent_BN[:, None]) & earlier_NN).any(2)
    likeliest_BP = torch.nn.functional.pad(likeliest_BN, (1, 0), value=True)
    chain_BP = (likeliest_BP[:, None] | ~tree.ancestor_BPP).all(2)
    chain_B2 = torch.stack([(tree.depth_BP * part).amax(1) for part in (chain_BP & whole_BP, chain_BP)], dim=1)
    return Path(Verdict(tokens_BM1, accepted_B), last_B, node_BM, chain_B2)
