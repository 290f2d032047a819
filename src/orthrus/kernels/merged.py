"""Linear layers that read the same input, multiplied as one: queries, keys and values; gate and up.

On a GPU a small matrix is read far more slowly than a large one. Weights of such layers come to lie one behind another,
and each layer's own is a view of its part.
"""

from contextlib import ExitStack
from itertools import accumulate, groupby

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from orthrus.kernels.shared import Shared
from orthrus.kernels.watched import PLAIN


class Merged(Shared["MergedLinear"]):
    """The weights of layers that read the same input."""

    def __init__(self, layers: list["MergedLinear"]) -> None:
        super().__init__(layers)
        self.packed = torch.cat([layer.weight.detach() for layer in layers])
        self.bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])

    def product(self, input: Tensor) -> Tensor:
        return linear(input, self.packed, self.bias)


class MergedLinear(nn.Linear):
    """A linear layer whose product is made with its neighbours': whichever is called first with an input makes all.

    Results are those of `nn.Linear` up to rounding, as between any two kernels. With gradients it is `nn.Linear`, and
    so is a copy of it. Weights may be written to; other tensors instead of them go unnoticed (`unmerge` first).
    """

    _merged: Merged | None = None
    _index = 0

    def forward(self, input: Tensor) -> Tensor:
        if self._merged is None or torch.is_grad_enabled():
            return linear(input, self.weight, self.bias)
        return self._merged.output(self._index, input)

    def __getstate__(self) -> dict[str, object]:
        """Leave what is shared out of copies of the layer."""
        return {name: value for name, value in self.__dict__.items() if name != "_merged"}


@torch.no_grad()
def merge(model: PreTrainedModel) -> PreTrainedModel:
    """Merge a dual-view model's linear layers that read the same input, found by a pass over one token in each view."""
    for group in groups(model):
        for layer in group:
            layer.__class__ = MergedLinear
        layers = [layer for layer in group if isinstance(layer, MergedLinear)]
        merged = Merged(layers)
        stops = list(accumulate(merged.sizes))
        for index, (layer, stop) in enumerate(zip(layers, stops, strict=True)):
            part = slice(stop - merged.sizes[index], stop)
            layer._merged, layer._index = merged, index
            layer.weight.data = merged.packed[part]
            if merged.bias is not None:
                layer.bias.data = merged.bias[part]
    return model


def unmerge(model: nn.Module) -> None:
    """Make merged layers plain ones again, each with weights of its own."""
    for layer in [module for module in model.modules() if type(module) is MergedLinear]:
        layer.__class__ = nn.Linear  # type: ignore[assignment]
        layer.__dict__.pop("_index", None)
        if layer.__dict__.pop("_merged", None) is not None:  # a copy may share its weights with the original
            for parameter in layer.parameters():
                parameter.data = parameter.data.clone()


def _is_plain(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear) or type(module.weight) not in PLAIN:  # quantised weights do not join
        return False
    return type(module) is nn.Linear or (isinstance(module, MergedLinear) and module._merged is None)


@torch.no_grad()
def groups(model: PreTrainedModel) -> list[list[nn.Linear]]:
    """Return the plain linear layers of one module that are called one after another with the very same tensor."""
    parents = {child: parent for parent in model.modules() for child in parent.children() if _is_plain(child)}
    out: list[list[nn.Linear]] = []
    grouped: set[nn.Linear] = set()
    calls: list[tuple[nn.Linear, Tensor]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Linear)
        calls.append((module, args[0]))

    for view in ("ar", "diffusion"):
        calls.clear()
        with ExitStack() as hooks:
            for child in parents:
                hooks.enter_context(child.register_forward_pre_hook(note))
            model.base_model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), view=view)
        for _, same in groupby(calls, key=lambda call: (id(call[1]), id(parents[call[0]]))):
            layers = [module for module, _ in same]
            alike = len({layer.bias is None for layer in layers}) == 1
            if len(layers) > 1 and alike and grouped.isdisjoint(layers):
                out.append(layers)
                grouped.update(layers)
    return out
