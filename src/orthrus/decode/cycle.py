"""One cycle for all rows at once: draft, verify, accept. Everything that decodes calls this and nothing else does it.

The draft pass carries the anchor's AR row: the token after the anchor is the backbone's own, chosen before the drafts
are, and the cycle goes on from it. A step says whether the drafts form a chain or a tree or are copied, and whether the
verify pass drafts the next block too. The engine ends texts, once it has their tokens. The only wait for the device is
the transfer of the verdict.

Shapes: B rows, M drafts, S stops, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orthrus.decode import tree
from orthrus.decode.accept import NONE, Verdict
from orthrus.decode.drafters import Drafter, TreeDrafter
from orthrus.decode.frames import Reading
from orthrus.decode.passes import Passes, Proposal
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
        ready: logits `[M, V]` of the drafts that a pass before has made already, for each row outside `drawing`.
        copied_BM: drafts that each row's own text supplies, for a step that copies.
        states: what the drafter keeps of each row.
        trusted: whether an AR row has the same bits in a draft pass as in any other (`decode.exact`); where not, its
            token is a draft like the others.
        first_B: first tokens, which a draft pass has written; they are the anchors from then on.
        has_first: for each row, whether it has one.
    """

    rows: slice
    anchor_B: Tensor
    context: Context
    groups: list[tuple[Chooser, Tensor | None]]
    drawing: slice
    ready: Sequence[Tensor | None] = ()
    copied_BM: Tensor | None = None
    states: Sequence[Any] = ()
    trusted: bool = True
    first_B: Tensor | None = None
    has_first: Sequence[bool] = ()


class Outcome(NamedTuple):
    """What a cycle decided.

    Attributes:
        tokens: each row's new tokens: the first one, where a draft pass gave it, the accepted drafts, the bonus.
        broken: whether the row cannot go on after them: its logits are no numbers, and there is no bonus.
        has_first: for each row, whether a draft pass gave its first token.
        drafted: drafts that were proposed to each row.
        forwards: passes of the backbone it took beside those that drafted,
        draft_passes: and these, over the rows in `Batch.drawing`.
        ready_BMV: draft logits for the next cycle, from a pass that has drafted too; None otherwise.
        ranks: for each row, the number of the fused pass's stop at which acceptance stopped; the number of stops
            where it was none of them.
        inside: for each row, how many drafts of the chain inside its tree are kept, and how many there are.
    """

    tokens: list[list[int]]
    broken: list[bool]
    has_first: list[bool]
    drafted: int = 0
    forwards: int = 0
    draft_passes: int = 0
    ready_BMV: Tensor | None = None
    ranks: list[int] | None = None
    inside: list[tuple[int, int]] | None = None


def cycle(passes: Passes, batch: Batch, step: Step, *, drafter: Drafter) -> Outcome:
    """Advance every row by one step and commit what it keeps."""
    if step.kind == "plain" or step.lookup:
        return _verify(passes, batch, _none(batch) if batch.copied_BM is None else Drafts(batch.copied_BM, None))
    if step.nodes and isinstance(drafter, TreeDrafter):
        grown, drew = drafter.grow(passes, batch.rows, batch.anchor_B, step.drafts, step.nodes, batch.states)
        return _tree(passes, batch, grown, step.drafts, step)._replace(draft_passes=drew)
    batch, logits_BMV, drew = _propose(passes, batch, step, drafter)
    if step.nodes and logits_BMV.shape[1]:
        grown = _grown(batch, logits_BMV, step, drafter.markov)
        outcome = _tree(passes, batch, grown, logits_BMV.shape[1], step)
    else:
        drafts = _draft(batch, logits_BMV, drafter.markov, weigh=step.kind == "onepass")
        outcome = _onepass(passes, batch, drafts, step) if step.kind == "onepass" else _verify(passes, batch, drafts)
    return outcome._replace(draft_passes=drew)


