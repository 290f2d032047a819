"""The processes of one run: which rows each computes, and how their sums become the step's.

Process groups come from the environment that `torchrun` or `accelerate launch` sets; without one there is a single
process and nothing here costs anything.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

import numpy as np
import torch
import torch.distributed
from accelerate import PartialState
from numpy.typing import NDArray
from torch import nn
from torch.distributed.tensor import DTensor

from orthrus.errors import ConfigError

Sums = dict[str, tuple[float, float]]


class Ranks:
    """All processes of a run (`count`), seen from one of them (`index`); the `main` one writes logs and models."""

    def __init__(self, device: str) -> None:
        self._state = PartialState(cpu=device == "cpu")
        self.count, self.index = int(self._state.num_processes), int(self._state.process_index)
        self.main = bool(self._state.is_main_process)

    def share(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """This process's equal part of some rows. Raises ConfigError: the rows cannot be shared equally."""
        if len(rows) % self.count:
            raise ConfigError(
                f"rows of a part of a step (run.batch_rows / run.grad_accumulation) must be a multiple of the "
                f"processes ({self.count}), found {len(rows)}"
            )
        return np.split(rows, self.count)[self.index]

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes; those of sharded parameters are sums already."""
        held = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
        if self.count == 1 or not held:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in held]
        whole = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(whole)
        for parameter, part in zip(held, torch.split(whole, [p.numel() for p in held]), strict=True):
            parameter.grad = part.view_as(parameter)

    def add(self, sums: Mapping[str, tuple[float, float]]) -> Sums:
        """Add up (sum, count) pairs over all processes; names and their order must be the same everywhere."""
        if self.count == 1:
            return dict(sums)
        whole = torch.tensor(list(sums.values()), dtype=torch.float64, device=self._state.device)
        torch.distributed.all_reduce(whole)
        return {name: (total, count) for name, (total, count) in zip(sums, whole.tolist(), strict=True)}

    def any(self, here: bool) -> bool:
        """Whether something holds in at least one process."""
        return self.add({"": (float(here), 1.0)})[""][0] > 0

    def main_first(self) -> AbstractContextManager[None]:
        """Let the main process through a block before the others."""
        first: AbstractContextManager[None] = self._state.main_process_first()
        return first

    def wait(self) -> None:
        self._state.wait_for_everyone()
