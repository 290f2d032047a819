"""One cycle for all rows at once: draft, verify, accept. Everything that decodes calls this and nothing else does it.

A step says whether the drafts form a chain or a tree or are copied, and whether the verify pass drafts the next block
too. Knows passes and choosers; ends no text (the engine does, once it has seen the tokens). The only wait for the
device is the transfer of the verdict.

Shapes: B rows, M drafts, S stops, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orthrus.decode import tree
from orthrus.decode.accept import Verdict, sound
from orthrus.decode.drafters import Drafter
from orthrus.decode.passes import Branches, Passes
from orthrus.decode.sampling import Chooser, Context, Drafts
from orthrus.model.markov import Before, Markov
from orthrus.policy.steps import Step


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The live rows of a cycle.

    Attributes:
        rows: where they stand in the cache.
        anchor_B: last token of each row, whose keys are not written yet.
        context: noise streams, positions, tokens seen.
        groups: choosers and the rows each one serves; None for all of them.
        drawing: the rows that a draft pass is needed for, as the batch numbers them.
        ready_BMV: draft logits that the pass before has made already, of the rows outside `drawing`.
        copied_BM: drafts that each row's own text supplies, and
        copying_B: the rows that take them; None for all of them.
        states: what the drafter keeps of each row.
    """

    rows: slice
    anchor_B: Tensor
    context: Context
    groups: list[tuple[Chooser, Tensor | None]]
    drawing: slice
    ready_BMV: Tensor | None = None
    copied_BM: Tensor | None = None
    copying_B: Tensor | None = None
    states: Sequence[Any] = ()


class Outcome(NamedTuple):
    """What a cycle decided.

    Attributes:
        tokens: each row's new tokens, the accepted drafts and then the bonus.
        broken: whether the row cannot go on after them: its logits are no numbers, and there is no bonus.
        forwards: passes of the backbone it took.
        ready_BMV: draft logits for the next cycle, from a fused pass; None otherwise.
        ranks: for each row, at which of the fused pass' stops, in their order, acceptance stopped; their number where
            it was none of them.
        inside: for each row, how many drafts of the chain inside its tree are kept, and how many there are.
    """

    tokens: list[list[int]]
    broken: list[bool]
    forwards: int
    ready_BMV: Tensor | None = None
    ranks: list[int] | None = None
    inside: list[tuple[int, int]] | None = None


def cycle(passes: Passes, batch: Batch, step: Step, *, drafter: Drafter) -> Outcome:
    """Advance every row by one step and commit what it keeps."""
    if step.kind == "plain":
        return Outcome(*_plain(passes, batch), 1)
    if batch.copied_BM is not None and batch.copying_B is None:
        return Outcome(*_commit(passes, batch, _verify(passes, batch, Drafts(batch.copied_BM, None))), 1)
    logits_BMV, drew = _proposals(passes, batch, step, drafter)
    if step.nodes:
        return _tree(passes, batch, logits_BMV, step, drew, drafter.markov)
    drafts = _draft(batch, logits_BMV, drafter.markov, weigh=step.kind == "onepass")
    if batch.copied_BM is not None and batch.copying_B is not None:
        copied_BM = torch.where(batch.copying_B[:, None], batch.copied_BM, drafts.tokens_BM)
        drafts = Drafts(copied_BM, drafts.scores_BMV, drafts.likely_BM)
    if step.kind == "onepass":
        return _onepass(passes, batch, drafts, step, drew)
    return Outcome(*_commit(passes, batch, _verify(passes, batch, drafts)), drew + 1)


def _proposals(passes: Passes, batch: Batch, step: Step, drafter: Drafter) -> tuple[Tensor, int]:
    """Return draft logits `[B, M, V]`, by a pass over the rows that need one, and how many passes that took."""
    start, stop = batch.drawing.start, batch.drawing.stop
    if start == stop and batch.ready_BMV is not None:
        return batch.ready_BMV, 0
    rows = slice(batch.rows.start + start, batch.rows.start + stop)
    anchor_B, states = batch.anchor_B[batch.drawing], batch.states[batch.drawing]
    drawn = drafter.propose(passes, rows, anchor_B, step.drafts, states)[:, : step.drafts]
    if stop - start == len(batch.anchor_B):
        return drawn, 1
    ready = drawn.new_zeros(len(batch.anchor_B), *drawn.shape[1:]) if batch.ready_BMV is None else batch.ready_BMV
    return torch.cat([ready[:start], drawn, ready[stop:]]), 1


