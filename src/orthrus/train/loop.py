"""The training loop: steps, accumulation, evaluation, checkpoints, resuming and clean stops.

Knows nothing of what is trained: a `Task` gives the loss of some rows. All randomness is a pure function of
(seed, step, row), so a run resumes from weights, optimizer states and the step alone, and on the CPU ends
with the same weights, bit for bit, as a run that was never interrupted. Several processes (`Ranks`) share the rows
of every step and add up gradients and weights, so that all of them make the same step.
"""

import hashlib
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from orthrus.errors import ConfigError, DataError
from orthrus.provenance import provenance
from orthrus.train.card import write_card
from orthrus.train.checkpoints import Checkpoint, load_latest, save_checkpoint
from orthrus.train.config import Recipe, flat
from orthrus.train.journal import Journal
from orthrus.train.optim import build_optimizers, learning_rate_factor, set_learning_rate
from orthrus.train.ranks import Ranks
from orthrus.train.trackers import trackers

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


class Task(Protocol):
    """What is trained: a model, the loss of some rows, and how to measure and publish it."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def row_count(self) -> int:
        """How many rows the training set has."""
        ...

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


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """How a run ended: steps done in all, whether all of them, and the last evaluation.

    `model` is where the trained model lies, None when the run was stopped before its end.
    """

    step: int
    finished: bool
    metrics: dict[str, float]
    model: Path | None


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


def train(task: Task, recipe: Recipe, *, resume: bool = True) -> TrainResult:
    """Train a task by its recipe, into `run.output`: `log.jsonl`, `checkpoints/` and at the end `model/`, `RUN.md` and
    `curves.png`.

    SIGTERM and SIGINT end the step at hand, write a checkpoint and return. With `resume` a run goes on from
    its last checkpoint; without, what an earlier run left in `checkpoints/` and `log.jsonl` is removed.

    Raises:
        ConfigError: the recipe changed since the checkpoint, or the loss is no longer finite.
        CheckpointError: the checkpoint is damaged.
    """
    run = recipe.run
    output = Path(run.output)
    checkpoints = output / "checkpoints"
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    ranks = Ranks(run.device)
    trainable = task.trainable()
    optimizers = build_optimizers(task.model, trainable, recipe.optimizer)
    if not resume and ranks.main:
        shutil.rmtree(checkpoints, ignore_errors=True)
    ranks.wait()
    step = _restore(load_latest(checkpoints, recipe), trainable, optimizers)
    metrics: dict[str, float] = {}
    tables = recipe.model_dump(mode="json")
    with (
        trackers(run.trackers, output, dict(flat(tables)), main=ranks.main) as tracked,
        Journal(
            output / "log.jsonl", steps=recipe.schedule.steps, start=step, silent=not ranks.main, trackers=tracked
        ) as journal,
        _stop_signals() as stop,
    ):
        about = provenance(dtypes=[run.dtype], device=run.device) | {"processes": ranks.count}
        journal.write_start(step, {"provenance": about, "recipe": tables})
        stopping = False
        while step < recipe.schedule.steps and not stopping:
            journal.add(_one_step(task, recipe, ranks, trainable, optimizers, step))
            step += 1
            stopping = ranks.any(stop.requested)
            last = step == recipe.schedule.steps
            if step % run.log_every == 0 or last:
                journal.write_step(step)
            if ranks.main and (step % run.eval_every == 0 or last):
                metrics = _evaluate(task, recipe, step)
                journal.write_evaluation(step, metrics)
            if ranks.main and (step % run.checkpoint_every == 0 or last or stopping):
                state = Checkpoint(
                    step=step,
                    trainable={name: parameter.detach() for name, parameter in trainable.items()},
                    optimizers=[optimizer.state_dict() for optimizer in optimizers],
                )
                save_checkpoint(checkpoints, state, recipe)
    finished = step == recipe.schedule.steps
    model = output / "model" if finished else None
    if model is not None and ranks.main:
        _save_model(task, model)
        write_card(recipe, output)
    ranks.wait()
    return TrainResult(step=step, finished=finished, metrics=metrics, model=model)


def _one_step(
    task: Task,
    recipe: Recipe,
    ranks: Ranks,
    trainable: Mapping[str, nn.Parameter],
    optimizers: list[torch.optim.Optimizer],
    step: int,
) -> dict[str, tuple[float, float]]:
    """One optimizer step; returns (sum, count) pairs for the journal."""
    started = time.perf_counter()
    factor = learning_rate_factor(step, recipe.schedule)
    set_learning_rate(optimizers, factor)
    sums = ranks.add(_accumulate(task, recipe, ranks, step))
    ranks.add_gradients(trainable.values())
    total, weight = sums["loss"]
    if not np.isfinite(total):
        raise ConfigError(f"step {step}: the loss must be finite, found {total}; lower the learning rates")
    for parameter in trainable.values():
        if parameter.grad is not None:
            parameter.grad.div_(weight)
    norm = nn.utils.clip_grad_norm_(trainable.values(), recipe.optimizer.clip or float("inf"))
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    return {
        **sums,
        "grad_norm": (float(norm), 1.0),
        "lr_factor": (factor, 1.0),
        "step_seconds": (seconds, 1.0),
    }


def _accumulate(task: Task, recipe: Recipe, ranks: Ranks, step: int) -> dict[str, tuple[float, float]]:
    """Add up gradients of this process's share of the step; returns the (sum, count) pairs of loss and metrics."""
    run = recipe.run
    rows = rows_of_step(step, row_count=task.row_count, batch_rows=run.batch_rows, seed=run.seed)
    sums: dict[str, tuple[float, float]] = {}
    task.model.train()
    for part in np.split(rows, run.grad_accumulation):
        with _autocast(recipe):
            loss = task.loss(ranks.share(part), step)
        loss.total.backward()  # type: ignore[no-untyped-call]
        for name, (total, count) in {"loss": (loss.total, loss.weight), **loss.metrics}.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + float(total.detach()), before[1] + float(count))
    return sums


def _autocast(recipe: Recipe) -> torch.autocast:
    return torch.autocast(recipe.run.device, dtype=torch.bfloat16, enabled=recipe.run.dtype == "bfloat16")


def _evaluate(task: Task, recipe: Recipe, step: int) -> dict[str, float]:
    task.model.eval()
    with torch.inference_mode(), _autocast(recipe):
        return task.evaluate(step)


def _restore(
    checkpoint: Checkpoint | None,
    trainable: Mapping[str, nn.Parameter],
    optimizers: list[torch.optim.Optimizer],
) -> int:
    if checkpoint is None:
        return 0
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(checkpoint.trainable[name])
    for optimizer, state in zip(optimizers, checkpoint.optimizers, strict=True):
        optimizer.load_state_dict(state)
    return checkpoint.step


def _save_model(task: Task, path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    task.save(temporary)
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)


@dataclass(slots=True)
class _Stop:
    requested: bool = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Turn SIGTERM and SIGINT into a request to stop after the step at hand; the main thread alone can."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
