"""From hidden states to logits, as a model's own forward does it; refuses scalings that it does not know."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from orthrus.errors import UnsupportedModel

_UNKNOWN = ("logits_scaling", "logit_scale", "output_multiplier_scale", "lm_head_multiplier")


def output_head(model: PreTrainedModel, tokens: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Return the function from hidden states `[..., C]` to logits `[..., V]`, or to those of some tokens alone.

    Raises UnsupportedModel: the architecture scales its logits in a way not written down here.
    """
    config = model.config.get_text_config()
    for name in _UNKNOWN:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise UnsupportedModel(f"{type(model).__name__} scales its logits by {name}: training it is not served yet")
    head = model.get_output_embeddings()
    if tokens is not None:
        bias = None if getattr(head, "bias", None) is None else head.bias[tokens]
        head = partial(linear, weight=head.weight.detach()[tokens], bias=bias)
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is None:
        return head  # type: ignore[no-any-return]
    return lambda hidden: torch.tanh(head(hidden) / cap) * cap


@contextmanager
def projecting(model: PreTrainedModel, index_BN: Tensor) -> Iterator[None]:
    """Let a model compute the logits `[B, N, V]` of some rows alone, each text's own, inside the block."""

    def some(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (given[0].gather(1, index_BN[:, :, None].expand(-1, -1, given[0].shape[2])),)

    with model.get_output_embeddings().register_forward_pre_hook(some):
        yield
