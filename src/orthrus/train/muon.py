"""Muon, in batches: matrices of one shape, or their attention heads, are orthogonalised together.

A head of 64 rows takes a ninth of the operations of a matrix of nine such heads, and a batch keeps small matrices from
being bound by overhead. Shapes: L matrices, H heads, R rows, C columns.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from orthrus.kernels.native import multiplies
from orthrus.train.sharding import part

_POLYNOMIAL: Final = (3.4445, -4.7750, 2.0315)  # torch.optim.Muon's
_STEPS: Final = 5
_AT_ONCE: Final = 1 << 19  # numbers of a batch on a CPU: they stay in fast memory
_AT_ONCE_ON_GPU: Final = 1 << 26
_OUTPUT = "o_proj"  # whose heads are columns, in every architecture of transformers that `attach` serves


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are orthogonalised per head; equal to `torch.optim.Muon` for matrices of one head.

    `heads` are matrices with the number of heads that their rows are cut into, or their columns where negative; `lr` is
    scaled to the update size of AdamW (`match_rms_adamw`), by the shape of a head.
    """

    def __init__(
        self, heads: Mapping[nn.Parameter, int], *, lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        groups: dict[tuple[Any, ...], list[nn.Parameter]] = {}
        for parameter, count in heads.items():
            groups.setdefault((tuple(parameter.shape), count), []).append(parameter)
        super().__init__(
            [{"params": parameters, "heads": count} for (_, count), parameters in groups.items()],
            {"lr": lr, "weight_decay": weight_decay, "momentum": momentum},
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            most = _AT_ONCE if parameters[0].is_cpu else _AT_ONCE_ON_GPU
            batch = max(1, most // parameters[0].numel())
            for first in range(0, len(parameters), batch):
                self._move(parameters[first : first + batch], group)

    def _move(self, parameters: Sequence[nn.Parameter], group: Mapping[str, Any]) -> None:
        # bfloat16 is precise enough, and float32 faster on a CPU that lacks its products.
        wide = parameters[0].is_cpu and not multiplies(torch.bfloat16)
        dtype = torch.float32 if wide else torch.bfloat16
        updates = [self._momentum(p, group["momentum"]) for p in parameters]
        heads_LHRC = torch.stack([_cut(_whole(update.to(dtype)), group["heads"]) for update in updates])
        R, C = heads_LHRC.shape[2:]
        heads_LHRC = orthogonal(heads_LHRC.flatten(0, 1)).view_as(heads_LHRC)
        rate = group["lr"] * 0.2 * max(R, C) ** 0.5
        for parameter, heads_HRC in zip(parameters, heads_LHRC, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(part(_joined(heads_HRC, group["heads"]), parameter), alpha=-rate)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        buffer = state.setdefault("momentum_buffer", torch.zeros_like(gradient))
        buffer.lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum)  # Nesterov's


def orthogonal(matrix_LRC: Tensor, epsilon: float = 1e-7) -> Tensor:
    """Bring the singular values of each matrix near one, by Newton-Schulz steps in the matrices' dtype."""
    a, b, c = _POLYNOMIAL
    wide = matrix_LRC.shape[1] <= matrix_LRC.shape[2]
    x = matrix_LRC if wide else matrix_LRC.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=epsilon)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def heads_of(model: nn.Module, matrices: Mapping[str, nn.Parameter]) -> dict[nn.Parameter, int]:
    """Return matrices by the heads they are cut into: an attention's, else one; columns' numbers are negative."""
    sizes = {
        f"{name}.{inner}": int(module.head_dim)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "head_dim", None), int)
        for inner, _ in module.named_parameters(recurse=True)
    }
    heads: dict[nn.Parameter, int] = {}
    for name, parameter in matrices.items():
        columns = name.split(".")[-2] == _OUTPUT
        size, length = sizes.get(name), parameter.shape[1 if columns else 0]
        count = 1 if size is None or length % size else length // size
        heads[parameter] = -count if columns else count
    return heads


def _whole(matrix_RC: Tensor) -> Tensor:
    """Gather a matrix that processes share: their parts may end in the middle of a head."""
    return matrix_RC.full_tensor() if isinstance(matrix_RC, DTensor) else matrix_RC


def _cut(matrix_RC: Tensor, heads: int) -> Tensor:
    """Cut a matrix by rows, or by columns where the number is negative: `[H, rows, columns]`."""
    if heads > 0:
        return matrix_RC.view(heads, -1, matrix_RC.shape[1])
    return matrix_RC.view(matrix_RC.shape[0], -heads, -1).transpose(0, 1)


def _joined(heads_HRC: Tensor, heads: int) -> Tensor:
    return heads_HRC.flatten(0, 1) if heads > 0 else heads_HRC.transpose(0, 1).flatten(1)