def _plain(passes: Passes, batch: Batch) -> tuple[list[list[int]], list[bool]]:
    """Write each row's next token; there is nothing to accept."""
    none_B0 = batch.anchor_B.new_empty(len(batch.anchor_B), 0)
    return _commit(passes, batch, _verify(passes, batch, Drafts(none_B0, None)))


def _verify(passes: Passes, batch: Batch, drafts: Drafts) -> Verdict:
    token_BM1 = torch.cat([batch.anchor_B[:, None], drafts.tokens_BM], dim=1)
    return _judge(batch, drafts, passes.verify(batch.rows, token_BM1))


def _onepass(passes: Passes, batch: Batch, drafts: Drafts, step: Step, drew: int) -> Outcome:
    """Verify this block and draft the next for the likeliest places where acceptance may stop."""
    token_BM1 = torch.cat([batch.anchor_B[:, None], drafts.tokens_BM], dim=1)
    stop_BS = likely_stops(drafts.confidence_BM, step.stops)
    logits_BM1V, ahead_BSMV = passes.fused(batch.rows, token_BM1, stop_BS, step.drafts)
    verdict = _judge(batch, drafts, logits_BM1V)
    rank_B, ready_BMV = _met(stop_BS, verdict.accepted_B, ahead_BSMV)
    tokens, broken, ranks = _to_host(verdict, rank_B[:, None])
    passes.cache.commit(batch.rows, [len(t) for t in tokens])
    return Outcome(tokens, broken, drew + 1, ready_BMV, [rank for (rank,) in ranks])


def likely_stops(confidence_BM: Tensor, stops: int) -> Tensor:
    """Return the likeliest numbers of accepted drafts, `[B, S]`, if each draft is kept as surely as it was proposed."""
    reach_BM1 = torch.nn.functional.pad(confidence_BM, (1, 0), value=1.0).cumprod(1)
    leave_BM1 = 1 - torch.nn.functional.pad(confidence_BM, (0, 1), value=0.0)
    return (reach_BM1 * leave_BM1).topk(min(stops, reach_BM1.shape[1]), dim=1).indices


def _met(stop_BS: Tensor, stop_B: Tensor, ahead_BSMV: Tensor) -> tuple[Tensor, Tensor]:
    """Return at which of its stops each row stopped, S for none of them, and what was drafted for that place."""
    here_BS = stop_BS == stop_B[:, None]
    place_B = here_BS.long().argmax(1)
    ready_BMV = ahead_BSMV[torch.arange(len(stop_BS), device=stop_BS.device), place_B]
    return place_B.where(here_BS.any(1), stop_BS.shape[1]), ready_BMV


def _tree(passes: Passes, batch: Batch, logits_BMV: Tensor, step: Step, drew: int, markov: Markov | None) -> Outcome:
    """Verify a tree of drafts, and move the accepted path's keys to where they belong.

    With stops the same pass drafts the next block for the nodes after which the backbone likeliest leaves the tree.
    """
    slots = logits_BMV.shape[1]
    scores = _grouped(batch, lambda chooser, index: chooser.branch(_take(logits_BMV, index), _context(batch, index)))
    nodes = min(step.nodes, tree.largest(slots, logits_BMV.shape[2]))
    grown = tree.grow(scores, nodes=nodes, anchor_B=batch.anchor_B, markov=markov)
    token_BP = torch.cat([batch.anchor_B[:, None], grown.token_BN], dim=1)
    branches, stop_BS, ahead_BSMV = Branches(grown.depth_BP, grown.ancestor_BPP), None, None
    if step.stops:
        stop_BS = tree.likely_ends(grown, step.stops)
        logits_BPV, ahead_BSMV = passes.fused(batch.rows, token_BP, stop_BS, slots, branches)
    else:
        logits_BPV = passes.verify_tree(batch.rows, token_BP, branches)
    choice_BP = _grouped(
        batch,
        lambda chooser, index: chooser.choices(
            _take(logits_BPV, index), _context(batch, index), grown if index is None else grown.rows(index)
        ),
    )
    path = tree.walk(grown, choice_BP, slots=slots)
    verdict = sound(path.verdict)
    if passes.geometry is not None:
        # Siblings between a path's keys change the order of sums; a plain verify pass of the path settles its bits.
        drafts = Drafts(path.verdict.tokens_BM1[:, :-1].clamp_min(0), None)
        return Outcome(*_commit(passes, batch, _verify(passes, batch, drafts)), drew + 2)
    length_B1 = passes.cache.length_R[batch.rows, None]
    target_BM = length_B1 + torch.arange(1, slots + 1, device=length_B1.device)
    moved = slice(0, min(slots, grown.token_BN.shape[1]))
    passes.move_slots(batch.rows, (length_B1 + path.node_BM)[:, moved], target_BM[:, moved])
    if stop_BS is None or ahead_BSMV is None:
        tokens, broken, inside = _to_host(verdict, path.chain_B2)
        ranks = ready_BMV = None
    else:
        rank_B, ready_BMV = _met(stop_BS, path.last_B, ahead_BSMV)
        tokens, broken, numbers = _to_host(verdict, torch.cat([path.chain_B2, rank_B[:, None]], dim=1))
        inside, ranks = [row[:2] for row in numbers], [row[2] for row in numbers]
    passes.cache.commit(batch.rows, [len(t) for t in tokens])
    return Outcome(tokens, broken, drew + 1, ready_BMV, ranks, [(kept, length) for kept, length in inside])


