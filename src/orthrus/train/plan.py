"""What a recipe will cost, before it runs: tokens, steps, memory (bytes) and hours, from the model's shapes alone.

Sliding windows are counted as whole contexts. Peak rates are the vendors' for dense bfloat16. A multiply-add is two
operations.
"""

from dataclasses import dataclass
from typing import Any

from orthrus.model.delta import CHUNK
from orthrus.train.sections import AnsweredRecipe, Recipe, ViewRecipe
from orthrus.train.shapes import Shapes, shapes_of
from orthrus.train.work import MOST, Answers, Work, answers_of, step_operations, work_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """A device: operations per second at peak, the share of them that a step reaches, memory in bytes."""

    rate: float
    share: float
    memory: float | None


HARDWARE = {
    "A100 80GB": Hardware(rate=312e12, share=0.35, memory=80e9),
    "H100 80GB": Hardware(rate=989e12, share=0.35, memory=80e9),
    "H200": Hardware(rate=989e12, share=0.35, memory=141e9),
    "RTX 4090": Hardware(rate=165e12, share=0.35, memory=24e9),
    # Measured: training the bundled backbone (results/train-nano-backbone.jsonl), not a peak.
    "one thread of an AMD EPYC": Hardware(rate=90e9, share=1.0, memory=None),
}
"""Shares on GPUs are assumptions; on the CPU the rate is what a run reached."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run takes on a number of equal devices: `seconds` a step, `hours` in all, `memory` in bytes on each."""

    shapes: Shapes
    steps: int
    tokens: int
    drafted: int
    operations: float
    devices: int
    memory: dict[str, float]
    seconds: dict[str, float]
    hours: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "drafted_slots": self.drafted,
            "operations_per_step": self.operations,
            "devices": self.devices,
            "parameters": self.shapes.total,
            "trainable": self.shapes.trainable,
            "memory_bytes": {**self.memory, "all": sum(self.memory.values())},
            "seconds_per_step": self.seconds,
            "hours": self.hours,
        }


def plan(recipe: Recipe, *, devices: int = 1, answers: Answers = MOST) -> Plan:
    """Work out what a recipe takes on so many devices of each kind; `grad_accumulation = "auto"` counts as one part.

    `answers` is what its packed rows say (`work.answers_of`). Raises CheckpointError without a configuration to read.
    """
    shapes = shapes_of(recipe)
    work = work_of(recipe, shapes, answers)
    steps, rows = recipe.schedule.steps, recipe.run.batch_rows
    operations = step_operations(recipe, shapes, answers)
    parts = 1 if recipe.run.grad_accumulation == "auto" else recipe.run.grad_accumulation
    seconds = {name: operations / (hw.rate * hw.share * devices) for name, hw in HARDWARE.items()}
    return Plan(
        shapes=shapes,
        steps=steps,
        tokens=steps * rows * recipe.data.row_tokens,
        drafted=steps * rows * work.drafted,
        operations=operations,
        devices=devices,
        memory=_memory(recipe, shapes, work, rows / parts / devices, devices),
        seconds=seconds,
        hours={name: value * steps / 3600 for name, value in seconds.items()},
    )


def notes(recipe: AnsweredRecipe) -> dict[str, Any]:
    """Return what a peer's training took, for those who compare it: parameters, steps, rows, operations in all."""
    shapes, steps = shapes_of(recipe), recipe.schedule.steps
    return {
        "kind": recipe.kind,
        "trainable": shapes.trainable,
        "steps": steps,
        "rows": steps * recipe.run.batch_rows,
        "operations": steps * step_operations(recipe, shapes, answers_of(recipe)),
    }


def _memory(recipe: Recipe, shapes: Shapes, work: Work, rows: float, devices: int) -> dict[str, float]:
    """Bytes on one of so many devices, which computes so many rows at a time, by what they hold.

    A sharded device has a share of everything but the output head, and two whole layers: one computes while the next
    arrives.
    """
    width = 2 if recipe.run.dtype == "bfloat16" else 4
    T = recipe.data.row_tokens
    tokens, held = work.kept, shapes.activations * work.depth
    cast = 2.0 * shapes.active if recipe.run.dtype == "bfloat16" else 0.0  # autocast's copies, for the backward pass
    sharded = recipe.run.sharding != "none" and devices > 1
    share = 1 / devices if sharded else 1.0
    shared = 4.0 * (shapes.total - shapes.head)
    masks = float(T * T)
    keys = 0.0
    if isinstance(recipe, ViewRecipe):
        keys = rows * T * (shapes.layers - shapes.recurrent) * shapes.keys * width
        keys += 4 * rows * T * shapes.recurrent * (shapes.chunks + shapes.states / CHUNK)  # float32
        masks = float(tokens * (tokens + T))
        if recipe.model.gradient_checkpointing:
            held = shapes.activations / shapes.layers + 2 * shapes.hidden * shapes.layers
            cast /= shapes.layers
    return {
        "weights": 4.0 * shapes.head + shared * share,
        "gathered_layers": 2 * shared / shapes.layers if sharded else 0.0,
        "cast_weights": cast,
        "gradients": 4.0 * shapes.trainable * share,
        "optimizer": (8.0 if recipe.optimizer.name == "adamw" else 4.0) * shapes.trainable * share,
        "teacher_keys": keys,
        "activations": rows * tokens * held * width,
        "masks": rows * masks * (1 if recipe.run.device == "cuda" else 1 + width),
        "logits": 4 * 4.0 * shapes.vocabulary * min(1024.0, rows * tokens),
    }
