"""One cycle for all rows at once: draft, verify, accept. Everything that decodes calls this and nothing else does it.

Knows passes and choosers; moves no length and ends no text (the engine does, once it has seen the tokens). The only
wait for the device is the transfer of the verdict.

Shapes: B rows, M drafts, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from orthrus.decode.accept import Verdict
from orthrus.decode.passes import Passes
from orthrus.decode.sampling import Chooser, Context, Drafts

Drafter = Callable[[Passes, slice, Tensor, int], Tensor]
"""Propose: (passes, rows, anchor_B, M) to draft logits `[B, M, V]`. The twin is `Passes.draft`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The live rows of a cycle.

    Attributes:
        rows: where they stand in the cache.
        anchor_B: last token of each row, whose keys are not written yet.
        context: noise streams, positions, tokens seen.
        groups: choosers and the rows each one serves; None for all of them.
    """

    rows: slice
    anchor_B: Tensor
    context: Context
    groups: list[tuple[Chooser, Tensor | None]]


def twin(passes: Passes, rows: slice, anchor_B: Tensor, drafts: int) -> Tensor:
    """Draft with the model's own diffusion view, in one pass."""
    return passes.draft(rows, anchor_B, drafts)


def cycle(passes: Passes, batch: Batch, *, drafts: int, drafter: Drafter = twin) -> list[list[int]]:
    """Advance every row by one cycle (or by one plain step when `drafts` is 0).

    Returns each row's new tokens: its accepted drafts and then the bonus token.
    """
    proposal = _propose(passes, batch, drafts, drafter)
    token_BM1 = torch.cat([batch.anchor_B[:, None], proposal.tokens_BM], dim=1)
    logits = passes.verify(batch.rows, token_BM1)
    verdict = _judge(batch, proposal, logits)
    return _to_host(verdict)


def _propose(passes: Passes, batch: Batch, drafts: int, drafter: Drafter) -> Drafts:
    if drafts == 0:
        return Drafts(batch.anchor_B.new_empty(batch.anchor_B.shape[0], 0), None)
    logits_BMV = drafter(passes, batch.rows, batch.anchor_B, drafts)
    parts = [
        (index, chooser.draft(_take(logits_BMV, index), _context(batch, index))) for chooser, index in batch.groups
    ]
    if len(parts) == 1:
        return parts[0][1]
    tokens = torch.empty(logits_BMV.shape[:2], dtype=torch.long, device=logits_BMV.device)
    scores = torch.empty(logits_BMV.shape, dtype=torch.float32, device=logits_BMV.device)
    for index, part in parts:
        tokens[index] = part.tokens_BM
        if part.scores_BMV is not None:
            scores[index] = part.scores_BMV
    return Drafts(tokens, scores)


def _judge(batch: Batch, proposal: Drafts, logits_BM1V: Tensor) -> Verdict:
    parts = []
    for chooser, index in batch.groups:
        rejects = chooser.sampling.do_sample and not chooser.coupled and proposal.scores_BMV is not None
        own = Drafts(
            _take(proposal.tokens_BM, index),
            _take(proposal.scores_BMV, index) if rejects and proposal.scores_BMV is not None else None,
        )
        parts.append((index, chooser.judge(own, _take(logits_BM1V, index), _context(batch, index))))
    if len(parts) == 1:
        return parts[0][1]
    tokens = torch.empty(logits_BM1V.shape[:2], dtype=torch.long, device=logits_BM1V.device)
    accepted = torch.empty(logits_BM1V.shape[0], dtype=torch.long, device=logits_BM1V.device)
    for index, part in parts:
        tokens[index], accepted[index] = part
    return Verdict(tokens, accepted)


def _take(value: Tensor, index: Tensor | None) -> Tensor:
    return value if index is None else value[index]


def _context(batch: Batch, index: Tensor | None) -> Context:
    return batch.context if index is None else batch.context.rows(index)


def _to_host(verdict: Verdict) -> list[list[int]]:
    """Fetch the verdict in one transfer."""
    packed = torch.cat([verdict.accepted_B[:, None], verdict.tokens_BM1], dim=1).tolist()
    return [row[1 : row[0] + 2] for row in packed]
