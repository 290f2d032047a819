"""What a training step takes on this machine: its time by phase, its memory, and how near it comes to its floor.

The floor of a step is its operations, as the plan counts them, over the rate of one large matrix product, which takes
turns with the steps. Units: seconds; bytes; floating-point operations (a multiply-add is two).
"""

import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any, Final, TypeAlias

import numpy as np
import torch

from orthrus.checkpoints.load import DTYPES, device_of
from orthrus.data.packing import PackedRows
from orthrus.errors import ConfigError
from orthrus.train.fit import parts_of_step
from orthrus.train.plan import plan
from orthrus.train.prepare import Prepared
from orthrus.train.ranks import Ranks
from orthrus.train.sections import ViewRecipe
from orthrus.train.step import Loss, Rows, Training
from orthrus.train.view import ViewTask

Clock: TypeAlias = Callable[[], float]

PHASES: Final = ("frozen", "block", "loss", "backward", "optimizer")
"""A step's phases in their order: the frozen pass (with drawing anchors), the block pass, logits and loss, the backward
pass (with clipping), the optimizers."""
_PHASE_OF_VIEW: Final = {"ar": "frozen", "diffusion": "block"}
_SIDE: Final = {"cpu": 2048, "cuda": 8192}  # rows and columns of the product that gives the rate


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """What optimizer steps of one recipe took.

    Attributes:
        phases_seconds: each measured step's seconds by phase (`PHASES`); they add up to the step.
        rates: operations per second of the matrix product after each measured step.
        memory: peak bytes; on CUDA those allocated during a step, on a CPU those of the process up to then.
    """

    phases_seconds: list[dict[str, float]]
    rates: list[float]
    operations: float
    tokens: int
    slots: int
    parts: int
    memory: int

    def to_dict(self) -> dict[str, Any]:
        """Return the figures, medians over the steps; the floor is the operations at the product's rate."""
        steps = [sum(phases.values()) for phases in self.phases_seconds]
        seconds, rate = median(steps), median(self.rates)
        return {
            "seconds": seconds,
            "tokens_per_second": self.tokens / seconds,
            "phases": {name: median(phases[name] for phases in self.phases_seconds) for name in PHASES},
            "memory_bytes": self.memory,
            "operations": self.operations,
            "operations_per_second": rate,
            "floor_seconds": self.operations / rate,
            "floor_share": self.operations / rate / seconds,
            "tokens": self.tokens,
            "slots": self.slots,
            "parts": self.parts,
            "steps_seconds": steps,
            "rates": self.rates,
        }


def measure(
    recipe: ViewRecipe,
    *,
    steps: int = 10,
    warmup: int = 2,
    clock: Clock = perf_counter,
    on_step: Callable[[], None] = lambda: None,
) -> StepCost:
    """Make steps of a recipe and time them; needs its backbone and no answers, and writes nothing.

    Every row is one document and all of it an answer, which is the most that a row can cost.

    Raises:
        ConfigError: no step to measure, several processes, or a device that cannot be used.
        OrthrusError, CheckpointError: a loss that is not finite, or a backbone that cannot be loaded.
    """
    run, device = recipe.run, device_of(recipe.run.device)
    ranks = Ranks(run.device)
    if steps < 1 or warmup < 0 or ranks.count > 1:
        raise ConfigError(
            "measuring takes at least 1 step, at least 0 to warm up and exactly 1 process, "
            f"found {steps}, {warmup} and {ranks.count}"
        )
    planned = plan(recipe)
    laps = _Laps(clock, device)
    task = _TimedTask(recipe, random_rows(recipe, vocabulary=planned.shapes.vocabulary), laps)
    training = Training(task, recipe, ranks)
    training.optimizers[0].register_step_pre_hook(lambda *_: laps.end("backward"))
    parts = parts_of_step(training, step=0)
    phases_seconds, rates, memory = [], [], 0
    for step in range(warmup + steps):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        laps.begin()
        training.step(step, parts=parts)
        laps.end("optimizer")
        peak = _peak(device)
        rate = matmul_rate(DTYPES[run.dtype], device, clock=clock)
        if step >= warmup:
            phases_seconds.append(dict(laps.seconds))
            rates.append(rate)
            memory = max(memory, peak)
        on_step()
    return StepCost(
        phases_seconds=phases_seconds,
        rates=rates,
        operations=planned.operations,
        tokens=planned.tokens // planned.steps,
        slots=planned.drafted // planned.steps,
        parts=parts,
        memory=memory,
    )


def random_rows(recipe: ViewRecipe, *, vocabulary: int) -> Prepared:
    """Make the rows of one step, each a document of random tokens that is all answer; nothing is held out."""
    shape = (recipe.run.batch_rows, recipe.data.row_tokens)
    rows = PackedRows(
        token_ids=np.random.default_rng(recipe.run.seed).integers(vocabulary, size=shape, dtype=np.int32),
        document=np.zeros(shape, dtype=np.int32),
        position=np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        answer=np.ones(shape, dtype=np.bool_),
    )
    return Prepared(rows=rows, heldout={}, heldout_prompts={})


def matmul_rate(dtype: torch.dtype, device: torch.device, *, clock: Clock = perf_counter) -> float:
    """Operations per second of one product of two large square matrices, on the threads that torch has now."""
    side = _SIDE[device.type]
    factor = torch.ones(side, side, dtype=dtype, device=device)
    _wait(device)
    started = clock()
    _product = factor @ factor
    _wait(device)
    return 2 * side**3 / (clock() - started)


class _Laps:
    """Shares a step's time out: what has passed since the last phase ended belongs to the phase that ends now."""

    def __init__(self, clock: Clock, device: torch.device) -> None:
        self._clock = clock
        self._device = device
        self.begin()

    def begin(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        _wait(self._device)
        self._last = self._clock()

    def end(self, phase: str) -> None:
        """End a phase, when the device is done with it."""
        _wait(self._device)
        now = self._clock()
        self.seconds[phase] += now - self._last
        self._last = now


class _TimedTask(ViewTask):
    """A view task, its view untrained, that says when a phase ends."""

    def __init__(self, recipe: ViewRecipe, data: Prepared, laps: _Laps) -> None:
        untrained = recipe.model.model_copy(update={"start_from": None})
        super().__init__(recipe.model_copy(update={"model": untrained}), data=data)
        self._laps = laps
        self.model.base_model.register_forward_hook(
            lambda module, inputs, named, output: laps.end(_PHASE_OF_VIEW[named["view"].name]), with_kwargs=True
        )

    def loss(self, rows: Rows, step: int) -> Loss:
        """The loss as it is; before it lies the backward pass of the part before, if there was one."""
        self._laps.end("backward")
        loss = super().loss(rows, step)
        self._laps.end("loss")
        return loss


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> int:
    """Peak bytes allocated on CUDA since they were last forgotten; on a CPU, of this process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
