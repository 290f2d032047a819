"""A dual-view model in int8 or int4: which layers, and the few tokens by which int8 chooses its rounding."""

from typing import Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.errors import ConfigError
from orthrus.kernels import attention, blocks, compiled, int8, merged
from orthrus.kernels.rounded import RoundedLinear, replace
from orthrus.kernels.smoothing import observed
from orthrus.model.fingerprint import of_view

INTEGERS: Final = ("int8", "int4")
"""What linear layers are rounded to, as `load` calls it."""

TEXT: Final = '''The harbour lies north of the old town. Anna sold 12 apples on Monday and 3 times as many on Tuesday: \
12 * 3 = 36, so she sold 12 + 36 = 48 in all.

def mean(values):
    """Return the average of a list of numbers."""
    return sum(values) / len(values)

Why is the sky blue? Because air scatters short waves of light more than long ones.'''
"""Prose, sums and code, in which inputs of layers are observed."""

_TOKENS: Final = 128


def computes(precision: str) -> bool:
    """Tell whether layers in a precision compute on this CPU."""
    return int8.is_exact() if precision == "int8" else compiled.compiles()


def require(precision: str, device: torch.device) -> None:
    """Check that layers in a precision compute here; raises ConfigError where they do not."""
    if device.type != "cpu":
        raise ConfigError(
            f"dtype {precision} is for CPUs, found device {str(device)!r}: choose the device cpu, or another dtype"
        )
    int8.require() if precision == "int8" else blocks.operator()


def to_integers(model: PreTrainedModel, precision: str, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Turn the linear layers of backbone and view into such of a precision and the rest into float32, in place.

    Where inputs of int8 have 8 bits, layers are observed over a few tokens. In int4, the output head and the view have
    blocks of 8 bits; layers that have none (`blocks.fits`) are in int8, where that computes. Keys are kept in
    bfloat16 where the CPU multiplies in it.
    """
    groups = merged.groups(model)
    if precision == "int8":
        factors = _factors(model, groups, tokenizer) if int8.rounds_inputs() else {}
        int8.quantise(model, groups, factors=factors)
    else:
        finer = {module for name, module in model.named_modules() if of_view(name)} | {model.get_output_embeddings()}

        def form(layer: nn.Linear) -> RoundedLinear | None:
            if blocks.fits(layer):
                return blocks.BlockLinear(layer, 8 if layer in finer else 4)
            return int8.Int8Linear(layer) if int8.is_exact() else None

        replace(model, groups, form)
    model.float()
    attention.round_keys(model)
    blocks.pack(model)


def _factors(
    model: PreTrainedModel, groups: list[list[nn.Linear]], tokenizer: PreTrainedTokenizerBase | None
) -> dict[nn.Linear, Tensor | None]:
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
