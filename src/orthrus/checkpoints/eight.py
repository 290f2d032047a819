"""A dual-view model in int8: which layers, and the few tokens by which their rounding is chosen."""

from typing import Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.kernels import merged
from orthrus.kernels.int8 import quantise, rounds_inputs
from orthrus.kernels.smoothing import Rounding, observed

TEXT: Final = '''The harbour lies north of the old town. Anna sold 12 apples on Monday and 3 times as many on Tuesday: \
12 * 3 = 36, so she sold 12 + 36 = 48 in all.

def mean(values):
    """Return the average of a list of numbers."""
    return sum(values) / len(values)

Why is the sky blue? Because air scatters short waves of light more than long ones.'''
"""Prose, sums and code, in which inputs of layers are observed."""

_TOKENS: Final = 128


def to_int8(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Turn the linear layers of backbone and view into int8 ones and the rest into float32, in place.

    Where inputs have 8 bits, layers are observed over a few tokens; without a tokenizer these are taken from all over
    the vocabulary.
    """
    groups = merged.groups(model)
    quantise(model, groups, roundings=_roundings(model, groups, tokenizer) if rounds_inputs() else {})
    model.float()


def _roundings(
    model: PreTrainedModel, groups: list[list[nn.Linear]], tokenizer: PreTrainedTokenizerBase | None
) -> dict[nn.Linear, Rounding]:
    ids_1T = _tokens(model, tokenizer)

    def run() -> None:
        model(input_ids=ids_1T, use_cache=False)
        model.base_model(input_ids=ids_1T, use_cache=False, view="diffusion")

    return observed(model, groups, run)


def _tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    most = min(_TOKENS, model.config.get_text_config().max_position_embeddings)
    if tokenizer is None:
        size = model.get_input_embeddings().weight.shape[0]
        return torch.linspace(0, size - 1, most, device=model.device).long()[None]
    ids: list[int] = tokenizer(TEXT)["input_ids"][:most]
    return torch.tensor([ids], device=model.device)
