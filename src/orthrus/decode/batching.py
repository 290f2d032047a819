"""Between rows and the cycle: what a cycle is told of the rows that decode, and what it tells of each of them.

Shapes: B rows, M drafts, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from orthrus.decode.cycle import Batch, Outcome
from orthrus.decode.options import Sampling
from orthrus.decode.processing import Processing
from orthrus.decode.rows import Row
from orthrus.decode.sampling import Chooser, Context
from orthrus.model.cache import ScratchCache
from orthrus.policy.acceptance import RowOutcome, Source
from orthrus.policy.steps import Step


def batch_of(
    rows: Sequence[Row],
    cache: ScratchCache,
    step: Step,
    *,
    start: int = 0,
    coupled: bool,
    whole: bool,
    trusted: bool = True,
) -> Batch:
    """Describe rows to the cycle: those that decode, or some that stand side by side from place `start` on.

    Args:
        coupled: whether drafts and text share their noise.
        whole: whether a draft pass over some of the rows takes them all: no graph for each number of rows.
        trusted: as in `Batch`.
    """
    device, where = cache.device, slice(start, start + len(rows))
    ready = [row.ready.cut(step.drafts) if row.ready and row.state.serves(step) else None for row in rows]
    lacking = [index for index, logits_MV in enumerate(ready) if logits_MV is None]
    drawing = slice(lacking[0], lacking[-1] + 1) if lacking and step.drafts and not step.lookup else slice(0, 0)
    if drawing.stop and whole:
        drawing = slice(0, len(rows))
    copied = [row.lookup.drafts(step.drafts) for row in rows] if step.lookup else None
    stream_B = torch.tensor([row.stream for row in rows], device=device)
    return Batch(
        rows=where,
        anchor_B=torch.tensor([row.anchor for row in rows], device=device),
        context=Context(stream_B, cache.length_R[where], _seen(rows, device)),
        groups=_groups(rows, coupled, device),
        drawing=drawing,
        ready=ready,
        copied_BM=None if copied is None else torch.tensor(copied, device=device),
        states=[row.drafting for row in rows],
        trusted=trusted,
    )


def _groups(rows: Sequence[Row], coupled: bool, device: torch.device) -> list[tuple[Chooser, Tensor | None]]:
    """Gather the rows that choose tokens alike; None stands for all of them."""
    alike: dict[tuple[Sampling, Processing | None], list[int]] = {}
    for number, row in enumerate(rows):
        alike.setdefault((row.options.sampling, row.processing), []).append(number)
    choosers = [Chooser(sampling, coupled, processing) for sampling, processing in alike]
    if len(alike) == 1:
        return [(choosers[0], None)]
    indices = [torch.tensor(index, device=device) for index in alike.values()]
    return list(zip(choosers, indices, strict=True))


def _seen(rows: Sequence[Row], device: torch.device) -> Tensor | None:
    """Return the tokens that each row contains, `[B, L]`, where any of them is penalised for repeating."""
    if not any(row.penalised for row in rows):
        return None
    seen = [list(row.seen) if row.penalised else [row.anchor] for row in rows]
    longest = max(map(len, seen))
    return torch.tensor([tokens + tokens[:1] * (longest - len(tokens)) for tokens in seen], device=device)


def outcome_of(row: Row, index: int, step: Step, batch: Batch, outcome: Outcome) -> RowOutcome:
    """Say what a cycle did to a row, before its tokens are added to it."""
    tokens, chain = outcome.tokens[index], None
    drew, behind = _drew(index, batch), led(row, index, step, batch)
    source: Source = "text" if step.lookup else "ahead" if row.state.blind and not drew else "view"
    if outcome.inside is not None:
        first, (kept, longest) = behind or outcome.has_first[index], outcome.inside[index]
        chain = (kept + first, longest + first)  # of drafts, a first token counted as one
    return RowOutcome(
        source=None if step.kind == "plain" or outcome.broken[index] else source,
        drafted=step.drafts,
        kept=max(len(tokens) - 1, 0) + behind,
        drew=drew,
        chain=chain,
        copy_kept=row.lookup.agreement(tokens) if row.state.match and tokens and not (step.lookup or behind) else None,
    )


def led(row: Row, index: int, step: Step, batch: Batch) -> bool:
    """Tell whether a row's drafts in a cycle are those behind its first token, which its prompt's pass has made."""
    return not (step.lookup or step.kind == "plain" or row.state.blind or _drew(index, batch))


def _drew(index: int, batch: Batch) -> bool:
    return bool(batch.drawing.start <= index < batch.drawing.stop)
