"""`orthrus train`: run a recipe. A thin door to `orthrus.train`, which knows everything about training."""

from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[Path, typer.Argument(help="A recipe in TOML, such as recipes/nano.toml.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key; may be repeated."),
]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Continue where an earlier run of it stopped.")]

STOPPED = 3


def train(recipe: Recipe, overrides: Set = None, resume: Resume = True) -> None:
    """Train by a recipe; exit code 3 when stopped before its end (run it again to continue)."""
    from orthrus.train.config import load_recipe
    from orthrus.train.run import run

    if not run(load_recipe(recipe, overrides or []), resume=resume).finished:
        raise typer.Exit(STOPPED)
