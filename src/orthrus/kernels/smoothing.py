"""How the inputs of linear layers are best rounded to integers, as observed in a pass over a few tokens.

Where some channels of an input are far larger than the rest for all tokens, they are divided by a factor that goes into
the weights (SmoothQuant, arXiv 2211.10438). Where they change from token to token, as behind a gated activation, no
factor helps, and rows are rounded as they come.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final

import torch
from torch import Tensor, nn

_SPIKY: Final = 9.0
"""Beyond so many times its root mean square, a row's largest element is not of its channel, and factors do not help.

Rows of SmolLM2 are at 3 to 8 when smooth, those before `down_proj` at 7 to 19 (lab/2026-11.md)."""
_LEAST: Final = 0.01
"""Of a row's root mean square: channels that were smaller in these few tokens may be larger in others."""
_TINY: Final = 1e-6


@torch.no_grad()
def observed(
    model: nn.Module, groups: Sequence[Sequence[nn.Linear]], run: Callable[[], object]
) -> dict[nn.Linear, Tensor | None]:
    """Return the factor for the input of each plain linear layer that a pass (`run`) calls; those of a group have one.

    The pass runs on one thread, so that the outcome does not depend on their number.
    """
    members = {layer: list(group) for group in groups for layer in group}
    out: dict[nn.Linear, Tensor | None] = {}

    def look(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Linear)
        group = members.get(layer, [layer])
        if layer not in out:
            out.update(dict.fromkeys(group, factor_for(args[0], [one.weight for one in group])))

    with ExitStack() as hooks, _one_thread():
        for layer in model.modules():
            if type(layer) is nn.Linear:
                hooks.enter_context(layer.register_forward_pre_hook(look))
        run()
    return out


def factor_for(input: Tensor, weights: Sequence[Tensor]) -> Tensor | None:
    """Return the factor `[in]`, in float32, by which rows like those of an input `[..., in]` are best multiplied.

    None where they are best rounded as they come. Rows count alike, whatever their size. A channel is divided by the
    root of its size over the size of its `weights` `[out, in]`: both are root mean squares, so that what rounding adds
    to the channel's products comes evenly from either.
    """
    rows_RI = input.detach().reshape(-1, input.shape[-1]).float()
    rows_RI = rows_RI[rows_RI.isfinite().all(-1) & (rows_RI != 0).any(-1)]
    if not len(rows_RI):
        return None
    rows_RI = rows_RI / _size(rows_RI, -1, keepdim=True)
    weights_I = torch.stack([weight.detach().float().square().sum(0) for weight in weights]).sum(0)
    weights_I = (weights_I / sum(map(len, weights))).sqrt()
    factor_I = (weights_I.clamp_min(_TINY) / _size(rows_RI, 0).clamp_min(_LEAST)).sqrt()
    smooth_RI = rows_RI * factor_I
    spikes_R = smooth_RI.abs().amax(-1) / _size(smooth_RI, -1)
    return factor_I if spikes_R.median() <= _SPIKY else None


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
