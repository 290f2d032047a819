"""From hidden states to logits, as a model's own forward does it; for callers that hold hidden states only.

Knows the few scalings that architectures put around their output head; refuses those it does not know.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from orthrus.errors import UnsupportedModel

_UNKNOWN = ("logits_scaling", "logit_scale", "output_multiplier_scale", "lm_head_multiplier")


def output_head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Return the function from hidden states `[..., C]` to logits `[..., V]`.

    Raises:
        UnsupportedModel: the architecture scales its logits in a way not written down here.
    """
    config = model.config.get_text_config()
    for name in _UNKNOWN:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise UnsupportedModel(f"{type(model).__name__} scales its logits by {name}: training it is not served yet")
    head = model.get_output_embeddings()
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is None:
        return head  # type: ignore[no-any-return]
    return lambda hidden: torch.tanh(head(hidden) / cap) * cap
