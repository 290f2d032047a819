"""What a run leaves for readers, and where its figures are sent."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from orthrus.errors import ConfigError
from orthrus.train.backbone import BackboneTask
from orthrus.train.card import computing_minutes
from orthrus.train.loop import train
from tests.train.tiny import tiny_recipe


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that TensorBoard follows."""
    output = tmp_path_factory.mktemp("tracked")
    recipe = tiny_recipe(output, run={"trackers": ["tensorboard"]}, schedule={"steps": 4})
    assert train(BackboneTask(recipe), recipe).finished
    return output


def test_tensorboard_gets_the_figures_of_the_log(output: Path) -> None:
    """Every loss and every held-out figure, at its step."""
    [folder] = {path.parent for path in (output / "tensorboard").glob("events*")}
    events = EventAccumulator(str(folder)).Reload()
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    for event, name in (("step", "loss"), ("evaluation", "heldout/maths")):
        sent = [(scalar.step, scalar.value) for scalar in events.Scalars(name)]
        assert sent == [(line["step"], pytest.approx(line[name])) for line in lines if line["event"] == event]


def test_the_card_says_what_ran_where_and_how_it_ended(output: Path) -> None:
    """Recipe, commit, versions, hardware, minutes, tokens and figures are on it, and a picture beside it."""
    card = (output / "RUN.md").read_text()
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert f"| heldout/maths | {lines[-1]['heldout/maths']:.4g} |" in card
    assert f"{4 * 6 * 320:,} (6 rows of 320 a step)" in card
    about = lines[0]["provenance"]
    assert all(str(about[name]) in card for name in ("commit", "device", "torch", "transformers", "command", "date"))
    assert '"muon_lr": 0.01' in card
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_call_after_the_end_is_no_piece_of_the_run(output: Path) -> None:
    """The finished run is found, and its card stays true."""
    recipe = tiny_recipe(output, run={"trackers": ["tensorboard"]}, schedule={"steps": 4})
    assert train(BackboneTask(recipe), recipe).before == 4
    assert "| Steps | 4 of 4, in 1 piece |" in (output / "RUN.md").read_text()


def test_minutes_are_those_of_all_steps() -> None:
    """Each report's mean stands for the steps since the one before, whatever their number."""
    lines = [
        {"event": "step", "step": 10, "step_seconds": 3.0},
        {"event": "start", "step": 10},
        {"event": "step", "step": 14, "step_seconds": 7.5},
    ]
    assert computing_minutes(lines) == 1.0


def test_a_tracker_that_is_not_installed_is_refused_before_training(tmp_path: Path) -> None:
    """Weights & Biases is not here: nothing is trained, and the error says what to install."""
    recipe = tiny_recipe(tmp_path, run={"trackers": ["wandb"]})
    with pytest.raises(ConfigError, match="wandb needs the package wandb, found none: pip install wandb"):
        train(BackboneTask(recipe), recipe)
    assert not (tmp_path / "log.jsonl").exists()
