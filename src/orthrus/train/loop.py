"""The training loop: steps, evaluation, checkpoints, resuming and clean stops.

All randomness of a step is a pure function of (seed, step, row); so a run resumes from weights, optimizer states and
the step alone, and on the CPU ends with the same weights, bit for bit, as a run that was never interrupted.
"""

import json
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import torch

from orthrus.provenance import provenance
from orthrus.signals import handled
from orthrus.train.card import write_card
from orthrus.train.checkpoints import load_latest, save_checkpoint
from orthrus.train.config import flat
from orthrus.train.fit import parts_of_step
from orthrus.train.journal import Journal, evaluation_at, trackers
from orthrus.train.plan import notes
from orthrus.train.ranks import Ranks
from orthrus.train.sections import AnsweredRecipe, Recipe
from orthrus.train.sharding import gathered
from orthrus.train.step import Task, Training, autocast
from orthrus.writing import replacing


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """How a run ended: steps done in all, by earlier calls (`before`), whether all of them, the last evaluation.

    `model` is where the trained model lies, None when the run was stopped before its end.
    """

    step: int
    before: int = 0
    finished: bool
    metrics: dict[str, float]
    model: Path | None


def train(task: Task, recipe: Recipe, *, resume: bool = True) -> TrainResult:
    """Train a task by its recipe, into `run.output`: `log.jsonl`, `checkpoints/` and at the end `model/`, `RUN.md` and
    `curves.png`.

    SIGTERM and SIGINT end the step at hand, write a checkpoint and return. With `resume` a run goes on from
    its last checkpoint; without, what an earlier run left in `checkpoints/` and `log.jsonl` is removed.

    Raises:
        ConfigError: the recipe changed since the checkpoint.
        OrthrusError: the loss is no longer finite.
        CheckpointError: the checkpoint is damaged, or none can be written.
    """
    run = recipe.run
    output = Path(run.output)
    checkpoints, log = output / "checkpoints", output / "log.jsonl"
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    ranks = Ranks(run.device)
    training = Training(task, recipe, ranks)
    if not resume and ranks.main:
        shutil.rmtree(checkpoints, ignore_errors=True)
    ranks.wait()
    before = load_latest(checkpoints, recipe)
    if before is not None:
        training.restore(before)
    step = first = 0 if before is None else before.step
    parts = parts_of_step(training, step=step, at_least=1 if before is None else before.parts)
    metrics: dict[str, float] = {}
    evaluates = ranks.main or run.sharding != "none"  # passes of a sharded model need all processes
    tables = recipe.model_dump(mode="json")
    stop: list[bool] = []  # no event: a second signal inside its `set` would wait for the first
    with (
        trackers(run.trackers, output, dict(flat(tables)), main=ranks.main) as tracked,
        Journal(log, steps=recipe.schedule.steps, start=step, silent=not ranks.main, trackers=tracked) as journal,
        handled(lambda: stop.append(True), signal.SIGTERM, signal.SIGINT),
    ):
        about = provenance(dtypes=[run.dtype], device=run.device) | {"processes": ranks.count}
        journal.write_start(step, {"provenance": about, "grad_accumulation": parts, "recipe": tables})
        stopping = False
        while step < recipe.schedule.steps and not stopping:
            journal.add(training.step(step, parts=parts))
            step += 1
            stopping = ranks.any(bool(stop))
            last = step == recipe.schedule.steps
            if step % run.log_every == 0 or last:
                journal.write_step(step)
            # Before the evaluation: where that fails, the steps are kept.
            if step % run.checkpoint_every == 0 or last or stopping:
                state = training.checkpoint(step, parts=parts)
                if ranks.main:
                    save_checkpoint(checkpoints, state, recipe)
            if evaluates and step % run.eval_every == 0 and not last:
                metrics = _evaluate(task, recipe, step, journal)
        if evaluates and step == recipe.schedule.steps:
            # A run that was finished before has its figures, unless it was killed while it took them.
            noted = evaluation_at(log, step)
            metrics = _evaluate(task, recipe, step, journal) if noted is None else noted
    finished = step == recipe.schedule.steps
    model = output / "model" if finished else None
    if model is not None:
        with gathered(task.model, here=ranks.main):
            if ranks.main:
                _save_model(task, recipe, model)
                write_card(recipe, output)
    ranks.wait()
    return TrainResult(step=step, before=first, finished=finished, metrics=metrics, model=model)


def _evaluate(task: Task, recipe: Recipe, step: int, journal: Journal) -> dict[str, float]:
    task.model.eval()
    with torch.inference_mode(), autocast(recipe):
        metrics = task.evaluate(step)
    journal.write_evaluation(step, metrics)
    return metrics


def _save_model(task: Task, recipe: Recipe, path: Path) -> None:
    with replacing(path) as temporary:
        temporary.mkdir()
        task.save(temporary)
        if isinstance(recipe, AnsweredRecipe):
            (temporary / "training.json").write_text(json.dumps(notes(recipe), indent=2) + "\n", encoding="utf-8")