def begin(passes: Passes, batch: Batch, made: Proposal) -> Outcome:
    """Write the first token of texts whose last prompt token a pass has read; that pass is the prompts' own."""
    assert made.first_B1V is not None
    gains, _ = _commit(passes, batch, _judge(batch, _none(batch), made.first_B1V))
    if not made.logits_BMV.shape[1]:
        return gains
    return gains._replace(has_first=[not lost for lost in gains.broken], ready_BMV=made.logits_BMV)


def _propose(passes: Passes, batch: Batch, step: Step, drafter: Drafter) -> tuple[Batch, Tensor, int]:
    """Return draft logits `[B, M, V]`, by a pass over the rows that need one, and how many passes that took.

    Where the backbone has given the first token, the batch returned goes on from there.
    """
    B, start, stop = len(batch.anchor_B), batch.drawing.start, batch.drawing.stop
    each, first_B1V = list(batch.ready) or [None] * B, None
    if start < stop:
        rows = slice(batch.rows.start + start, batch.rows.start + stop)
        anchor_B, states = batch.anchor_B[batch.drawing], batch.states[batch.drawing]
        made = drafter.propose(passes, rows, anchor_B, step.drafts, states)
        drawn = Proposal(made) if isinstance(made, Tensor) else made if batch.trusted else made.unverified()
        first_B1V = drawn.first_B1V
        if stop - start == B:
            return _after_first(passes, batch, first_B1V), drawn.logits_BMV[:, : step.drafts], drawn.passes
        each[start:stop] = drawn.logits_BMV
    given = [logits_MV for logits_MV in each if logits_MV is not None]
    slots = min(step.drafts, *map(len, given))
    logits_BMV = torch.stack([logits_MV[:slots] for logits_MV in given])
    return _after_first(passes, batch, first_B1V), logits_BMV, int(start < stop)


def _after_first(passes: Passes, batch: Batch, first_B1V: Tensor | None) -> Batch:
    """Write the backbone's own token after each anchor that was read with its draft, and go on from there."""
    if first_B1V is None:
        return batch
    B, start, stop = len(batch.anchor_B), batch.drawing.start, batch.drawing.stop
    has_first = [start <= row < stop for row in range(B)]
    if not all(has_first):
        first_B1V = torch.nn.functional.pad(first_B1V, (0, 0, 0, 0, start, B - stop))
    first_B = _judge(batch, _none(batch), first_B1V).tokens_BM1[:, 0]
    if not all(has_first):
        first_B = torch.where(torch.tensor(has_first, device=first_B.device), first_B, batch.anchor_B)
    passes.cache.commit(batch.rows, [int(one) for one in has_first])
    anchor_B = first_B.clamp_min(0)  # a row that has none is told when the verdict is
    for chooser, index in batch.groups:
        if chooser.processing is not None and has_first[0 if index is None else int(index)]:
            chooser.processing.lead(_take(anchor_B, index))
    context = batch.context.after(anchor_B, passes.cache.length_R[batch.rows])
    return replace(batch, anchor_B=anchor_B, context=context, first_B=first_B, has_first=has_first)


def _verify(passes: Passes, batch: Batch, drafts: Drafts) -> Outcome:
    """Verify a chain of drafts; without any, write each row's next token."""
    token_BM1 = torch.cat([batch.anchor_B[:, None], drafts.tokens_BM], dim=1)
    verdict = _judge(batch, drafts, passes.verify(batch.rows, token_BM1))
    gains, _ = _commit(passes, batch, verdict)
    return gains._replace(drafted=drafts.tokens_BM.shape[1], forwards=1)


