"""What a model computes with: all that decides its results to the last bit, and how long they take."""

from typing import Any

import torch
from transformers import PreTrainedModel

from orthrus.memory import machine, settings
from orthrus.model.checkpoint import weights_digest
from orthrus.model.compiled import is_compiled
from orthrus.model.packed import kernels_of


def key_of(model: PreTrainedModel) -> tuple[object, ...]:
    """Return what tells within a process whether a model still computes as it did: cheap, and no weights."""
    kernels = (model.config._attn_implementation, is_compiled(model), kernels_of(model))
    return (str(model.device), model.dtype, *kernels, torch.get_num_threads(), *settings(model.device))


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    """Return weights (their digest), dtype, machine and kernels of a model as it stands, as JSON values."""
    return {
        "weights": weights_digest(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "machine": machine(model.device),
        "attention": model.config._attn_implementation,
        "compiled": is_compiled(model),
        "packed": sorted(map(str, kernels_of(model))),
    }
