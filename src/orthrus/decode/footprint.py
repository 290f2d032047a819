"""How much memory the rows of a cache take: keys by the position, recurrent states whatever the length of a text.

Sizes are those of a pass over a few tokens, so no family has to be described. A drafter's own keys are not counted.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from orthrus.decode.passes import Passes
from orthrus.model.attach import evaluating, is_hybrid
from orthrus.model.attachment import attachment_of
from orthrus.model.cache import ScratchCache
from orthrus.model.fingerprint import key_of
from orthrus.model.room import require_memory
from orthrus.model.snapshots import MOST


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one row of a cache.

    Attributes:
        position: of each position's keys and values, in all layers.
        states: of states, their terms and snapshots at most; 0 without recurrent layers.
    """

    position: int
    states: int

    def row(self, capacity: int) -> int:
        """Return the bytes of a row of so many positions."""
        return self.states + self.position * capacity

    def capacity(self, free: int, *, rows: int) -> int:
        """Return how many positions each of some rows can have in so much memory."""
        return max(0, (free // rows - self.states) // self.position)


def footprint(model: PreTrainedModel, *, terms: int) -> Footprint:
    """Measure, once, what a row takes where passes keep at most `terms` tokens (`Plan.scratch` is enough)."""
    known: dict[object, Footprint] = attachment_of(model).memo("footprint")
    key = (terms, *key_of(model))
    if key not in known:
        cache = ScratchCache(rows=1, capacity=terms, device=model.device)
        with torch.inference_mode(), attachment_of(model).lock, evaluating(model):
            Passes(model, cache).verify(slice(0, 1), torch.zeros(1, terms, dtype=torch.long, device=model.device))
        snapshot = sum(tensor.nbytes for tensor in cache.states.of(0))
        keys = sum(store.nbytes for store in cache.stores.values())
        known[key] = Footprint(keys // terms, cache.states.nbytes + MOST * snapshot)
    return known[key]


def require_states(model: PreTrainedModel, *, rows: int, capacity: int, terms: int) -> None:
    """Raise CacheFull where a hybrid's rows take more memory than is free; keys alone are counted at the first pass."""
    if is_hybrid(model):
        needed = rows * footprint(model, terms=terms).row(capacity)
        require_memory(needed, model.device, rows=rows, capacity=capacity)
