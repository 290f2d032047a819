"""Checkpoints of a run: what resuming needs, written whole or not at all.

A changed recipe does not resume. A checkpoint holds the trainable tensors, the optimizers' states and the step: order
of data and randomness are pure functions of the step.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orthrus.errors import CheckpointError, ConfigError, WriteError
from orthrus.train.config import changed_keys, recipe_from_mapping
from orthrus.train.sections import Recipe
from orthrus.writing import replacing

KEEP = 2
FREE_TO_CHANGE = frozenset(
    {
        "data.folder",
        "responses.prompts",  # a run goes on with more answers
        "run.output",
        "run.threads",
        "run.log_every",
        "run.eval_every",
        "run.checkpoint_every",
        "answers.url",
        "answers.view",
        "run.trackers",
    }
)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state after `step` optimizer steps, each computed in so many `parts`."""

    step: int
    parts: int = 1
    trainable: dict[str, torch.Tensor]
    optimizers: list[dict[str, Any]]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, recipe: Recipe) -> Path:
    """Write `folder/step-NNNNNNNN` atomically and delete all but the last two checkpoints.

    Raises CheckpointError: it cannot be written (a full disk); those before it stay.
    """
    target = folder / f"step-{checkpoint.step:08d}"
    try:
        with replacing(target) as temporary:
            temporary.mkdir()
            torch.save(vars(checkpoint), temporary / "state.pt")
            (temporary / "recipe.json").write_text(recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except (WriteError, RuntimeError) as error:  # torch tells of some failed writes by a RuntimeError
        raise CheckpointError(
            f"{target} cannot be written whole ({error}): make room; the checkpoints before it are whole, and "
            "the same command goes on from the last of them"
        ) from error
    for old in checkpoint_paths(folder)[:-KEEP]:
        shutil.rmtree(old)
    return target


def load_latest(folder: Path, recipe: Recipe) -> Checkpoint | None:
    """Read the last checkpoint of a run, or None where there is none.

    Raises:
        ConfigError: the recipe differs from the checkpoint's in a key that a run cannot change.
        CheckpointError: the checkpoint is damaged.
    """
    paths = checkpoint_paths(folder)
    if not paths:
        return None
    path = paths[-1]
    state, before = _read(path)
    with_steps = {"schedule.steps", "schedule.decay_steps"} if _still_constant(path, before) else set()
    changed = [
        key for key in changed_keys(before, recipe.model_dump(mode="json")) if key not in FREE_TO_CHANGE | with_steps
    ]
    if changed:
        raise ConfigError(
            f"{path}: a run resumes with the recipe that it started with, but these keys changed: "
            f"{', '.join(changed)}; restore them, choose another run.output, or start anew without resuming"
        )
    return Checkpoint(**state)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        return state, _with_defaults(json.loads((path / "recipe.json").read_text(encoding="utf-8")))
    except Exception as error:
        raise CheckpointError(
            f"{path}: a whole checkpoint is required; {error}; delete it to go on from the one before"
        ) from error


def _still_constant(path: Path, recipe: dict[str, Any]) -> bool:
    """Whether all steps of a checkpoint had the full rate, so that its run may end sooner or later than it was to."""
    schedule = recipe.get("schedule", {})
    done = int(path.name.removeprefix("step-"))
    return schedule.get("kind") == "constant" and bool(done <= schedule["steps"] - schedule["decay_steps"])


def _with_defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """A stored recipe with the keys that it is older than, at their defaults: those are not changes."""
    try:
        return recipe_from_mapping(recipe).model_dump(mode="json")
    except ConfigError:  # a key that is no more: the comparison names it
        return recipe


def load_trainable(parameters: dict[str, torch.nn.Parameter], folder: Path) -> None:
    """Start parameters from the last checkpoint of another run, whatever its recipe was.

    Raises CheckpointError: there is none, it is damaged, or its tensors are others.
    """
    paths = checkpoint_paths(folder)
    if not paths:
        raise CheckpointError(f"{folder}: a checkpoint to start from is required; found none; train that recipe first")
    kept = _read(paths[-1])[0]["trainable"]
    if {n: t.shape for n, t in kept.items()} != {n: p.shape for n, p in parameters.items()}:
        raise CheckpointError(f"{paths[-1]}: its tensors are not this model's; give both recipes the same shape")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(kept[name])


def checkpoint_paths(folder: Path) -> list[Path]:
    """Complete checkpoints of a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d{8}", path.name))
