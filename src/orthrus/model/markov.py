"""A light dependency between neighbouring draft slots: what the token before makes likelier, by a matrix of low rank.

All slots of a block are filled in one pass and cannot know one another's choice. This adds to a slot's logits a row of
a vocabulary-by-vocabulary matrix, picked by the token before the slot: cheap enough to be added slot by slot, once the
draft before has been chosen. Knows tokens and how a model keeps the matrix; knows no pass and no choosing.

Shapes: V vocabulary, R rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from transformers import PreTrainedModel

NAME = "markov"
"""The attribute that holds a model's correction, and so the start of its tensors' names."""


class Markov(nn.Module):
    """A `[V, V]` matrix of rank R at most, as two trainable factors; zeros to begin with.

    The factor that stays unlearned for tokens never met is the one of zeros, so that these add nothing. The other is
    the same for every model of a shape, whatever else draws random numbers.
    """

    def __init__(self, vocabulary: int, rank: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        drawn_VR = torch.randn(vocabulary, rank, generator=torch.Generator().manual_seed(0), device="cpu")
        self.before_VR = nn.Parameter(torch.zeros(vocabulary, rank, device=device, dtype=dtype))
        self.after_VR = nn.Parameter(drawn_VR.to(device, dtype))

    def forward(self, token: Tensor) -> Tensor:
        """Return what each token adds to the logits of the slot after it: `[..., V]`."""
        return linear(embedding(token, self.before_VR), self.after_VR)

    def follow(
        self, logits_BMV: Tensor, anchor_B: Tensor, *, candidates: int, weigh: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Choose each slot's likeliest token given the one chosen before it, among each slot's likeliest by itself.

        All steps are found at once, for every candidate before, and then composed in log M rounds.

        Returns:
            Tokens `[B, M]`, and how probable each is: the candidates of a slot, shifted, share what probability they
            have together without the shift. None instead without `weigh`.
        """
        B, M, V = logits_BMV.shape
        K = min(candidates, V)
        score_BMK, token_BMK = logits_BMV.topk(K, dim=2)
        score_BMK = score_BMK.float()
        before_BMK = torch.cat([anchor_B[:, None, None].expand(B, 1, K), token_BMK[:, :-1]], dim=1)
        shifted_BMKK = score_BMK[:, :, None] + self.pairs(before_BMK, token_BMK)
        step_BMK, reach = shifted_BMKK.argmax(3), 1
        while reach < M:
            further = step_BMK[:, reach:].gather(2, step_BMK[:, :-reach])
            step_BMK, reach = torch.cat([step_BMK[:, :reach], further], dim=1), 2 * reach
        choice_BM1 = step_BMK[:, :, :1]
        chosen_BM = token_BMK.gather(2, choice_BM1)[:, :, 0]
        if not weigh:
            return chosen_BM, None
        past_BM1 = torch.nn.functional.pad(choice_BM1[:, :-1], (0, 0, 1, 0))
        own_BMK = shifted_BMKK.gather(2, past_BM1[..., None].expand(B, M, 1, K))[:, :, 0]
        mass_BM1 = (score_BMK.logsumexp(2, keepdim=True) - logits_BMV.float().logsumexp(2, keepdim=True)).exp()
        likely_BM1 = own_BMK.softmax(2).gather(2, choice_BM1) * mass_BM1
        return chosen_BM, likely_BM1[:, :, 0]

    def pairs(self, before: Tensor, after: Tensor) -> Tensor:
        """Return what each of F tokens before adds to the logit of each of K tokens after: `[..., F, K]`."""
        return embedding(before, self.before_VR) @ embedding(after, self.after_VR).transpose(-2, -1)


class Before(NamedTuple):
    """The tokens before some slots, and what tokens add to the logits of the slot after them."""

    token: Tensor
    shift: Markov


def untrained(model: PreTrainedModel, rank: int) -> Markov | None:
    """Make a correction for a model's vocabulary, where its embedding lies; None for rank 0."""
    if rank == 0:
        return None
    weight = model.get_input_embeddings().weight
    return Markov(weight.shape[0], rank, device=weight.device, dtype=weight.dtype)


def install(model: PreTrainedModel, correction: Markov | None) -> None:
    """Give a model this correction in place of the one it has, if any; None leaves it without."""
    if markov_of(model) is not None:
        delattr(model, NAME)
    if correction is not None:
        setattr(model, NAME, correction)


def markov_of(model: nn.Module) -> Markov | None:
    """Return a model's correction, or None."""
    correction = getattr(model, NAME, None)
    return correction if isinstance(correction, Markov) else None
