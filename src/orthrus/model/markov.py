"""A light dependency between neighbouring draft slots: what the token before makes likelier, by a matrix of low rank.

All slots of a block are filled in one pass and cannot know one another's choice. This adds to a slot's logits a row of
a vocabulary-by-vocabulary matrix, picked by the token before the slot. Shapes: V vocabulary, R rank.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from transformers import PreTrainedModel

from orthrus.kernels.vocabulary import choosing
from orthrus.kernels.watched import state_of, watch

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
        self._copies: tuple[object, _Copies] | None = None  # what they are copies of, and the copies

    def forward(self, token: Tensor, after: Tensor | None = None) -> Tensor:
        """Return what each token adds to the logits of the slot after it: `[..., V]`, or to those of `after` alone."""
        after_VR = self.after_VR if after is None else self.after_VR[after]
        return linear(embedding(token, self.before_VR), after_VR)

    def in_turn(self, logits_BMV: Tensor, anchor_B: Tensor, choose: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Choose each slot's token in turn, its logits shifted by the token before it; returns `[B, M]`.

        Among all tokens, not a few that are likely by themselves: where one token all but decides the next, the slot
        need not know it.

        Args:
            logits_BMV: what the view says of every slot.
            anchor_B: the tokens before the first slots.
            choose: a slot's shifted logits `[B, V]`, in float32, and its number to tokens `[B]`.
        """
        before_VR, after_RV = self._in_float32()[:2]
        token_B, chosen = anchor_B, []
        for slot, logits_BV in enumerate(logits_BMV.float().unbind(1)):
            token_B = choose(torch.addmm(logits_BV, embedding(token_B, before_VR), after_RV), slot)
            chosen.append(token_B)
        return torch.stack(chosen, dim=1)

    def likeliest(self, logits_BMV: Tensor, anchor_B: Tensor) -> tuple[Tensor, Tensor]:
        """Choose each slot's likeliest token in turn; returns them, `[B, M]`, and their slots' shifted logits."""
        tokens_BM, shifted_BMK = self._chain(logits_BMV, anchor_B)
        shifted_K = self._in_float32().shifted_K
        if shifted_K is None:
            return tokens_BM, shifted_BMK
        return tokens_BM, logits_BMV.float().index_copy(-1, shifted_K, shifted_BMK)

    def best(self, logits_BMV: Tensor, anchor_B: Tensor) -> Tensor:
        """Choose each slot's likeliest token in turn, `[B, M]`."""
        if (choose := choosing(logits_BMV)) is None:
            return self._chain(logits_BMV, anchor_B)[0]
        copies = self._in_float32()
        return choose(logits_BMV, anchor_B, copies.before_VR, copies.after_VR, copies.length_V)

    def _chain(self, logits_BMV: Tensor, anchor_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return each slot's likeliest token after the one before, and the logits of tokens that are shifted.

        Tokens that the correction leaves as they are, such as those that no training answer held, are compared once.
        Of equals the first token is chosen.
        """
        before_VR, _, after_RK, shifted_K, *_ = self._in_float32()
        some_BMK = (logits_BMV if shifted_K is None else logits_BMV[..., shifted_K]).float()
        others = None if shifted_K is None else logits_BMV.index_fill(-1, shifted_K, -torch.inf).max(-1)
        token_B, chosen, shifted = anchor_B, [], []
        for slot, logits_BK in enumerate(some_BMK.unbind(1)):
            shifted.append(torch.addmm(logits_BK, embedding(token_B, before_VR), after_RK))
            top = shifted[-1].max(-1)
            token_B = top.indices
            if shifted_K is not None and others is not None:
                token_B, other_B, value_B = shifted_K[token_B], others.indices[:, slot], others.values[:, slot]
                ahead_B = (top.values > value_B) | ((top.values == value_B) & (token_B < other_B))
                token_B = torch.where(ahead_B, token_B, other_B)
            chosen.append(token_B)
        return torch.stack(chosen, dim=1), torch.stack(shifted, dim=1)

    def _in_float32(self) -> "_Copies":
        """Return copies of the factors, which are kept until these change."""
        factors = (self.before_VR, self.after_VR)
        state = tuple(map(state_of, factors))
        if self._copies is None or self._copies[0] != state:
            for factor in factors:
                watch(factor)
            with torch.inference_mode(False), torch.no_grad():
                after_RV = factors[1].float().t().contiguous()
                shifted_K = after_RV.any(0).nonzero()[:, 0]
                few = 0 < len(shifted_K) <= after_RV.shape[1] // 2
                after_RK = after_RV[:, shifted_K].contiguous() if few else after_RV
                narrow_VR = factors[1].bfloat16().contiguous()
                after_VR = narrow_VR if torch.equal(narrow_VR.float().t(), after_RV) else after_RV.t().contiguous()
                before_VR, length_V = factors[0].float().contiguous(), after_RV.norm(dim=0)
                shifted = shifted_K if few else None
                self._copies = state, _Copies(before_VR, after_RV, after_RK, shifted, after_VR, length_V)
        return self._copies[1]

    def pairs(self, before: Tensor, after: Tensor) -> Tensor:
        """Return what each of F tokens before adds to the logit of each of K tokens after: `[..., F, K]`."""
        return embedding(before, self.before_VR) @ embedding(after, self.after_VR).transpose(-2, -1)


class _Copies(NamedTuple):
    """Both factors in float32, the second one transposed; where it shifts at most half of all tokens, their columns.

    And for the operator the second one as it is, in bfloat16 where that holds all its numbers, and its rows' lengths.
    """

    before_VR: Tensor
    after_RV: Tensor
    after_RK: Tensor
    shifted_K: Tensor | None
    after_VR: Tensor
    length_V: Tensor


class Before(NamedTuple):
    """The tokens before some slots, and what tokens add to the logits of the slot after them, or of `after` alone."""

    token: Tensor
    shift: Markov
    after: Tensor | None = None


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
    correction = getattr(model, NAME, None)
    return correction if isinstance(correction, Markov) else None
