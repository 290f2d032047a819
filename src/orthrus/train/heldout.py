"""Real decoding of held-out prompts, also under plans that `auto` does not take.

Shapes: B rows, M drafts, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from orthrus.decode.api import engine_for
from orthrus.decode.drafters import Drafter, ViewDrafter
from orthrus.decode.frames import Reading
from orthrus.decode.options import Options
from orthrus.decode.output import Stats
from orthrus.decode.passes import Passes, Proposal
from orthrus.decode.rows import Row
from orthrus.model.markov import markov_of
from orthrus.policy.steps import parse
from orthrus.train.start import in_one_dtype


def rates(stats: Stats, prefix: str = "") -> dict[str, float]:
    """Return tokens per cycle and per forward pass, by name."""
    return {f"{prefix}{name}": getattr(stats, name) for name in ("tokens_per_cycle", "tokens_per_forward")}


@dataclass(slots=True)
class Begun:
    """Whether a row has written anything yet."""

    begun: bool = False


class Blind(ViewDrafter):
    """Draft every block but a text's first without its anchor, as a fused pass would, in a pass of its own."""

    def reset(self, row: Row) -> Begun:
        """Return the state of a row that begins."""
        return Begun()

    def propose(self, passes: Passes, rows: slice, anchor_B: Tensor, drafts: int, states: Sequence[Begun]) -> Tensor:
        """Return draft logits `[B, M, V]`; nothing comes of the pass's AR row."""
        begun_B = torch.tensor([state.begun for state in states], device=anchor_B.device)
        head_B1, before_B1 = torch.where(begun_B, passes.config.mask, anchor_B)[:, None], torch.full_like(anchor_B, -1)
        block = Reading(token_BQ=anchor_B[:, None], stop_BS=before_B1[:, None], shown_BJ=head_B1, drafts=drafts)
        ahead_BSMV = passes.run(rows, block).ahead_BSMV
        assert ahead_BSMV is not None
        return ahead_BSMV[:, 0]

    def accepted(self, states: Sequence[Begun], counts: Sequence[int]) -> None:
        """Note who has begun."""
        for state in states:
            state.begun = True


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
    model: PreTrainedModel, prompts: list[list[int]], most: int, *, onepass: bool = False, steps: int = 1
) -> Stats:
    """Decode prompts, `most` tokens each, under the plan `full` or `onepass`; returns their pooled statistics.

    With two `steps` the first half of each block's drafts is fixed, and a second pass that is shown them drafts the
    rest. What `onepass` gives is found without fused passes, whose block per stop point takes a CPU many times as
    long: every block but a text's first is drafted in a pass of its own, blind, as the fused pass would draft it.
    """
    markov = markov_of(model)
    drafter = Blind(markov) if onepass else Twice(markov) if steps == 2 else None
    # Texts begin together, so that all have their first drafts.
    stats = decoded_by(model, prompts, most, drafter, rows=len(prompts) if onepass else 8)
    if onepass:
        stats.forwards = stats.cycles + len(prompts)  # a pass per cycle, and the prefill, which drafts as well
    return stats


def decoded_by(
    model: PreTrainedModel, prompts: list[list[int]], most: int, drafter: Drafter | None, *, rows: int = 8
) -> Stats:
    """Decode prompts under the plan `full`, by the view unless another drafter is given; returns pooled statistics."""
    options = Options.of(model.generation_config, max_new_tokens=most)
    with torch.autocast(model.device.type, enabled=False), in_one_dtype(model):
        engine = engine_for(model, prompts, options, parse("full"), rows=rows, drafter=drafter)
        return Stats.total(row.stats for row in engine.finish(prompts, options))
