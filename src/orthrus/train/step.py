"""One optimizer step: whose rows it reads, how parts of it add up, and what moves. Shapes: B rows, T positions.

All randomness is a pure function of (seed, step, row). Several processes (`Ranks`) share the rows of every step.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from orthrus.data.packing import PackedRows
from orthrus.errors import CheckpointError, DataError, OrthrusError
from orthrus.train.checkpoints import Checkpoint
from orthrus.train.optim import build_optimizers, learning_rate_factor, set_learning_rate
from orthrus.train.ranks import Ranks, Sums
from orthrus.train.sections import Recipe
from orthrus.train.sharding import part as part_of
from orthrus.train.sharding import part_of_state, whole

Rows = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """A sum over targets and its weight; the step's loss is all sums over all weights.

    `total` is a scalar with a gradient, `weight` a scalar tensor without; `metrics` maps names to (sum,
    count) pairs of scalars without gradients, averaged over rows and steps between two lines of the log.
    """

    total: Tensor
    weight: Tensor
    metrics: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """Return the mean loss and metrics; 0 where nothing counts."""
        sums = {"loss": (self.total, self.weight), **self.metrics}
        return {name: float(total) / (float(count) or 1.0) for name, (total, count) in sums.items()}


class Task(Protocol):
    """What is trained: a model, the number of its training rows, a loss, and how to measure and save it."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def row_count(self) -> int: ...

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimizers move, by name; nothing else may change."""
        ...

    def loss(self, rows: Rows, step: int) -> Loss:
        """The loss of rows (indices [B] into the training set) at a step; draws from `row_generator` only."""
        ...

    def evaluate(self, step: int) -> dict[str, float]:
        """Named figures on held-out data."""
        ...

    def save(self, path: Path) -> None:
        """Write the trained model into an empty directory."""
        ...


def row_generator(seed: int, step: int, row: int) -> torch.Generator:
    """A generator for whatever is drawn for one row at one step."""
    digest = hashlib.blake2b(f"{seed}/{step}/{row}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def rows_of_step(step: int, *, row_count: int, batch_rows: int, seed: int) -> Rows:
    """Indices [batch_rows] of the rows of a step: every epoch is a permutation from (seed, epoch)."""
    if row_count < 1:
        raise DataError("at least one training row is required; found none")
    index = np.arange(step * batch_rows, (step + 1) * batch_rows)
    rows = np.empty(batch_rows, dtype=np.int64)
    for epoch in np.unique(index // row_count):
        here = index // row_count == epoch
        order = np.random.default_rng((seed, int(epoch))).permutation(row_count)
        rows[here] = order[index[here] % row_count]
    return rows


class Batch(NamedTuple):
    """Which document each position belongs to, positions in documents, tokens, and whether an answer holds them."""

    document_BT: Tensor
    position_BT: Tensor
    token_BT: Tensor
    answer_BT: Tensor


def batch(packed: PackedRows, index: Rows, device: torch.device) -> Batch:
    """Copy the rows of these indices to a device: integers as int64, answers as booleans."""
    arrays = (packed.document, packed.position, packed.token_ids, packed.answer)
    tensors = [torch.from_numpy(np.array(array[index])).to(device) for array in arrays]
    return Batch(*(tensor if tensor.dtype == torch.bool else tensor.long() for tensor in tensors))


class Training:
    """The optimizer steps of a task by its recipe, of which this process computes a share."""

    def __init__(self, task: Task, recipe: Recipe, ranks: Ranks) -> None:
        self.task, self.recipe, self.ranks = task, recipe, ranks
        self.trainable = task.trainable()
        self.optimizers = build_optimizers(task.model, self.trainable, recipe.optimizer)

    def step(self, step: int, *, parts: int) -> Sums:
        """Make one optimizer step, computed in so many parts; returns (sum, count) pairs for the journal.

        Raises OrthrusError: the loss is no longer finite.
        """
        started = time.perf_counter()
        factor = learning_rate_factor(step, self.recipe.schedule)
        set_learning_rate(self.optimizers, factor)
        sums = self.ranks.add(self.accumulate(step, parts=parts))
        self.ranks.add_gradients(self.trainable.values())
        total, weight = sums["loss"]
        if not np.isfinite(total):
            raise OrthrusError(f"step {step}: the loss must be finite, found {total}; lower the learning rates")
        for parameter in self.trainable.values():
            if parameter.grad is not None:
                parameter.grad.div_(weight or 1.0)
        norm = nn.utils.clip_grad_norm_(self.trainable.values(), self.recipe.optimizer.clip or float("inf"))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        return {
            **sums,
            "grad_norm": (float(whole(norm, here=True)), 1.0),
            "lr_factor": (factor, 1.0),
            "step_seconds": (seconds, 1.0),
        }

    def accumulate(self, step: int, *, parts: int) -> Sums:
        """Add up gradients of this process's share of the step; returns (sum, count) pairs of loss and metrics."""
        run = self.recipe.run
        rows = rows_of_step(step, row_count=self.task.row_count, batch_rows=run.batch_rows, seed=run.seed)
        sums: Sums = {}
        self.task.model.train()
        for part in np.split(rows, parts):
            with autocast(self.recipe):
                loss = self.task.loss(self.ranks.share(part), step)
            loss.total.backward()  # type: ignore[no-untyped-call]
            for name, (total, count) in {"loss": (loss.total, loss.weight), **loss.metrics}.items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + float(total.detach()), before[1] + float(count))
        return sums

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up a run again where a checkpoint was written.

        Raises CheckpointError: its optimizers keep their parameters in other groups, as other versions did.
        """
        states = [state["param_groups"] for state in checkpoint.optimizers]
        if list(map(_groups, states)) != [_groups(optimizer.param_groups) for optimizer in self.optimizers]:
            raise CheckpointError(
                f"a checkpoint of this version's optimizers is required, found others at step {checkpoint.step}: end "
                "the run with the version that began it, or begin anew with --no-resume"
            )
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(part_of(checkpoint.trainable[name], parameter))
        for optimizer, state in zip(self.optimizers, checkpoint.optimizers, strict=True):
            optimizer.load_state_dict(part_of_state(state, optimizer))

    def checkpoint(self, step: int, *, parts: int) -> Checkpoint:
        """Return the state after so many steps, whole in the main process; all processes call it together."""
        kept = {name: parameter.detach() for name, parameter in self.trainable.items()}
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        return Checkpoint(
            step=step,
            parts=parts,
            trainable=whole(kept, here=self.ranks.main),
            optimizers=whole(states, here=self.ranks.main),
        )


def autocast(recipe: Recipe) -> torch.autocast:
    """Compute in the recipe's dtype; weights stay in float32."""
    return torch.autocast(recipe.run.device, dtype=torch.bfloat16, enabled=recipe.run.dtype == "bfloat16")


def _groups(groups: Sequence[Mapping[str, Any]]) -> list[tuple[int, object]]:
    """Return how many parameters each of an optimizer's groups has, and the heads that Muon cuts them into."""
    return [(len(group["params"]), group.get("heads")) for group in groups]
