"""Products of layers that read the same input, made as one: queries, keys and values; gate and up."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

_Layer = TypeVar("_Layer", bound=nn.Module)


class Shared(ABC, Generic[_Layer]):
    """Multiply an input by the weights of all layers when the first of them, or any with another input, is called."""

    def __init__(self, layers: Sequence[_Layer]) -> None:
        self.layers = list(layers)
        self.packed: Any = None  # the weights as the product reads them
        self.sizes: list[Any] = [layer.out_features for layer in layers]
        self._input: Tensor | None = None
        self._outputs: Sequence[Tensor] = ()

    def output(self, index: int, input: Tensor) -> Tensor:
        """Return one layer's part; the last one's call lets go of the others'."""
        if len(self.sizes) == 1:
            return self.product(input)
        if index == 0 or self._input is not input:
            self._input, self._outputs = input, torch.split(self.product(input), self.sizes, -1)
        output = self._outputs[index]
        if index == len(self.sizes) - 1:
            self._input, self._outputs = None, ()
        return output

    @abstractmethod
    def product(self, input: Tensor) -> Tensor:
        """Return the outputs of all layers, one after another."""