def _onepass(passes: Passes, batch: Batch, drafts: Drafts, step: Step) -> Outcome:
    """Verify this block and draft the next for the likeliest places where acceptance may stop."""
    token_BM1 = torch.cat([batch.anchor_B[:, None], drafts.tokens_BM], dim=1)
    assert drafts.confidence_BM is not None
    stop_BS = likely_stops(drafts.confidence_BM, step.stops)
    logits = passes.run(batch.rows, Reading(token_BQ=token_BM1, stop_BS=stop_BS, drafts=step.drafts))
    verdict = _judge(batch, drafts, logits.ar_BQV)
    rank_B, ready_BMV = _at_stop(stop_BS, verdict.accepted_B, logits.ahead_BSMV)
    gains, told = _commit(passes, batch, verdict, rank_B[:, None])
    ranks = [rank for (rank,) in told]
    return gains._replace(drafted=drafts.tokens_BM.shape[1], forwards=1, ready_BMV=ready_BMV, ranks=ranks)


def likely_stops(confidence_BM: Tensor, stops: int) -> Tensor:
    """Return the likeliest numbers of accepted drafts, `[B, S]`, if each draft is kept as surely as it was proposed."""
    reach_BM1 = torch.nn.functional.pad(confidence_BM, (1, 0), value=1.0).cumprod(1)
    leave_BM1 = 1 - torch.nn.functional.pad(confidence_BM, (0, 1), value=0.0)
    return (reach_BM1 * leave_BM1).topk(min(stops, reach_BM1.shape[1]), dim=1).indices


