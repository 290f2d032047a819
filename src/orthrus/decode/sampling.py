"""From logits to choices: processed scores, drafts drawn from them, verdicts over them.

Puts the options of a group of rows (`Sampling`), the row's noise and the acceptance rules together. Warping is
transformers' own; only the repetition penalty is written here, over the few tokens that a text contains, because
every slot of a block has a context of its own. Knows no model and no cache.

Shapes: B rows, M drafts, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from orthrus.decode import accept, noise
from orthrus.decode.accept import Verdict
from orthrus.decode.options import Sampling
from orthrus.decode.processing import Processing, branches, chain
from orthrus.decode.processors import WARPERS, made
from orthrus.decode.tree import Tree
from orthrus.kernels.vocabulary import best
from orthrus.model.markov import Before


class Context(NamedTuple):
    """What choosing needs to know of the rows: their noise streams, where they stand, what they contain.

    Attributes:
        stream_B: noise stream of each row.
        position_B: position of each row's anchor; the token after it is decided at `position + 1`.
        seen_BL: the tokens that each row contains, filled up with any of them, or None when no row is penalised for
            repeating.
    """

    stream_B: Tensor
    position_B: Tensor
    seen_BL: Tensor | None = None

    def rows(self, index_B: Tensor | None) -> "Context":
        """Return the same for some of the rows; None stands for all."""
        if index_B is None:
            return self
        seen = None if self.seen_BL is None else self.seen_BL[index_B]
        return Context(self.stream_B[index_B], self.position_B[index_B], seen)

    def after(self, token_B: Tensor, position_B: Tensor) -> "Context":
        """Return the same once these tokens are written and rows stand at these positions."""
        seen_BL = None if self.seen_BL is None else torch.cat([self.seen_BL, token_B[:, None]], dim=1)
        return Context(self.stream_B, position_B, seen_BL)


class Drafts(NamedTuple):
    """Tokens proposed for the positions after the anchor, and the scores they were drawn from (rejection only).

    And the probability with which each was proposed, where it is asked for.
    """

    tokens_BM: Tensor
    scores_BMV: Tensor | None
    confidence_BM: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Chooser:
    """Choose tokens as one `Sampling` says.

    With `coupled`, draft and backbone share the noise of each position, and the text equals what plain sampling
    with that noise gives (`exact="token"`); without, drafts are kept by rejection sampling, which keeps more. A
    `processing` is that of the one row chosen for.
    """

    sampling: Sampling
    coupled: bool = False
    processing: Processing | None = None

    def draft(
        self, logits_BMV: Tensor, context: Context, before: Before | None = None, *, weigh: bool = True
    ) -> Drafts:
        """Propose one token per slot; slots know the row's text, and one another's choice only through `before`.

        With it (the anchors, `[B]`) they are chosen in turn: each slot's logits are shifted by the token before it. How
        probable they are is told where `weigh` asks for it.
        """
        seen = self._seen(context)
        purpose = noise.TARGET if self.coupled else noise.DRAFT
        noise_BMV = self._gumbel(logits_BMV, context, purpose) if self.sampling.do_sample else None
        if before is None and not self._processes:
            scores = self.scores(logits_BMV, seen)
            tokens = _noisiest(scores, noise_BMV)
        elif before is not None and noise_BMV is None and seen is None and not self._processes:
            if not weigh:
                return Drafts(before.shift.best(logits_BMV, before.token), None)
            tokens, scores = before.shift.likeliest(logits_BMV, before.token)
        else:
            tokens, scores = self._in_turn(logits_BMV, seen, noise_BMV, before)
        rejects = self.sampling.do_sample and not self.coupled
        likely = scores.softmax(-1).gather(2, tokens[:, :, None])[:, :, 0] if weigh else None
        return Drafts(tokens, scores if rejects else None, likely)

    def _in_turn(
        self, logits_BMV: Tensor, seen: Tensor | None, noise_BMV: Tensor | None, before: Before | None
    ) -> tuple[Tensor, Tensor]:
        """Choose slot by slot, each knowing those before it; returns tokens `[B, M]` and scores `[B, M, V]`."""
        tokens: list[Tensor] = []
        scores: list[Tensor] = []

        def choose(logits_BV: Tensor, slot: int) -> Tensor:
            noise_B1V = None if noise_BMV is None else noise_BMV[:, slot : slot + 1]
            scores.append(self._drafting(logits_BV[:, None], seen, tokens))
            tokens.append(_noisiest(scores[-1], noise_B1V))
            return tokens[-1][:, 0]

        if before is not None:
            before.shift.in_turn(logits_BMV, before.token, choose)
        else:
            for slot, logits_BV in enumerate(logits_BMV.unbind(1)):
                choose(logits_BV, slot)
        return torch.cat(tokens, dim=1), torch.cat(scores, dim=1)

    def _drafting(self, logits_B1V: Tensor, seen: Tensor | None, tokens: Sequence[Tensor]) -> Tensor:
        """Return the scores of a draft slot after some drafts."""
        if self.processing is None or not self._processes:
            return self.scores(logits_B1V, seen)
        path = torch.cat(list(tokens), dim=1)[0] if tokens else logits_B1V.new_empty(0, dtype=torch.long)
        return self.processing(logits_B1V, [path], drafting=True)

    @property
    def _as_they_are(self) -> bool:
        """Whether tokens are chosen by the model's logits, in whatever precision these are."""
        return not self.sampling.do_sample and self.sampling.repetition_penalty == 1.0 and self.processing is None

    @property
    def _processes(self) -> bool:
        return self.processing is not None and self.processing.processors is not None

    def judge(self, drafts: Drafts, logits_BM1V: Tensor, context: Context) -> Verdict:
        """Say which drafts stay and what comes after them."""
        if self._as_they_are:
            return accept.greedy(drafts.tokens_BM, logits_BM1V)
        if self.processing is not None and self._processes:
            scores = self.processing(logits_BM1V, chain(drafts.tokens_BM[0]))
        else:
            scores = self.scores(logits_BM1V, self._seen_along(drafts.tokens_BM, context))
        if self.processing is not None:
            self.processing.note(logits_BM1V, scores)
        if not self.sampling.do_sample:
            return accept.greedy(drafts.tokens_BM, scores)
        if drafts.scores_BMV is None:
            return accept.greedy(drafts.tokens_BM, scores + self._gumbel(scores, context, noise.TARGET))
        M, V = drafts.tokens_BM.shape[1], scores.shape[2]
        stream_B, position_BM1 = self._stream(context), _positions(context.position_B, M + 1)

        def residual(accepted_B: Tensor) -> Tensor:
            position_B1 = position_BM1.gather(1, accepted_B[:, None])
            return noise.gumbel(stream_B, position_B1, noise.RESIDUAL, V)[:, 0]

        return accept.rejection(
            drafts.tokens_BM,
            drafts.scores_BMV,
            scores,
            accept_BM=noise.uniform(stream_B, position_BM1[:, :M], noise.ACCEPT, 1)[:, :, 0],
            residual=residual,
        )

    def branch(self, logits_BMV: Tensor, context: Context) -> Tensor:
        """Return the scores `[B, M, V]` a draft tree is grown from; coupled trees share the backbone's noise.

        Others must not: which nodes there are decides where a cycle stops, and a stop chosen by the noise of positions
        that the next cycle draws anew would bias them.
        """
        coupled = self.sampling.do_sample and self.coupled
        noise_BMV = self._gumbel(logits_BMV, context, noise.TARGET) if coupled else None
        if self._processes:
            scores = self._in_turn(logits_BMV, None, noise_BMV, None)[1]  # after the likeliest of the slots before
        else:
            scores = self.scores(logits_BMV, self._seen(context))
        return scores if noise_BMV is None else scores + noise_BMV

    def choices(self, logits_BPV: Tensor, context: Context, tree: Tree) -> Tensor:
        """Return what the backbone writes after each node of a tree: `[B, P]`."""
        if self._as_they_are:
            return best(logits_BPV)
        seen_B1L = self._seen(context)
        seen = None
        if seen_B1L is not None:
            # The root adds nothing: the row contains its anchor already.
            token_BP = torch.cat([seen_B1L[:, 0, :1], tree.token_BN], dim=1)
            path_BPP = torch.where(tree.ancestor_BPP, token_BP[:, None], token_BP[:, :1, None])
            seen = _with(seen_B1L, path_BPP)
        if self.processing is not None and self._processes:
            scores = self.processing(logits_BPV, branches(tree))
        else:
            scores = self.scores(logits_BPV, seen)
        if self.processing is not None:
            self.processing.note(logits_BPV, scores, tree)
        if self.sampling.do_sample:
            position_BP = context.position_B[:, None] + tree.depth_BP + 1
            scores = scores + noise.gumbel(self._stream(context), position_BP, noise.TARGET, scores.shape[2])
        return best(scores)

    def scores(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """Process logits `[B, Q, V]` as the options say, in float32; greedy choosing skips what keeps the argmax.

        `seen` holds the tokens that each slot's text contains, `[B, Q or 1, L]`; some may be there twice.
        """
        scores = logits.float()
        s = self.sampling
        if s.repetition_penalty != 1.0 and seen is not None:
            seen, penalty = seen.expand(-1, scores.shape[1], -1), s.repetition_penalty
            before = scores.gather(2, seen)
            scores = scores.scatter(2, seen, torch.where(before < 0, before * penalty, before / penalty))
        if not s.do_sample:
            return scores
        warpers, flat = LogitsProcessorList(made(WARPERS, asdict(s))), scores.flatten(0, 1)
        # The warpers read scores only; the ids they are handed are never looked at.
        warped: Tensor = warpers(flat.new_empty(0, dtype=torch.long), flat)
        return warped.view_as(scores)

    def _seen(self, context: Context) -> Tensor | None:
        """Return what each row contains, `[B, 1, L]`, or None where that moves nothing."""
        penalises = self.sampling.repetition_penalty != 1.0
        return context.seen_BL[:, None] if penalises and context.seen_BL is not None else None

    def _seen_along(self, draft_BM: Tensor, context: Context) -> Tensor | None:
        """Return what each verify slot's text contains, the drafts before it included: `[B, M + 1, L + M]`."""
        seen_B1L, M = self._seen(context), draft_BM.shape[1]
        if seen_B1L is None:
            return None
        before_MM = torch.ones(M + 1, M, dtype=torch.bool, device=draft_BM.device).tril(-1)
        return _with(seen_B1L, torch.where(before_MM, draft_BM[:, None], seen_B1L[:, :, :1]))

    def _stream(self, context: Context) -> Tensor:
        """Return whose noise to draw: one per text where draft and backbone share it, else one per cycle."""
        if self.coupled:
            return context.stream_B
        return noise.fresh(context.stream_B, context.position_B)

    def _gumbel(self, scores: Tensor, context: Context, purpose: int) -> Tensor:
        position_BQ = _positions(context.position_B, scores.shape[1])
        return noise.gumbel(self._stream(context), position_BQ, purpose, scores.shape[2])


def _with(seen_B1L: Tensor, more_BQN: Tensor) -> Tensor:
    """Add what each slot's text contains beyond its row's: `[B, Q, L + N]`."""
    return torch.cat([seen_B1L.expand(-1, more_BQN.shape[1], -1), more_BQN], dim=2)


def _noisiest(scores_BMV: Tensor, noise_BMV: Tensor | None) -> Tensor:
    """Choose each slot's token, `[B, M]`."""
    return (scores_BMV if noise_BMV is None else scores_BMV + noise_BMV).argmax(-1)


def _positions(position_B: Tensor, count: int) -> Tensor:
    """Return the positions decided after the anchor: `[B, count]`."""
    return position_B[:, None] + torch.arange(1, count + 1, device=position_B.device)
