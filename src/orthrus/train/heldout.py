"""Drafters that measure a view on held-out prompts by other ways to draft than `auto` takes.

Shapes: B rows, M drafts, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthrus.decode.drafters import ViewDrafter
from orthrus.decode.passes import Passes


@dataclass(slots=True)
class Begun:
    """Whether a row has written anything yet."""

    begun: bool = False


class Blind(ViewDrafter):
    """Draft every block but a text's first without its anchor, as a fused pass would, in a pass of its own."""

    def reset(self, cached: int) -> Begun:
        """Return the state of a row that begins."""
        return Begun()

    def propose(self, passes: Passes, rows: slice, anchor_B: Tensor, drafts: int, states: Sequence[Begun]) -> Tensor:
        """Return draft logits `[B, M, V]`."""
        begun_B = torch.tensor([state.begun for state in states], device=anchor_B.device)
        return passes.draft(rows, torch.where(begun_B, passes.config.mask, anchor_B), drafts)

    def accepted(self, states: Sequence[Begun], counts: Sequence[int]) -> None:
        """Note who has begun."""
        for state in states:
            state.begun = True


class Twice(ViewDrafter):
    """Fix the first half of each block's drafts, and draft the rest in a second pass that is shown them."""

    def propose(self, passes: Passes, rows: slice, anchor_B: Tensor, drafts: int, states: Sequence[None]) -> Tensor:
        """Return draft logits `[B, M, V]`."""
        first_BMV = passes.draft(rows, anchor_B, drafts)
        shown_BJ = first_BMV[:, : drafts // 2].argmax(-1)
        rest_BMV = passes.draft(rows, anchor_B, drafts, shown_BJ=shown_BJ)[:, drafts // 2 :]
        return torch.cat([first_BMV[:, : drafts // 2], rest_BMV], dim=1)
