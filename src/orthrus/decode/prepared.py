"""Passes recorded before anybody waits for them, by whoever knows how many rows there will be."""

from typing import Final

import torch
from transformers import PreTrainedModel

from orthrus.decode.passes import Passes
from orthrus.decode.runner import Recorded
from orthrus.model.attach import evaluating
from orthrus.model.attachment import attachment_of
from orthrus.model.cache import ScratchCache

_ROOM: Final = 64


@torch.inference_mode()
def record_passes(model: PreTrainedModel, *, rows: int, drafts: bool = True) -> None:
    """Record what decoding makes of one row and of all rows: plain steps, verifications, draft passes.

    Does nothing where passes are not recorded (`model.traced`). Takes about half a second for each kind.

    Args:
        model: a dual-view model.
        rows: rows of the cache that it will decode in.
        drafts: whether it will draft; plain steps alone otherwise.
    """
    cache = ScratchCache(rows=rows, capacity=_ROOM + rows, device=model.device)
    passes = Passes(model, cache)
    if not isinstance(passes.runner, Recorded):
        return
    recorder = passes.runner.recorder
    with attachment_of(model).lock, evaluating(model):
        recorder.at_once = True
        try:
            for count in sorted({1, rows}):
                live, token_B = slice(0, count), torch.zeros(count, dtype=torch.long, device=model.device)
                cache.set_lengths_of(live, [0] * count)
                # Texts of several rows hardly ever stand level.
                passes.prefill(live, [[0] * (1 + row) for row in range(count)], chunk=_ROOM)
                passes.verify(live, token_B[:, None])
                if drafts:
                    passes.verify(live, token_B[:, None].expand(-1, 2))
                    passes.draft(live, token_B, 2)
        finally:
            recorder.at_once = False
