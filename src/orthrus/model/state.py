"""What a model computes with: all that decides its results to the last bit, and how long they take."""

from typing import Any

from transformers import PreTrainedModel

from orthrus.memory import machine
from orthrus.model.checkpoint import weights_digest
from orthrus.model.compiled import is_compiled
from orthrus.model.packed import kernels_of


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
