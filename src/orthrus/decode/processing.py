"""A row's own processing of logits: its processors, applied to every slot with that slot's text, and what it keeps.

Shapes: Q slots, N tokens kept, V vocabulary. A row with a processing of its own is chosen for alone.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from orthrus.decode.tree import Tree


class Kept(NamedTuple):
    """The backbone's logits that tokens were chosen by, and the same processed; float32, `[N, V]`."""

    logits_NV: Tensor
    scores_NV: Tensor


class _Lead(NamedTuple):
    """A token that a draft pass has given, what it was chosen by, and what a processor raised."""

    token_1: Tensor
    verified: tuple[Tensor, Tensor] | None
    error: Exception | None


class Processing:
    """Process one row's logits.

    Args:
        processors: what is applied to every slot, the warpers included; None where the options' own form is enough.
        text: the row's tokens, its prompt's first.
        keeps: whether `take` is asked for logits.
    """

    def __init__(
        self, processors: LogitsProcessorList | None, text: Callable[[], list[int]], *, keeps: bool = False
    ) -> None:
        self.processors = processors
        self.keeps = keeps
        self._text = text
        self._text_L: Tensor | None = None
        self._errors: dict[int, Exception] = {}
        self._verified: tuple[Tensor, Tensor] | None = None
        self._tree: Tree | None = None
        self._lead: _Lead | None = None
        self._over = False  # what was verified last has been taken, and so has the token that led it

    def __call__(self, logits_1QV: Tensor, paths: Sequence[Tensor], *, drafting: bool = False) -> Tensor:
        """Return the scores after the text and each slot's path, the tokens between the text and the slot.

        Where a processor raises there is no score (NaN): what it says of slots that are not reached does not matter,
        for theirs may be texts that plain decoding never writes. When drafting the logits do as they are.
        """
        assert self.processors is not None
        scores = logits_1QV.float().clone()
        text_L = self._ids(logits_1QV.device)
        if not drafting:
            self._errors.clear()
        for slot, path in enumerate(paths):
            try:
                processed_1V = self.processors(torch.cat([text_L, path])[None], scores[0, slot : slot + 1].clone())
                scores[0, slot] = processed_1V[0]
            except Exception as error:
                if not drafting:
                    self._errors[slot] = error
                    scores[0, slot] = math.nan
        return scores

    def lead(self, token_1: Tensor) -> None:
        """Go on after the one slot noted last, whose token this is: the next block stands behind it."""
        self._lead = _Lead(token_1, self._verified, self._errors.get(0))
        self._over = False

    def note(self, logits_1QV: Tensor, scores_1QV: Tensor, tree: Tree | None = None) -> None:
        """Remember a verified block, a chain or a tree, until its tokens are known."""
        self._lead = None if self._over else self._lead
        self._tree = tree
        self._verified = (logits_1QV[0], scores_1QV[0]) if self.keeps else None

    def error_after(self, tokens: Sequence[int]) -> Exception | None:
        """Return what a processor raised for the slot after some tokens of the verified block."""
        if self._lead is not None and not tokens:
            return self._lead.error
        return self._errors.get(self._slots(tokens[self._lead is not None :])[-1])

    def take(self, tokens: Sequence[int]) -> Kept | None:
        """Return the logits that the verified block's tokens were chosen by, in their order."""
        self._over = True
        if self._verified is None:
            return None
        lead = self._lead.verified if self._lead is not None and tokens else None
        behind = tokens[lead is not None :]
        logits_QV, scores_QV = self._verified
        self._verified = None
        index_N = torch.tensor(self._slots(behind)[: len(behind)], dtype=torch.long, device=logits_QV.device)
        logits_NV, scores_NV = logits_QV[index_N].float(), scores_QV[index_N]
        if lead is not None:
            logits_NV, scores_NV = torch.cat([lead[0].float(), logits_NV]), torch.cat([lead[1], scores_NV])
        return Kept(logits_NV, scores_NV)

    def _slots(self, tokens: Sequence[int]) -> list[int]:
        """Return the slot of each token, and the one after the last where the block has it."""
        if self._tree is None:
            return list(range(len(tokens) + 1))
        parents, nodes = self._tree.parent_BN[0].tolist(), self._tree.token_BN[0].tolist()
        children = {pair: node for node, pair in enumerate(zip(parents, nodes, strict=True), start=1)}
        slots = [0]
        for token in tokens:
            if (slots[-1], token) in children:
                slots.append(children[slots[-1], token])
        return slots

    def _ids(self, device: torch.device) -> Tensor:
        text = self._text()
        if self._text_L is None or len(self._text_L) != len(text):
            self._text_L = torch.tensor(text, device=device)
        if self._lead is None or self._over:
            return self._text_L
        return torch.cat([self._text_L, self._lead.token_1])


def chain(draft_M: Tensor) -> list[Tensor]:
    """Return the path to each slot of a chain and to the one after it: `M + 1` of them."""
    return [draft_M[:slot] for slot in range(len(draft_M) + 1)]


def branches(tree: Tree) -> list[Tensor]:
    """Return the path to each node of a row's tree, the root's first."""
    paths = [tree.token_BN.new_empty(0)]
    for node, parent in enumerate(tree.parent_BN[0].tolist()):
        paths.append(torch.cat([paths[parent], tree.token_BN[0, node : node + 1]]))
    return paths
