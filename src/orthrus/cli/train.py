"""`orthrus train`: train by a recipe, or say what that takes; `orthrus.train` does the work."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from orthrus.cli.common import STOPPED, Json, err, out, print_json, resumable, say
from orthrus.errors import ConfigError

if TYPE_CHECKING:
    from orthrus.train.loop import TrainResult
    from orthrus.train.plan import Plan

Recipe = Annotated[Path, typer.Argument(help="A recipe in TOML, such as recipes/qwen3-0.6b.toml.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key; may be repeated."),
]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Continue where an earlier run of it stopped.")]

Planned = Annotated[bool, typer.Option("--plan", help="Say what it takes and do nothing; reads no weights.")]
Devices = Annotated[
    int | None, typer.Option(min=1, help="With --plan: how many equal devices share a step; one unless given.")
]


def train(
    recipe: Recipe,
    overrides: Set = None,
    resume: Resume = True,
    planned: Planned = False,
    devices: Devices = None,
    as_json: Json = False,
) -> None:
    """Train by a recipe; exit code 3 when stopped before its end (run it again to continue)."""
    from orthrus.train.config import load_recipe

    if planned:
        from orthrus.train.plan import plan
        from orthrus.train.work import answers_of

        wanted = load_recipe(recipe, overrides or [])
        show(plan(wanted, devices=devices or 1, answers=answers_of(wanted)), as_json=as_json)
        return
    if as_json:
        raise ConfigError("--json prints a plan: give --plan too, or read log.jsonl of the run")
    if devices is not None:
        raise ConfigError("--devices is about a plan: give --plan too, or start so many processes with torchrun")
    from orthrus.train.run import run

    checked = load_recipe(recipe, overrides or [])
    with resumable():  # while data is prepared; the loop itself ends the step at hand
        result = run(checked, resume=resume)
    if os.environ.get("RANK", "0") == "0":  # one of the processes that torchrun or accelerate launch starts
        say(_ending(result, checked.schedule.steps, checked.run.output), to=err)
    if not result.finished:
        raise typer.Exit(STOPPED)


def _ending(result: "TrainResult", steps: int, output: str) -> str:
    """Say in a line how a run ended and what can be done next."""
    if not result.finished:
        return f"{output}: stopped after step {result.step} of {steps}; the same command goes on from there"
    if result.before == steps:
        return f"{output}: finished before, after {steps} steps: {result.model}; --no-resume trains it anew"
    return f"{output}: finished after {steps} steps: {result.model}"


def show(plan: "Plan", *, as_json: bool = False) -> None:
    if as_json:
        print_json(plan.to_dict())
        return
    shapes = plan.shapes
    facts = {
        "steps": f"{plan.steps:,}",
        "tokens read": f"{plan.tokens:,}",
        "slots drafted": f"{plan.drafted:,}",
        "parameters": f"{shapes.total:,}, {shapes.trainable:,} of them trained",
        "operations a step": f"{plan.operations:.3g}",
        "memory a device": f"{sum(plan.memory.values()) / 1e9:.2f} GB ("
        + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in plan.memory.items())
        + ")",
    }
    for name, value in facts.items():
        out().print(f"{name:18} {value}", soft_wrap=True)
    out().print(_hours(plan))


def _hours(plan: "Plan") -> Table:
    from orthrus.train.plan import HARDWARE

    table = Table("device", "devices", "share of peak", "seconds a step", "hours", "fits")
    need = sum(plan.memory.values())
    for name, device in HARDWARE.items():
        fits = "" if device.memory is None else "yes" if need < device.memory else "no"
        share = "measured" if device.share == 1 else f"{device.share:.0%}"
        table.add_row(name, str(plan.devices), share, f"{plan.seconds[name]:.3g}", f"{plan.hours[name]:.3g}", fits)
    return table
