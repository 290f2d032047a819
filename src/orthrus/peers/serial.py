"""Which part of each text a drafter has not read yet, for drafters that draft token after token.

Accepted tokens overwrite the keys of drafts, so the state of a row is a count. Shapes: B rows, W tokens of a window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from orthrus.decode.rows import Row
from orthrus.model.cache import ScratchCache


@dataclass(slots=True)
class Reader:
    """A row, and how many tokens of its text the drafter's own layers hold keys of."""

    row: Row
    read: int = 0


class Window(NamedTuple):
    """The end of each text, its anchor last: as many tokens as the row with most to read lacks.

    Rows that lack fewer read some again, and short ones their first token several times.
    """

    token_BW: Tensor
    slot_BW: Tensor

    def parts(self, most: int) -> list["Window"]:
        """Cut it into windows of so many tokens at most."""
        pieces = [slice(start, start + most) for start in range(0, self.token_BW.shape[1], most)]
        return [Window(self.token_BW[:, piece], self.slot_BW[:, piece]) for piece in pieces]


def unread(cache: ScratchCache, rows: slice, states: Sequence[Reader]) -> Window:
    """Return what is to be read before drafting, and take it for read."""
    lengths = cache.lengths[rows]
    wide = max(length + 1 - state.read for length, state in zip(lengths, states, strict=True))
    tokens, slots = [], []
    for length, state in zip(lengths, states, strict=True):
        indices = [max(index, 0) for index in range(length + 1 - wide, length + 1)]
        text = state.row.part(indices[0], length + 1)
        tokens.append([text[index - indices[0]] for index in indices])
        slots.append(indices)
        state.read = length + 1
    device = cache.device
    return Window(torch.tensor(tokens, device=device), torch.tensor(slots, device=device))
