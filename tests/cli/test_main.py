"""The door: help, version, exit codes, and errors that leave standard output alone."""

import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import orthrus
from orthrus.cli import generate
from orthrus.cli.common import STOPPED
from orthrus.errors import ConfigError, OrthrusError, PromptError
from orthrus.train.loop import TrainResult
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
        (["generate", "x", "--dtype", "int9"], "bfloat16"),
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


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("first\nsecond [bold]"), 2),
        (PromptError("the prompt must not be empty"), 1),
        (OrthrusError("the Hub must be reachable"), 1),
        (PermissionError(13, "Permission denied", "f"), 1),
    ],
)
def test_errors_are_told_as_they_are_without_a_traceback(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    """Exit code 2 for a value that cannot be honoured, as typer has it for one that it refuses itself."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(generate, "_records", fail)
    assert cli("generate", "x", "--json") == Ran(code, "", f"error: {error}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "x", "--max-new-tokens", "0"],
        ["generate", "x", "--temperature", "0", "--top-k", "3"],
        ["generate", "x", "--plan", "nonsense"],
        ["generate", "x", "--device", "cuda:99"],
        ["chat", "--top-p", "7"],
        ["demo", "--plan", "fixed"],
        ["audit", "--dtype", "int3"],
        ["bench", "run", "--suite", "synthetic:maths", "--output", "x", "--modes", "fast"],
        ["train", "nowhere.toml"],
    ],
)
def test_values_that_the_package_refuses_are_misuse_too(cli: Cli, arguments: list[str]) -> None:
    ran = cli(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: ")


def test_the_package_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m orthrus` is the same door."""
    monkeypatch.setattr(sys, "argv", ["orthrus", "--version"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("orthrus", run_name="__main__")
    assert capsys.readouterr().out == f"orthrus {orthrus.__version__}\n"


RECIPE = Path(__file__).parents[2] / "recipes" / "nano/04-backbone-last.toml"


def test_train_names_the_nearest_key_and_exits_2(cli: Cli) -> None:
    ran = cli("train", RECIPE, "--set", "optimizer.lrr=0.1")
    assert (ran.code, ran.out) == (2, "")
    assert "optimizer.lrr: unknown key; the nearest valid key is optimizer.lr" in ran.err


@pytest.mark.parametrize(
    ("step", "before", "code", "message"),
    [
        (9, 0, 0, "out: finished after 9 steps: out/model"),
        (9, 9, 0, "out: finished before, after 9 steps: out/model; --no-resume trains it anew"),
        (5, 3, STOPPED, "out: stopped after step 5 of 9; the same command goes on from there"),
    ],
)
def test_train_runs_the_recipe_as_asked_and_says_how_it_ended(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, step: int, before: int, code: int, message: str
) -> None:
    """The recipe reaches the loop with its overrides; a run that was stopped has an exit code of its own."""
    seen = []

    def loop(task: object, recipe: object, *, resume: bool) -> TrainResult:
        seen.append((recipe, resume))
        model = Path("out/model") if step == 9 else None
        return TrainResult(step=step, before=before, finished=step == 9, metrics={}, model=model)

    monkeypatch.setattr("orthrus.train.run.train", loop)
    monkeypatch.setattr("orthrus.train.run.BackboneTask", lambda recipe: None)
    overrides = ("--set", "run.seed=7", "--set", "run.output=out", "--set", "schedule.steps=9")
    assert cli("train", RECIPE, "--no-resume", *overrides) == Ran(code, "", message + "\n")
    [(recipe, resume)] = seen
    assert not resume
    assert recipe.run.seed == 7
    monkeypatch.setenv("RANK", "1")
    assert cli("train", RECIPE, *overrides).err == "", "of several processes one speaks"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_long_work_that_is_stopped_goes_on(cli: Cli, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """While data is prepared too, where nothing but the process itself could say so; the handler is given back."""

    def stopped(*_: object) -> None:
        os.kill(os.getpid(), number)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("orthrus.train.run.BackboneTask", stopped)
    assert cli("train", RECIPE) == Ran(STOPPED, "", "stopped; the same command goes on from there\n")
    assert signal.getsignal(signal.SIGTERM) == before