def _at_stop(stop_BS: Tensor, stop_B: Tensor, ahead_BSMV: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the number of the stop that each row met, S for none, and the logits drafted for it."""
    assert ahead_BSMV is not None
    here_BS = stop_BS == stop_B[:, None]
    index_B = here_BS.long().argmax(1)
    ready_BMV = ahead_BSMV[torch.arange(len(stop_BS), device=stop_BS.device), index_B]
    return index_B.where(here_BS.any(1), stop_BS.shape[1]), ready_BMV


def _grown(batch: Batch, logits_BMV: Tensor, step: Step, markov: Markov | None) -> tree.Tree:
    """Grow a tree of the slots' likeliest tokens."""
    (scores,) = _grouped(batch, lambda chooser, i: [chooser.branch(_take(logits_BMV, i), batch.context.rows(i))])
    nodes = min(step.nodes, tree.largest(logits_BMV.shape[1], logits_BMV.shape[2]))
    return tree.grow(scores, nodes=nodes, anchor_B=batch.anchor_B, markov=markov)


def _tree(passes: Passes, batch: Batch, grown: tree.Tree, slots: int, step: Step) -> Outcome:
    """Verify a tree of drafts, `slots` deep at most, and move the accepted path's keys to where they belong.

    With stops the same pass drafts the next block for the nodes after which the backbone likeliest leaves the tree.
    """
    token_BP = torch.cat([batch.anchor_B[:, None], grown.token_BN], dim=1)
    reading = Reading(token_BQ=token_BP, depth_BQ=grown.depth_BP, ancestor_BQQ=grown.ancestor_BPP)
    stop_BS = tree.likely_ends(grown, step.stops) if step.stops else None
    logits = passes.run(batch.rows, replace(reading, stop_BS=stop_BS, drafts=step.drafts if step.stops else 0))

    def choose(chooser: Chooser, index: Tensor | None) -> list[Tensor]:
        some = grown if index is None else grown.rows(index)
        return [chooser.choices(_take(logits.ar_BQV, index), batch.context.rows(index), some)]

    (choice_BP,) = _grouped(batch, choose)
    path = tree.walk(grown, choice_BP, slots=slots)
    if passes.geometry is not None:
        # Siblings between a path's keys change the order of sums; a plain verify pass of the path settles its bits.
        settled = _verify(passes, batch, Drafts(path.verdict.tokens_BM1[:, :-1].clamp_min(0), None))
        return settled._replace(forwards=2)
    length_B1 = passes.cache.length_R[batch.rows, None]
    target_BM = length_B1 + torch.arange(1, slots + 1, device=length_B1.device)
    moved = slice(0, min(slots, grown.token_BN.shape[1]))
    passes.move_slots(batch.rows, (length_B1 + path.node_BM)[:, moved], target_BM[:, moved])
    rank_B, ready_BMV = (None, None) if stop_BS is None else _at_stop(stop_BS, path.last_B, logits.ahead_BSMV)
    ranked = [] if rank_B is None else [rank_B[:, None]]
    gains, told = _commit(passes, batch, path.verdict, path.chain_B2, *ranked)
    ranks, inside = [row[2] for row in told] if ranked else None, [(row[0], row[1]) for row in told]
    return gains._replace(drafted=slots, forwards=1, ready_BMV=ready_BMV, ranks=ranks, inside=inside)


def _draft(batch: Batch, logits_BMV: Tensor, markov: Markov | None, *, weigh: bool = True) -> Drafts:
    if logits_BMV.shape[1] == 0:
        return Drafts(none := logits_BMV.new_empty(logits_BMV.shape[:2], dtype=torch.long), None, none.float())

    def of(chooser: Chooser, index: Tensor | None) -> Drafts:
        before = None if markov is None else Before(_take(batch.anchor_B, index), markov)
        return chooser.draft(_take(logits_BMV, index), batch.context.rows(index), before, weigh=weigh)

    return Drafts(*_grouped(batch, of))


def _judge(batch: Batch, drafts: Drafts, logits_BM1V: Tensor) -> Verdict:
    def of(chooser: Chooser, index: Tensor | None) -> Verdict:
        rejects = chooser.sampling.do_sample and not chooser.coupled and drafts.scores_BMV is not None
        scores = _take(drafts.scores_BMV, index) if rejects and drafts.scores_BMV is not None else None
        part = Drafts(_take(drafts.tokens_BM, index), scores)
        return chooser.judge(part, _take(logits_BM1V, index), batch.context.rows(index))

    return Verdict(*_grouped(batch, of))


def _grouped(batch: Batch, of: Callable[[Chooser, Tensor | None], Sequence[Tensor | None]]) -> Sequence[Any]:
    """Compute tensors of rows with each group's own chooser; None for one that no group has, zeros where some have."""
    parts = [of(chooser, index) for chooser, index in batch.groups]
    if len(parts) == 1:
        return parts[0]
    out: list[Tensor | None] = []
    for some in zip(*parts, strict=True):
        like = next((part for part in some if part is not None), None)
        out.append(None if like is None else like.new_zeros(len(batch.anchor_B), *like.shape[1:]))
        for (_, index), part in zip(batch.groups, some, strict=True):
            if out[-1] is not None and part is not None:
                out[-1][index] = part
    return out


def _none(batch: Batch) -> Drafts:
    return Drafts(batch.anchor_B.new_empty(len(batch.anchor_B), 0), None)


def _take(value: Tensor, index: Tensor | None) -> Tensor:
    return value if index is None else value[index]


def _commit(passes: Passes, batch: Batch, verdict: Verdict, *numbers: Tensor) -> tuple[Outcome, list[list[int]]]:
    """Fetch the verdict, and some more numbers per row, in one transfer; keep the keys of what was accepted."""
    first_B1 = (batch.anchor_B if batch.first_B is None else batch.first_B)[:, None]
    packed = torch.cat([verdict.accepted_B[:, None], *numbers, first_B1, verdict.tokens_BM1], dim=1).tolist()
    start = 1 + sum(part.shape[1] for part in numbers)
    gains, counts = Outcome([], [], []), []
    for row, first in zip(packed, batch.has_first or [False] * len(packed), strict=True):
        lost = first and row[start] == NONE
        broken = row[start + 1 + row[0]] == NONE
        count = 0 if lost else row[0] + (not broken)
        counts.append(count)
        gains.tokens.append([] if lost else row[start + (not first) : start + 1 + count])
        gains.broken.append(lost or broken)
        gains.has_first.append(first and not lost)
    passes.cache.commit(batch.rows, counts)
    return gains, [row[1:start] for row in packed]
