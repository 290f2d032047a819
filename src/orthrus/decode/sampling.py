"""From logits to choices: processed scores, drafts drawn from them, verdicts over them.

Puts the options of a group of rows (`Sampling`), the row's noise and the acceptance rules together. Warping is
transformers' own; only the repetition penalty is written here, over a "seen" mask of fixed shape, because every
slot of a block has a context of its own. Knows no model and no cache.

Shapes: B rows, M drafts, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from orthrus.decode import accept, noise
from orthrus.decode.accept import Verdict
from orthrus.decode.options import Sampling


class Context(NamedTuple):
    """What choosing needs to know of the rows: their noise streams, where they stand, what they contain.

    Attributes:
        stream_B: noise stream of each row.
        position_B: position of each row's anchor; the token after it is decided at `position + 1`.
        seen_BV: which tokens each row contains, or None when no row is penalised for repeating.
    """

    stream_B: Tensor
    position_B: Tensor
    seen_BV: Tensor | None = None

    def rows(self, index_B: Tensor) -> "Context":
        """Return the same for some of the rows."""
        seen = None if self.seen_BV is None else self.seen_BV[index_B]
        return Context(self.stream_B[index_B], self.position_B[index_B], seen)


class Drafts(NamedTuple):
    """Tokens proposed for the positions after the anchor, and the scores they were drawn from (sampling only)."""

    tokens_BM: Tensor
    scores_BMV: Tensor | None


@dataclass(frozen=True, slots=True)
class Chooser:
    """Choose tokens as one `Sampling` says.

    With `coupled`, draft and backbone share the noise of each position, and the text equals what plain sampling
    with that noise gives (`exact="token"`); without, drafts are kept by rejection sampling, which keeps more.
    """

    sampling: Sampling
    coupled: bool = False

    def draft(self, logits_BMV: Tensor, context: Context) -> Drafts:
        """Propose one token per slot; slots know the row's text, not one another's choice."""
        seen = None if context.seen_BV is None else context.seen_BV[:, None]
        scores = self.scores(logits_BMV, seen)
        if not self.sampling.do_sample:
            return Drafts(scores.argmax(-1), None)
        purpose = noise.TARGET if self.coupled else noise.DRAFT
        noised = scores + self._gumbel(scores, context, purpose)
        return Drafts(noised.argmax(-1), None if self.coupled else scores)

    def judge(self, drafts: Drafts, logits_BM1V: Tensor, context: Context) -> Verdict:
        """Say which drafts stay and what comes after them."""
        scores = self.scores(logits_BM1V, self._seen_along(drafts.tokens_BM, context))
        if not self.sampling.do_sample:
            return accept.greedy(drafts.tokens_BM, scores)
        if drafts.scores_BMV is None:
            return accept.greedy(drafts.tokens_BM, scores + self._gumbel(scores, context, noise.TARGET))
        M = drafts.tokens_BM.shape[1]
        position_BM = _positions(context.position_B, M)
        return accept.rejection(
            drafts.tokens_BM,
            drafts.scores_BMV,
            scores,
            accept_BM=noise.uniform(context.stream_B, position_BM, noise.ACCEPT, 1)[:, :, 0],
            residual_BM1V=self._gumbel(scores, context, noise.RESIDUAL),
        )

    def scores(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """Process logits `[B, Q, V]` as the options say, in float32; greedy choosing skips what keeps the argmax."""
        scores = logits.float()
        s = self.sampling
        if s.repetition_penalty != 1.0 and seen is not None:
            penalised = torch.where(scores < 0, scores * s.repetition_penalty, scores / s.repetition_penalty)
            scores = torch.where(seen, penalised, scores)
        if not s.do_sample:
            return scores
        warpers = LogitsProcessorList()
        if s.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(s.temperature))
        if s.top_k > 0:
            warpers.append(TopKLogitsWarper(s.top_k))
        if s.top_p < 1.0:
            warpers.append(TopPLogitsWarper(s.top_p))
        if s.min_p > 0.0:
            warpers.append(MinPLogitsWarper(s.min_p))
        flat = scores.flatten(0, 1)
        # The warpers read scores only; the ids they are handed are never looked at.
        return warpers(flat.new_empty(0, dtype=torch.long), flat).view_as(scores)

    def _seen_along(self, draft_BM: Tensor, context: Context) -> Tensor | None:
        """Return what each verify slot's text contains, the drafts before it included: `[B, M+1, V]`."""
        if context.seen_BV is None or self.sampling.repetition_penalty == 1.0:
            return None
        V = context.seen_BV.shape[1]
        drafted = torch.nn.functional.one_hot(draft_BM, V).cumsum(1).bool()
        return context.seen_BV[:, None] | torch.nn.functional.pad(drafted, (0, 0, 1, 0))

    def _gumbel(self, scores: Tensor, context: Context, purpose: int) -> Tensor:
        position_BQ = _positions(context.position_B, scores.shape[1])
        return noise.gumbel(context.stream_B, position_BQ, purpose, scores.shape[2])


def _positions(position_B: Tensor, count: int) -> Tensor:
    """Return the positions decided after the anchor: `[B, count]`."""
    return position_B[:, None] + torch.arange(1, count + 1, device=position_B.device)
