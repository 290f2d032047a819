"""The training loop: pure functions of (seed, step, row), exact resuming, clean stops, refusals."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from orthrus.errors import CheckpointError, ConfigError, DataError, OrthrusError
from orthrus.train.backbone import BackboneTask
from orthrus.train.checkpoints import checkpoint_paths
from orthrus.train.loop import TrainResult, train
from orthrus.train.optim import learning_rate_factor
from orthrus.train.sections import BackboneRecipe
from orthrus.train.step import Loss, Rows, row_generator, rows_of_step
from tests.train.tiny import tiny_recipe


class SignalledTask(BackboneTask):
    """Sends its own process a signal while it computes step 4."""

    number = signal.SIGTERM

    def loss(self, rows: Rows, step: int) -> Loss:
        if step == 4:
            os.kill(os.getpid(), self.number)
        return super().loss(rows, step)


class UnevaluableTask(BackboneTask):
    """Cannot be evaluated."""

    def evaluate(self, step: int) -> dict[str, float]:
        raise DataError(f"no evaluation after step {step}")


class ChangedLossTask(BackboneTask):
    """Multiplies the loss of step 4 by infinity."""

    def loss(self, rows: Rows, step: int) -> Loss:
        loss = super().loss(rows, step)
        return Loss(total=loss.total * float("inf"), weight=loss.weight) if step == 4 else loss


def kill_at_step_4(recipe: BackboneRecipe) -> None:
    task = SignalledTask(recipe)
    task.number = signal.SIGKILL
    train(task, recipe)


def run(recipe: BackboneRecipe, *, resume: bool = True) -> tuple[TrainResult, dict[str, Tensor]]:
    """Train, and return the result with the weights that it ended with."""
    task = BackboneTask(recipe)
    return train(task, recipe, resume=resume), task.model.state_dict()


def assert_bitwise_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """The output folder and final weights of a run that was never interrupted."""
    output = tmp_path_factory.mktemp("whole")
    result, weights = run(tiny_recipe(output))
    assert result.finished
    assert result.model == output / "model"
    return output, weights


@pytest.fixture
def prepared(whole: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> Path:
    """An output folder with tokenizer and rows, so that a run starts at once."""
    for name in ("tokenizer", "data"):
        shutil.copytree(whole[0] / name, tmp_path / name)
    return tmp_path


def test_every_epoch_is_a_permutation_whatever_the_batch() -> None:
    rows = np.concatenate([rows_of_step(s, row_count=10, batch_rows=4, seed=7) for s in range(5)])
    first, second = rows[:10], rows[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist()
    by_twos = np.concatenate([rows_of_step(s, row_count=10, batch_rows=2, seed=7) for s in range(10)])
    assert by_twos.tolist() == rows.tolist()
    assert rows_of_step(0, row_count=10, batch_rows=10, seed=8).tolist() != first.tolist()


def test_a_batch_may_be_larger_than_the_set() -> None:
    rows = rows_of_step(0, row_count=3, batch_rows=7, seed=0)
    assert np.bincount(rows).tolist() in ([3, 2, 2], [2, 3, 2], [2, 2, 3])


def test_an_empty_training_set_is_refused() -> None:
    with pytest.raises(DataError, match="at least one training row"):
        rows_of_step(0, row_count=0, batch_rows=2, seed=0)


def test_a_rows_randomness_depends_on_seed_step_and_row_only() -> None:
    draws = {
        key: torch.rand(4, generator=row_generator(*key)).tolist()
        for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 11, 1), (0, 1, 11)]
    }
    assert len({tuple(draw) for draw in draws.values()}) == len(draws)
    assert torch.rand(4, generator=row_generator(0, 11, 1)).tolist() == draws[0, 11, 1]


def test_training_lowers_the_loss_and_moves_every_weight(whole: tuple[Path, dict[str, Tensor]]) -> None:
    lines = [json.loads(line) for line in (whole[0] / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "step"]
    assert losses[-1] < losses[0] - 0.3
    fresh = BackboneTask(tiny_recipe(whole[0])).model.state_dict()
    assert [name for name in fresh if torch.equal(fresh[name], whole[1][name])] == []


def test_the_log_has_every_report_once(whole: tuple[Path, dict[str, Tensor]]) -> None:
    lines = [json.loads(line) for line in (whole[0] / "log.jsonl").read_text().splitlines()]
    reports = [(line["event"], line["step"]) for line in lines]
    assert reports == [
        ("start", 0), ("step", 2), ("step", 4), ("evaluation", 4), ("step", 6), ("step", 8), ("evaluation", 8),
    ]  # fmt: skip
    assert {"commit", "threads", "torch"} <= lines[0]["provenance"].keys()
    assert {"loss", "answer_loss", "prompt_loss", "grad_norm"} <= lines[1].keys()
    assert "heldout/maths" in lines[-1]
    rates = [line["lr_factor"] for line in lines if line["event"] == "step"]
    schedule = tiny_recipe(whole[0]).schedule
    factors = [learning_rate_factor(step, schedule) for step in range(8)]
    assert rates == [sum(factors[at : at + 2]) / 2 for at in range(0, 8, 2)]


def test_only_the_last_two_checkpoints_stay(whole: tuple[Path, dict[str, Tensor]]) -> None:
    names = [path.name for path in sorted((whole[0] / "checkpoints").iterdir())]
    assert names == ["step-00000006", "step-00000008"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_resuming_ends_bitwise_equal(
    prepared: Path, whole: tuple[Path, dict[str, Tensor]], number: signal.Signals
) -> None:
    recipe = tiny_recipe(prepared)
    task = SignalledTask(recipe)
    task.number = number
    before = signal.getsignal(number)
    result = train(task, recipe)
    assert signal.getsignal(number) is before
    assert (result.step, result.finished, result.model) == (5, False, None)
    assert checkpoint_paths(prepared / "checkpoints")[-1].name == "step-00000005"
    result, weights = run(recipe)
    assert result.finished
    assert_bitwise_equal(weights, whole[1])


def test_a_killed_process_resumes_bitwise_equal(prepared: Path, whole: tuple[Path, dict[str, Tensor]]) -> None:
    """SIGKILL inside step 4, one step past the last checkpoint: nothing of the run is lost or repeated."""
    child = multiprocessing.get_context("fork").Process(target=kill_at_step_4, args=(tiny_recipe(prepared),))
    child.start()
    child.join(300)
    assert child.exitcode == -signal.SIGKILL
    assert [path.name for path in checkpoint_paths(prepared / "checkpoints")] == ["step-00000003"]
    result, weights = run(tiny_recipe(prepared))
    assert result.finished
    assert_bitwise_equal(weights, whole[1])
    lines = [json.loads(line) for line in (prepared / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "start"] == [0, 3]
    assert [line["step"] for line in lines if line["event"] != "start"] == [2, 4, 4, 6, 8, 8]


def test_a_finished_run_stays_as_it_is(prepared: Path, whole: tuple[Path, dict[str, Tensor]]) -> None:
    shutil.copytree(whole[0] / "checkpoints", prepared / "checkpoints")
    result, weights = run(tiny_recipe(prepared))
    assert (result.step, result.finished) == (8, True)
    assert_bitwise_equal(weights, whole[1])


def test_a_finished_run_has_the_figures_it_ended_with(prepared: Path, whole: tuple[Path, dict[str, Tensor]]) -> None:
    """Those of its log, without another evaluation; where it was killed before they were there, they are taken."""
    log = (whole[0] / "log.jsonl").read_text()
    last = json.loads(log.splitlines()[-1])
    figures = {name: value for name, value in last.items() if name not in ("event", "step")}
    assert figures
    shutil.copytree(whole[0] / "checkpoints", prepared / "checkpoints")
    (prepared / "log.jsonl").write_text(log)
    recipe = tiny_recipe(prepared)
    assert train(UnevaluableTask(recipe), recipe).metrics == figures
    (prepared / "log.jsonl").write_text("".join(log.splitlines(keepends=True)[:-1]))
    assert run(recipe)[0].metrics == pytest.approx(figures)
    evaluated = [json.loads(line)["event"] for line in (prepared / "log.jsonl").read_text().splitlines()]
    assert evaluated.count("evaluation") == 2


def test_an_evaluation_that_fails_loses_no_step(prepared: Path, whole: tuple[Path, dict[str, Tensor]]) -> None:
    """The checkpoint of the same step is written before it, and the run goes on from there."""
    recipe = tiny_recipe(prepared, run={"checkpoint_every": 4, "eval_every": 4})
    with pytest.raises(DataError, match="no evaluation after step 4"):
        train(UnevaluableTask(recipe), recipe)
    assert [path.name for path in checkpoint_paths(prepared / "checkpoints")] == ["step-00000004"]
    result, weights = run(recipe)
    assert result.finished
    assert_bitwise_equal(weights, whole[1])


def test_parts_of_a_batch_add_up_to_the_batch(
    prepared: Path, whole: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    """Six parts, two parts (the fixture) and one part differ by rounding only."""
    for parts in (1, 6):
        recipe = tiny_recipe(prepared, run={"grad_accumulation": parts})
        _, weights = run(recipe, resume=False)
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, whole[1][name], rtol=0, atol=2e-3)


def test_a_changed_recipe_refuses_to_resume_and_names_the_keys(
    prepared: Path, whole: tuple[Path, dict[str, Tensor]]
) -> None:
    shutil.copytree(whole[0] / "checkpoints", prepared / "checkpoints")
    changed = tiny_recipe(prepared, optimizer={"lr": 0.5}, run={"seed": 3, "log_every": 1})
    with pytest.raises(ConfigError, match=r"these keys changed: optimizer\.lr, run\.seed;"):
        run(changed)
    result, _ = run(tiny_recipe(prepared, run={"log_every": 1, "eval_every": 7, "checkpoint_every": 2}))
    assert result.finished


def test_a_checkpoint_older_than_a_key_resumes(prepared: Path, whole: tuple[Path, dict[str, Tensor]]) -> None:
    """A key that the stored recipe does not have counts as its default: no change, unless the recipe changes it."""
    shutil.copytree(whole[0] / "checkpoints", prepared / "checkpoints")
    stored = checkpoint_paths(prepared / "checkpoints")[-1] / "recipe.json"
    recipe = json.loads(stored.read_text())
    del recipe["schedule"]["kind"], recipe["objective"]
    stored.write_text(json.dumps(recipe))
    assert run(tiny_recipe(prepared))[0].finished
    with pytest.raises(ConfigError, match=r"these keys changed: schedule\.kind;"):
        run(tiny_recipe(prepared, schedule={"kind": "constant"}))


@pytest.mark.parametrize("of_torch", [lambda groups: groups[:1], lambda groups: [{**g, "heads": 2} for g in groups]])
def test_a_checkpoint_of_other_optimizers_is_refused_and_kept(
    prepared: Path, whole: tuple[Path, dict[str, Tensor]], of_torch: Any
) -> None:
    """As those that versions before kept in one group, or cut into other heads."""
    shutil.copytree(whole[0] / "checkpoints", prepared / "checkpoints")
    file = checkpoint_paths(prepared / "checkpoints")[-1] / "state.pt"
    state = torch.load(file, weights_only=True)
    state["optimizers"][0]["param_groups"] = of_torch(state["optimizers"][0]["param_groups"])
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=r"found others at step 8: .* or begin anew with --no-resume"):
        run(tiny_recipe(prepared))
    assert file.exists()


def test_a_damaged_checkpoint_is_refused_and_kept(prepared: Path, whole: tuple[Path, dict[str, Tensor]]) -> None:
    shutil.copytree(whole[0] / "checkpoints", prepared / "checkpoints")
    state = checkpoint_paths(prepared / "checkpoints")[-1] / "state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"step-00000008: a whole checkpoint is required"):
        run(tiny_recipe(prepared))
    shutil.rmtree(state.parent)
    _, weights = run(tiny_recipe(prepared))
    assert_bitwise_equal(weights, whole[1])


def test_a_checkpoint_that_torch_cannot_write_says_what_to_do(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch tells of a full disk in words of its own file format."""

    def full(*_: object) -> None:
        raise RuntimeError("unexpected pos 220032 vs 219984")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        CheckpointError, match=r"step-\d+ cannot be written whole \(unexpected pos .*\): make room; the"
    ):
        run(tiny_recipe(prepared))
    assert checkpoint_paths(prepared / "checkpoints") == []


def test_half_written_checkpoints_are_passed_over(prepared: Path, whole: tuple[Path, dict[str, Tensor]]) -> None:
    shutil.copytree(whole[0] / "checkpoints", prepared / "checkpoints")
    (prepared / "checkpoints" / "step-00000009.tmp").mkdir()
    assert run(tiny_recipe(prepared))[0].step == 8


def test_a_loss_that_is_not_finite_stops_the_run(prepared: Path) -> None:
    recipe = tiny_recipe(prepared)
    with pytest.raises(OrthrusError, match="step 4: the loss must be finite, found inf"):
        train(ChangedLossTask(recipe), recipe)
    assert [path.name for path in checkpoint_paths(prepared / "checkpoints")] == ["step-00000003"]
