"""Gradient checkpointing of a pass: decoder layers keep their inputs only and compute the rest again when needed.

transformers' own drops the cache that the block pass reads, and wants a model in training mode.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Let the forward passes in this block be computed again in the backward pass, layer by layer."""
    for layer in layers:
        # An attribute of the instance: found before the class's own, and gone when deleted.
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
