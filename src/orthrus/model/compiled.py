"""Decoding passes through torch.compile: one graph per kind of pass, whatever the lengths.

Knows how a model's forward is compiled and what CUDA graphs ask of buffers; knows no pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_ATTRIBUTE = "_orthrus_compiled"

SPAN = 256
"""Cache slots in reach are rounded up to a multiple of this, so that lengths do not make a CUDA graph each."""

_RECOMPILES = 64  # views, widths of one and more, one row and more, which rows are projected


def compile_passes(model: PreTrainedModel, *, backend: "str | Callable[..., Any]" = "inductor") -> None:
    """Compile a model's decoding passes from now on, at their first use; on CUDA with CUDA graphs.

    Prefill stays eager. Logits are those of eager passes up to rounding, as between any two kernels.
    """
    mode = "reduce-overhead" if model.device.type == "cuda" and backend == "inductor" else None
    model.__dict__[_ATTRIBUTE] = torch.compile(model.forward, dynamic=True, mode=mode, backend=backend)


def is_compiled(model: PreTrainedModel) -> bool:
    """Tell whether decoding passes are compiled."""
    return _ATTRIBUTE in model.__dict__


def run(model: PreTrainedModel, arguments: dict[str, Any]) -> Tensor:
    """Call a compiled model; returns logits that later passes leave alone."""
    forward: Callable[..., Any] = model.__dict__[_ATTRIBUTE]
    with torch._dynamo.config.patch(recompile_limit=_RECOMPILES):
        if model.device.type != "cuda":
            logits: Tensor = forward(**arguments).logits
            return logits
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        # What a CUDA graph returns is overwritten by its next run.
        copied: Tensor = forward(**arguments).logits.clone()
        return copied
