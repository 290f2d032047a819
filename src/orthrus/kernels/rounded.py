"""Linear layers with weights rounded to integers, for inference on CPUs: what all forms of them have in common."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from orthrus.errors import ConfigError, UnsupportedModel
from orthrus.kernels.shared import Shared
from orthrus.kernels.watched import PLAIN


class RoundedLinear(nn.Module):
    """A linear layer with rounded weights, which multiplies an input as one with other layers that read it.

    What products read is made of the weights at the first use, and again after `load_state_dict`; nothing else may
    write to them.
    """

    precision: ClassVar[str]
    shared: ClassVar[type[Shared[Any]]]
    """The product of layers that read the same input."""
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear, weight: Tensor) -> None:
        """Take a layer's rounded weights; its bias is taken as it is."""
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = layer.bias
        self._shared: Shared[Any] | None = None
        self._index = 0
        self.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return `input @ weight.T + bias` in the input's dtype."""
        if self._shared is None:
            self._shared, self._index = self.shared([self]), 0
        return self._shared.output(self._index, input)

    @abstractmethod
    def dequantised(self) -> Tensor:
        """Return the weight in float32."""

    @classmethod
    def joins(cls, layers: Sequence["RoundedLinear"]) -> bool:
        """Tell whether layers of one input have one product."""
        return all(type(layer) is cls for layer in layers)

    def forget(self) -> None:
        if self._shared is not None:
            self._shared.packed = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.forget()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if fn(self.weight[:0]).device.type != "cpu":
            raise ConfigError(
                f"{self.precision} layers are for CPUs: load the model again, with another dtype for another device"
            )
        kept = dict(self._buffers)  # float32 whatever the rest becomes
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(kept)
        self.forget()
        return self

    def __getstate__(self) -> dict[str, object]:
        """Leave what is shared and what was made of the weights out of copies of the layer."""
        return {**self.__dict__, "_shared": None, "_index": 0}

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def biases_of(layers: Sequence[RoundedLinear]) -> Tensor | None:
    """Return the biases of layers one after another, in float32; None where they have none."""
    biases = [layer.bias.detach().float() for layer in layers if layer.bias is not None]
    return torch.cat(biases) if biases else None


def refuse_gradients(input: Tensor, precision: str) -> None:
    """Check that no gradient is wanted of an input; raises UnsupportedModel."""
    if input.requires_grad and torch.is_grad_enabled():
        raise UnsupportedModel(
            f"{precision} layers pass no gradients on: train in floating point, and decode in {precision}"
        )


def replace(
    model: nn.Module, groups: Sequence[Sequence[nn.Linear]], form: Callable[[nn.Linear], RoundedLinear | None]
) -> None:
    """Replace a model's linear layers by rounded ones, in place; their floating-point weights are let go.

    Layers of a group read the same input, one after another in this order. `form` rounds a layer; None for those that
    stay.
    """
    made: dict[nn.Module, RoundedLinear] = {}
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or type(layer) is not nn.Linear or type(layer.weight) not in PLAIN:
            continue
        with torch.inference_mode(False), torch.no_grad():  # tensors made in inference mode are never written to again
            rounded = form(layer)
        if rounded is not None:
            made[layer] = rounded
            layer._parameters.clear()
            model.set_submodule(name, rounded)
    setattr(model, "save_pretrained", partial(_refused, rounded_to(model)))  # noqa: B010 (a method to everyone else)
    for group in groups:
        layers = [made[layer] for layer in group if layer in made]
        if len(layers) == len(group) and type(layers[0]).joins(layers):
            shared = type(layers[0]).shared(layers)
            for index, layer in enumerate(layers):
                layer._shared, layer._index = shared, index


def _refused(precision: str | None, *_: object, **__: object) -> None:
    raise UnsupportedModel(f"weights in {precision} are not saved: load the model in floating point")


def rounded_to(model: nn.Module) -> str | None:
    """Return what a model's weights are rounded to, as `load` calls it; None for a model without such layers."""
    found = {module.precision for module in model.modules() if isinstance(module, RoundedLinear)}
    return min(found, default=None)  # int4, where a layer that its blocks do not fit is in int8
