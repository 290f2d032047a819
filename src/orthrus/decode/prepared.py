"""Passes recorded before anybody waits for them: by a server, and before decoding is timed.

`chat`, and `generate` without `--compare`, leave it: recording first would delay their first token by seconds, and on
the way it costs no more.
"""

from typing import Final

import torch
from transformers import PreTrainedModel

from orthrus.decode.passes import Passes
from orthrus.decode.runner import Recorded
from orthrus.model.attach import evaluating
from orthrus.model.attachment import attachment_of
from orthrus.model.cache import ScratchCache

_LENGTH: Final = 16
_ROOM: Final = 64


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


def _decode(passes: Passes, rows: slice, *, drafts: bool) -> None:
    """Make each kind of pass over texts that do not stand level, as those of several rows hardly ever do."""
    count, device = rows.stop, passes.cache.device
    token_B = torch.zeros(count, dtype=torch.long, device=device)
    passes.cache.set_lengths_of(rows, [0] * count)
    passes.prefill(rows, [[0] * (_LENGTH + row) for row in range(count)], chunk=_ROOM)
    passes.verify(rows, token_B[:, None])
    if drafts:
        passes.verify(rows, token_B[:, None].expand(-1, 2))
        if attachment_of(passes.model).drafter is None:
            passes.draft(rows, token_B, 1)
            passes.draft(rows, token_B, 2)
