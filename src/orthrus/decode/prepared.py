"""Passes recorded and steps timed before anybody waits for them: by a server, and before decoding is timed.

`chat`, and `generate` without `--compare`, leave it: recording first would delay their first token by seconds, and on
the way it costs no more.
"""

import time
from collections.abc import Callable
from typing import Final

import torch
from transformers import PreTrainedModel

from orthrus.decode.allowed import block_of, drafter_for
from orthrus.decode.drafters import ViewDrafter
from orthrus.decode.learned import experience_of
from orthrus.decode.passes import Passes
from orthrus.decode.runner import Recorded
from orthrus.model.attach import evaluating
from orthrus.model.attachment import attachment_of
from orthrus.model.cache import ScratchCache
from orthrus.policy.policy import Policy
from orthrus.policy.steps import Plan, Step

_LENGTH: Final = 16
_ROOM: Final = 64
_ROUNDS: Final = 2


@torch.inference_mode()
def record_passes(model: PreTrainedModel, *, rows: int, drafts: bool = True, plain: bool = True) -> None:
    """Record what `exact="distribution"` makes of one row and of several: plain steps, verifications, draft passes.

    Does nothing where passes are not recorded (`model.traced`). Takes a second or so for each of the eight kinds (six
    for views with `anchor="twin"`). Passes of `onepass`, and of a hybrid's trees, are recorded when met often.

    Args:
        model: a dual-view model.
        rows: how many it will decode at most.
        drafts: whether it will draft; plain steps alone otherwise. Another drafter's model makes no draft pass. Where
            the drafter reads hidden states, its hooks keep recordings from being run, and plain steps are left.
        plain: whether it will decode without drafts as well.
    """
    drafter = attachment_of(model).drafter
    if drafts and drafter is not None and drafter.taps:
        if not plain:
            return
        drafts = False
    counts = range(1, min(rows, 2) + 1)
    cache = ScratchCache(rows=counts[-1], capacity=_ROOM, device=model.device)
    passes = Passes(model, cache)
    if not isinstance(passes.runner, Recorded):
        return
    recorder = passes.runner.recorder
    with attachment_of(model).lock, evaluating(model):
        try:
            for count in counts:
                for recorder.at_once in (False, True):  # what is looked up at the first use cannot be recorded
                    _decode(passes, slice(0, count), drafts=drafts)
        finally:
            recorder.at_once = False


@torch.inference_mode()
def learn_prices(
    model: PreTrainedModel, *, rows: int, plan: Plan, clock: Callable[[], float] = time.perf_counter
) -> None:
    """Time plain steps, a short chain and the longest, of one row and of all, for a plan that weighs steps.

    So its first steps over a text need not tell what steps take: a wide one over many rows may take ten plain ones.
    Does nothing where `record_passes` has recorded none, and for other drafters than the view. The plan is one under
    `exact="distribution"`, for `rows` rows at most.
    """
    drafter = drafter_for(model, plan)
    if len(plan.steps(block := block_of(model, drafter))) == 1 or not isinstance(drafter, ViewDrafter):
        return
    passes = Passes(model, ScratchCache(rows=rows, capacity=_LENGTH + rows + 2 * block, device=model.device))
    if not isinstance(passes.runner, Recorded):
        return
    policy = Policy(plan, block=block, experience=experience_of(model, "distribution", plan, drafter))
    with attachment_of(model).lock, evaluating(model):
        for count in sorted({1, rows}):
            where, token_B = slice(0, count), torch.zeros(count, dtype=torch.long, device=model.device)
            _read(passes, where)
            kinds = (Step(), Step(min(2, block - 1)), Step(block - 1))
            for number, step in enumerate(kinds * (1 + _ROUNDS)):  # the first round finds cold caches
                started = clock()
                if step.drafts:
                    passes.draft(where, token_B, step.drafts - 1)
                passes.verify(where, token_B[:, None].expand(-1, max(step.drafts, 1)))
                if number >= len(kinds):
                    policy.price(step, count, clock() - started)


def _decode(passes: Passes, rows: slice, *, drafts: bool) -> None:
    """Make each kind of pass."""
    token_B = torch.zeros(rows.stop, dtype=torch.long, device=passes.cache.device)
    _read(passes, rows)
    passes.verify(rows, token_B[:, None])
    if drafts:
        passes.verify(rows, token_B[:, None].expand(-1, 2))
        if attachment_of(passes.model).drafter is None:
            passes.draft(rows, token_B, 1)
            passes.draft(rows, token_B, 2)


def _read(passes: Passes, rows: slice) -> None:
    """Read texts that do not stand level, as those of several rows hardly ever do."""
    count = rows.stop
    passes.cache.set_lengths_of(rows, [0] * count)
    passes.prefill(rows, [[0] * (_LENGTH + row) for row in range(count)], chunk=_ROOM)
