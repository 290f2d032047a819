"""A model whose linear layers compute as llama.cpp does with a form of weights: the same rounded values, in float32.

It shows what a form costs, and is slow; files for llama.cpp may keep another form for the output head.
"""

import importlib.util
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

from orthrus.errors import ConfigError

FORMS: Final = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
_BLOCK: Final = 32
_LARGEST: Final = 127


def require_forms(forms: Sequence[str]) -> None:
    """Check the names of forms; raises ConfigError, also where the package gguf is missing."""
    if unknown := [form for form in forms if form not in FORMS]:
        raise ConfigError(f"a form of weights is one of {', '.join(FORMS)}, found {unknown[0]!r}")
    if forms and importlib.util.find_spec("gguf") is None:
        raise ConfigError("forms of weights need the package gguf, found none: pip install 'orthrus-lm[peers]'")


@torch.no_grad()
def round_as(form: str, model: nn.Module) -> None:
    """Round the weights of a model's linear layers to a form, in place, and from now on their inputs, too.

    Raises ConfigError for inputs that are no multiple of 32, which llama.cpp leaves in 16 bits.
    """
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[form.upper()]
    seen: set[int] = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        if layer.in_features % _BLOCK:
            raise ConfigError(f"{form} takes inputs in blocks of {_BLOCK}, found {layer.in_features} in {name}")
        if id(layer.weight) not in seen:  # an output head may be the table of embeddings
            seen.add(id(layer.weight))
            values = quants.dequantize(quants.quantize(layer.weight.float().cpu().numpy(), kind), kind)
            layer.weight.copy_(torch.from_numpy(values))
        layer.register_forward_pre_hook(lambda _, args: (in_blocks(args[0]),))


def in_blocks(input: Tensor) -> Tensor:
    """Round an input `[..., in]` to integers up to 127 times a scale in float16 for each 32, as Q8_0 does."""
    blocks = input.float().reshape(*input.shape[:-1], -1, _BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True) / _LARGEST
    integers = (blocks / scale).round().nan_to_num(0)
    return (integers * scale.half().float()).reshape(input.shape).to(input.dtype)
