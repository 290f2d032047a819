"""Measuring training steps: whose time is whose, what a floor is made of, and that nothing is left behind.

Times come from a clock that moves on by one second whenever it is read; nothing is asserted of real ones.
"""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from orthrus.cli import main
from orthrus.errors import ConfigError
from orthrus.train import measure as module
from orthrus.train.anchors import starts
from orthrus.train.measure import PHASES, StepCost, measure, random_rows
from orthrus.train.plan import plan
from orthrus.train.ranks import Ranks
from orthrus.train.shapes import shapes_of
from orthrus.train.step import Training
from orthrus.train.work import step_operations
from tests.train.tiny import saved_backbone, tiny_tokenizer, view_recipe

ROOT = Path(__file__).parents[2]
SIDE = 16


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 on disk."""
    return saved_backbone(tmp_path_factory.mktemp("backbone"), tiny_tokenizer(), "qwen3")


@pytest.fixture(autouse=True)
def small_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product that gives the rate takes no time in tests."""
    monkeypatch.setattr(module, "_SIDE", {"cpu": SIDE})


@pytest.mark.parametrize("parts", [1, 2])
def test_every_second_of_a_step_belongs_to_a_phase(backbone: Path, tmp_path: Path, parts: int) -> None:
    """The clock is read where phases end: per part before, between and after the two passes and the loss."""
    recipe = view_recipe(backbone, tmp_path / "run", run={"grad_accumulation": parts})
    ticks, done = itertools.count(), itertools.count()
    cost = measure(recipe, steps=2, warmup=1, clock=lambda: float(next(ticks)), on_step=lambda: next(done) and None)
    each = {"frozen": parts, "block": parts, "loss": parts, "backward": parts + 1, "optimizer": 1}
    assert cost.phases_seconds == [each, each]
    assert cost.to_dict()["steps_seconds"] == [4 * parts + 2] * 2
    assert cost.rates == [2 * SIDE**3] * 2
    assert next(done) == 3, "warm-up steps are told of, too"
    assert (cost.tokens, cost.slots, cost.parts) == (2 * 200, 2 * 12 * 6, parts)
    assert cost.memory > 0
    assert cost.operations == plan(recipe).operations


def test_the_floor_is_operations_over_the_rate_and_figures_are_medians() -> None:
    """A slow step and a slow product move neither."""
    phases = [dict.fromkeys(PHASES, seconds) for seconds in (1.0, 2.0, 9.0)]
    cost = StepCost(
        phases_seconds=phases, rates=[10.0, 20.0, 1.0], operations=40.0, tokens=30, slots=8, parts=1, memory=7
    )
    values = cost.to_dict()
    assert (values["seconds"], values["tokens_per_second"], values["operations_per_second"]) == (10.0, 3.0, 10.0)
    assert (values["floor_seconds"], values["floor_share"]) == (4.0, 0.4)
    assert values["phases"] == dict.fromkeys(PHASES, 2.0)


def test_the_operations_are_those_that_torch_counts(backbone: Path, tmp_path: Path) -> None:
    """But for attention, most of which torch does not count on a CPU, and slots with nothing to predict."""
    recipe = view_recipe(backbone, tmp_path / "run", objective={"block_lengths": [6]})
    shapes = shapes_of(recipe)
    planned = step_operations(recipe, replace(shapes, attention=0))
    laps = module._Laps(perf_counter, torch.device("cpu"))
    task = module._TimedTask(recipe, random_rows(recipe, vocabulary=shapes.vocabulary), laps)
    with FlopCounterMode(display=False) as counter:
        Training(task, recipe, Ranks("cpu")).accumulate(0, parts=1)
    counts = counter.get_flop_counts()["Global"]
    counted = sum(count for operation, count in counts.items() if operation is not torch.ops.aten.bmm)
    assert 0.95 < counted / planned <= 1


def test_random_rows_are_one_answer_each(backbone: Path, tmp_path: Path) -> None:
    """Blocks can start at every token but the last."""
    rows = random_rows(view_recipe(backbone, tmp_path), vocabulary=300).rows
    assert rows.token_ids.shape == rows.position.shape == (2, 200)
    assert 0 <= rows.token_ids.min() < rows.token_ids.max() < 300
    can_start = starts(torch.from_numpy(rows.document), torch.from_numpy(rows.answer))
    assert can_start.sum(1).tolist() == [199, 199]


@pytest.mark.parametrize(("steps", "warmup"), [(0, 0), (1, -1)])
def test_numbers_that_cannot_be_are_refused(backbone: Path, tmp_path: Path, steps: int, warmup: int) -> None:
    with pytest.raises(ConfigError, match="at least 1 step"):
        measure(view_recipe(backbone, tmp_path / "run"), steps=steps, warmup=warmup)


def test_the_command_measures_reports_and_touches_no_run(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No answers are prepared, no earlier view is needed, and `run.output` stays as it was: not there."""
    keys = [
        f"model.backbone={backbone}", "model.start_from=nowhere", "data.row_tokens=48", "objective.blocks_per_row=2",
        "run.batch_rows=2", f"run.output={tmp_path / 'run'}",
    ]  # fmt: skip
    recipe = ROOT / "recipes" / "nano" / "11-view-last.toml"
    arguments = ["bench", "train", str(recipe), "--steps", "2", "--warmup", "1"]
    arguments += [word for key in keys for word in ("--set", key)]
    file = tmp_path / "steps.jsonl"
    assert main([*arguments, "--json", "--output", str(file)]) == 0
    printed = json.loads(capsys.readouterr().out)
    head, line = (json.loads(text) for text in file.read_text().splitlines())
    assert (head["kind"], line["kind"], line["provenance"]) == ("provenance", "step", head["id"])
    assert printed == {**line, "provenance": head}
    assert head["recipe"]["data"]["row_tokens"] == 48
    assert len(line["steps_seconds"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["steps.jsonl"]
    assert main(["bench", "report", str(file), "--markdown"]) == 0
    assert "| floor / step |" in capsys.readouterr().out
    assert main(["bench", "report", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == [line]


def test_a_backbones_recipe_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", str(ROOT / "recipes" / "nano/01-backbone-start.toml")]) == 2
    assert "kind = 'view' is required" in capsys.readouterr().err
