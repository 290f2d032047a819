"""The door: help, version, exit codes, and errors that leave standard output alone."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import orthrus
from orthrus.cli import generate, train
from orthrus.errors import ConfigError
from tests.cli.conftest import Ran

Cli = Callable[..., Ran]


def test_help_names_every_verb_and_loads_no_torch() -> None:
    """In a process of its own, because this one has torch already."""
    code = (
        "import sys, orthrus.cli; code = orthrus.cli.main(['--help']);"
        "print(code, *(name for name in ('torch', 'transformers', 'numpy') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1] == "0"
    for verb in ("generate", "chat", "demo", "train", "convert", "doctor"):
        assert any(f"│ {verb} " in line for line in lines)


def test_version(cli: Cli) -> None:
    assert cli("--version") == Ran(0, f"orthrus {orthrus.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["generate", "x", "--temprature", "1"], "--temperature"),
        (["generat"], "generate"),
        (["generate", "x", "--mode", "fast"], "orthrus"),
        (["generate", "x", "--top-k", "many"], "--top-k"),
        (["generate", "x", "--dtype", "int8"], "bfloat16"),
        (["generate", "x", "--batch-size", "0"], "--batch-size"),
        (["generate", "x", "--compare", "--mode", "ar"], "--compare runs both modes"),
        (["generate", "x", "--raw", "--turns", "all"], "--raw"),
        (["generate", "x", "--limit", "3"], "--limit"),
        (["generate", "x", "--input", "f.jsonl"], "not both"),
        (["convert", "a", "b"], "--format"),
        (["convert", "a", "b", "--format", "official", "--with-backbone"], "leave"),
        (["train"], "recipe"),
    ],
)
def test_a_command_that_cannot_be_understood_exits_2_with_a_hint(cli: Cli, arguments: list[str], hint: str) -> None:
    ran = cli(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert hint in ran.err


def test_an_interrupt_exits_130_with_a_clean_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "_records", interrupted)
    assert cli("generate", "x") == Ran(130, "", "\ninterrupted\n")


@pytest.mark.parametrize("error", [ConfigError("first\nsecond [bold]"), PermissionError(13, "Permission denied", "f")])
def test_errors_are_told_as_they_are_without_a_traceback(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(generate, "_records", fail)
    assert cli("generate", "x", "--json") == Ran(1, "", f"error: {error}\n")


RECIPE = Path(__file__).parents[2] / "recipes" / "nano/04-backbone-last.toml"


def test_train_names_the_nearest_key_and_exits_1(cli: Cli) -> None:
    ran = cli("train", RECIPE, "--set", "optimizer.lrr=0.1")
    assert (ran.code, ran.out) == (1, "")
    assert "optimizer.lrr: unknown key; the nearest valid key is optimizer.lr" in ran.err


@pytest.mark.parametrize(("finished", "code"), [(True, 0), (False, train.STOPPED)])
def test_train_runs_the_recipe_as_asked(cli: Cli, monkeypatch: pytest.MonkeyPatch, finished: bool, code: int) -> None:
    """The recipe reaches the loop with its overrides; a run that was stopped has an exit code of its own."""
    seen = []

    class Result:
        def __init__(self) -> None:
            self.finished = finished

    def loop(task: object, recipe: object, *, resume: bool) -> Result:
        seen.append((recipe, resume))
        return Result()

    monkeypatch.setattr("orthrus.train.run.train", loop)
    monkeypatch.setattr("orthrus.train.run.BackboneTask", lambda recipe: None)
    assert cli("train", RECIPE, "--no-resume", "--set", "run.seed=7").code == code
    [(recipe, resume)] = seen
    assert not resume
    assert recipe.run.seed == 7
