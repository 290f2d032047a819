"""How the inputs of linear layers are best rounded to integers, as observed in a pass over a few tokens.

Where some channels of an input are far larger than the rest for all tokens, they are divided by a factor that goes into
the weights (SmoothQuant, arXiv 2211.10438). Where they change from token to token, as behind a gated activation, no
factor helps, and rows are rounded as they come.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

_SPIKY: Final = 9.0
"""Beyond so many times its root mean square, a row's largest element is not of its channel, and factors do not help.

Rows of SmolLM2 are at 3 to 8 when smooth, those before `down_proj` at 7 to 19 (lab/2026-11.md)."""
_LEAST: Final = 0.01
"""Of a row's root mean square: channels that were smaller in these few tokens may be larger in others."""
_TINY: Final = 1e-6


class Rounding(NamedTuple):
    """How an input is rounded: multiplied by a factor `[in]` before, in float32."""

    factor: Tensor | None = None


PLAINLY: Final = Rounding()


@torch.no_grad()
def observed(
    model: nn.Module, groups: Sequence[Sequence[nn.Linear]], run: Callable[[], object]
) -> dict[nn.Linear, Rounding]:
    """Return how each plain linear layer that a pass (`run`) calls should round its input; those of a group, alike.

    The pass runs on one thread, so that the outcome does not depend on their number.
    """
    members = {layer: list(group) for group in groups for layer in group}
    out: dict[nn.Linear, Rounding] = {}

    def look(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Linear)
        group = members.get(layer, [layer])
        if layer not in out:
            out.update(dict.fromkeys(group, rounding_for(args[0], [one.weight for one in group])))

    layers = [module for module in model.modules() if type(module) is nn.Linear]
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        with _one_thread():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return out


def rounding_for(input: Tensor, weights: Sequence[Tensor]) -> Rounding:
    """Return how rows like those of an input `[..., in]` are best rounded for weights `[out, in]`.

    Rows count alike, whatever their size. A channel is divided by the root of its size over its weights' size: both
    are root mean squares, so that what rounding adds to the channel's products comes evenly from either.
    """
    rows_RI = input.detach().reshape(-1, input.shape[-1]).float()
    rows_RI = rows_RI[rows_RI.isfinite().all(-1) & (rows_RI != 0).any(-1)]
    if not len(rows_RI):
        return PLAINLY
    rows_RI = rows_RI / _size(rows_RI, -1, keepdim=True)
    weights_I = torch.stack([weight.detach().float().square().sum(0) for weight in weights]).sum(0)
    weights_I = (weights_I / sum(map(len, weights))).sqrt()
    factor_I = (weights_I.clamp_min(_TINY) / _size(rows_RI, 0).clamp_min(_LEAST)).sqrt()
    smooth_RI = rows_RI * factor_I
    spikes_R = smooth_RI.abs().amax(-1) / _size(smooth_RI, -1)
    return Rounding(factor_I) if spikes_R.median() <= _SPIKY else PLAINLY


def _size(values: Tensor, dim: int, *, keepdim: bool = False) -> Tensor:
    return values.square().mean(dim, keepdim=keepdim).sqrt()


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