def _draft(batch: Batch, logits_BMV: Tensor, markov: Markov | None, *, weigh: bool = True) -> Drafts:
    def of(chooser: Chooser, index: Tensor | None) -> Drafts:
        before = None if markov is None else Before(_take(batch.anchor_B, index), markov)
        return chooser.draft(_take(logits_BMV, index), _context(batch, index), before, weigh=weigh)

    parts = [(index, of(chooser, index)) for chooser, index in batch.groups]
    if len(parts) == 1:
        return parts[0][1]
    tokens = torch.empty(logits_BMV.shape[:2], dtype=torch.long, device=logits_BMV.device)
    scores = torch.empty(logits_BMV.shape, dtype=torch.float32, device=logits_BMV.device)
    confidence = torch.empty(logits_BMV.shape[:2], dtype=torch.float32, device=logits_BMV.device)
    for index, part in parts:
        tokens[index], confidence[index] = part.tokens_BM, part.confidence_BM
        if part.scores_BMV is not None:
            scores[index] = part.scores_BMV
    return Drafts(tokens, scores, confidence)


def _judge(batch: Batch, drafts: Drafts, logits_BM1V: Tensor) -> Verdict:
    def of(chooser: Chooser, index: Tensor | None) -> Tensor:
        rejects = chooser.sampling.do_sample and not chooser.coupled and drafts.scores_BMV is not None
        scores = _take(drafts.scores_BMV, index) if rejects and drafts.scores_BMV is not None else None
        own = Drafts(_take(drafts.tokens_BM, index), scores)
        verdict = chooser.judge(own, _take(logits_BM1V, index), _context(batch, index))
        return torch.cat([verdict.tokens_BM1, verdict.accepted_B[:, None]], dim=1)

    packed = _grouped(batch, of)
    return sound(Verdict(packed[:, :-1], packed[:, -1]))


def _grouped(batch: Batch, of: Callable[[Chooser, Tensor | None], Tensor]) -> Tensor:
    """Compute a per-row tensor with each group's own chooser."""
    parts = [(index, of(chooser, index)) for chooser, index in batch.groups]
    if len(parts) == 1:
        return parts[0][1]
    out = parts[0][1].new_empty(len(batch.anchor_B), *parts[0][1].shape[1:])
    for index, part in parts:
        out[index] = part
    return out


def _take(value: Tensor, index: Tensor | None) -> Tensor:
    return value if index is None else value[index]


def _context(batch: Batch, index: Tensor | None) -> Context:
    return batch.context if index is None else batch.context.rows(index)


def _commit(passes: Passes, batch: Batch, verdict: Verdict) -> tuple[list[list[int]], list[bool]]:
    tokens, broken, _ = _to_host(verdict)
    passes.cache.commit(batch.rows, [len(t) for t in tokens])
    return tokens, broken


def _to_host(verdict: Verdict, number_BN: Tensor | None = None) -> tuple[list[list[int]], list[bool], list[list[int]]]:
    """Fetch the verdict (tokens, and whether the row is broken) and some more numbers per row, in one transfer."""
    numbers = [] if number_BN is None else [number_BN]
    more = 1 + sum(part.shape[1] for part in numbers)
    packed = torch.cat([verdict.accepted_B[:, None], *numbers, verdict.tokens_BM1], dim=1).tolist()
    counts = [row[0] + 1 if row[0] >= 0 else -1 - row[0] for row in packed]
    tokens = [row[more : more + count] for row, count in zip(packed, counts, strict=True)]
    return tokens, [row[0] < 0 for row in packed], [row[1:more] for row in packed]
