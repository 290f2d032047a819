"""Real decoding of held-out prompts, also under plans that `auto` does not take."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from orthrus.decode.api import engine_for
from orthrus.decode.drafters import Drafter, ViewDrafter
from orthrus.decode.options import Options
from orthrus.decode.output import Stats
from orthrus.decode.passes import Passes, Proposal
from orthrus.model.markov import markov_of
from orthrus.policy.steps import parse
from orthrus.train.start import in_one_dtype


def rates(stats: Stats, prefix: str = "") -> dict[str, float]:
    """Return tokens per cycle and per forward pass, by name."""
    return {f"{prefix}{name}": getattr(stats, name) for name in ("tokens_per_cycle", "tokens_per_forward")}


class Twice(ViewDrafter):
    """Fix the first half of each block's tokens, and draft the rest in a second pass that is shown them."""

    ahead = False

    def propose(self, passes: Passes, rows: slice, anchor_B: Tensor, drafts: int, states: Sequence[Any]) -> Proposal:
        """Return the backbone's own token after the anchor, and the drafts of both passes."""
        made = passes.draft(rows, anchor_B, drafts - 1)
        assert made.first_B1V is not None
        half = max(drafts // 2, 1)
        shown_BJ = torch.cat([made.first_B1V, made.logits_BMV], dim=1)[:, :half].argmax(-1)
        rest_BMV = passes.draft(rows, anchor_B, drafts - half, shown_BJ=shown_BJ).logits_BMV
        return Proposal(torch.cat([made.logits_BMV[:, : half - 1], rest_BMV], dim=1), made.first_B1V, passes=2)


def decoded_for_real(
    model: PreTrainedModel, prompts: list[list[int]], most: int, *, plan: str = "full", steps: int = 1
) -> Stats:
    """Decode prompts, `most` tokens each, by the view under a plan; returns their pooled statistics.

    With two `steps`, a second pass drafts the second half of each block, and is shown the first.
    """
    return decoded_by(model, prompts, most, Twice(markov_of(model)) if steps == 2 else None, plan=plan)


def decoded_by(
    model: PreTrainedModel, prompts: list[list[int]], most: int, drafter: Drafter | None, *, plan: str = "full"
) -> Stats:
    """Decode prompts under a plan, by the view unless another drafter is given; returns pooled statistics."""
    options = Options.of(model.generation_config, max_new_tokens=most)
    with torch.autocast(model.device.type, enabled=False), in_one_dtype(model):
        engine = engine_for(model, prompts, options, parse(plan), rows=8, drafter=drafter)
        return Stats.total(row.stats for row in engine.finish(prompts, options))
