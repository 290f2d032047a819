"""What verbs that measure share: options, loading, and how tables are printed."""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from orthrus.cli.common import err, out, resumable, say
from orthrus.errors import ConfigError
from orthrus.progress import Progress

if TYPE_CHECKING:
    from orthrus.bench.session import Outlook
    from orthrus.bench.tables import Grid

T = TypeVar("T")
N = TypeVar("N", int, float)

_NUMBER = re.compile(r"\d*\.?\d+(e-?\d+)?", re.ASCII)

Suites = Annotated[
    list[str],
    typer.Option(
        "--suite",
        metavar="SUITE",
        help="synthetic:maths|code|table|json[@heldout|@phrasing], a prompt-set file, the name of one in "
        "--data, or a Hugging Face dataset; NAME+N puts each question behind N characters of others. May be repeated.",
        show_default=False,
    ),
]
Data = Annotated[Path | None, typer.Option("--data", metavar="DIR", help="Where suites are looked for by name.")]
Dtypes = Annotated[
    list[str], typer.Option("--dtype", metavar="DTYPE,…", help="Precisions: float32, bfloat16, float16, int8, int4.")
]
Plans = Annotated[
    list[str],
    typer.Option("--plan", "--plans", metavar="PLAN,…", help="Of mode orthrus: auto, full, fixed:K, tree:N, …."),
]
Exacts = Annotated[list[str], typer.Option("--exact", metavar="EXACT,…", help="Of our modes: distribution, token.")]
NONE, ONE, FLOAT32, AUTO = list[str](), ["1"], ["float32"], ["auto"]
"""What options that take several values stand at."""
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Prompts of each suite; all of a file and 100 problems unless given."),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="A file of JSON lines; added to, and taken up where it ended.")
]
Plots = Annotated[Path | None, typer.Option("--plots", metavar="DIR", help="Draw plots into a directory.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the tables in markdown.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch on the CPU; its own choice unless given.")]


def listed(given: list[str]) -> list[str]:
    """Take an option's values, repeated or with commas between them."""
    return [part.strip() for value in given for part in value.split(",") if part.strip()]


def numbers(given: list[str], name: str, of: type[N], *, words: Mapping[str, N] | None = None) -> list[N]:
    """Take an option's numbers above 0, or words that stand for some; raises ConfigError for the first that is none."""
    values: list[N] = []
    named: Mapping[str, N] = words or {}
    for text in listed(given):
        number = float(text) if _NUMBER.fullmatch(text) else 0.0
        if text not in named and not (0 < number < float("inf") and of(number) == number):
            kind = "whole numbers" if of is int else "numbers"
            raise ConfigError(f"{name} must be {' or '.join([f'{kind} above 0', *named])}, found {text!r}")
        values.append(named[text] if text in named else of(number))
    return values


def show(grids: "Iterable[Grid]", *, markdown: bool = False) -> None:
    """Print tables, but for those without rows. What is wider than the terminal has its rows as columns."""
    for grid in (each for each in grids if each.rows):
        if markdown:
            say(grid.to_markdown() + "\n")
        else:
            for part in grid.within(out().width):
                out().print(part.to_rich())


def name_files(paths: Iterable[Path]) -> None:
    """Print the names of files that were written, on standard error."""
    for path in paths:
        say(str(path), to=err)


def prepare(threads: int | None = None, device: str | None = None) -> None:
    """Let torch use so many threads on the CPU (None: its own choice), and compile operators before any clock runs."""
    import torch

    from orthrus.checkpoints.load import device_of
    from orthrus.kernels import compiled

    if threads is not None:
        torch.set_num_threads(threads)
    if device_of(device).type == "cpu":
        compiled.prepare()


def carried_out(
    run: Callable[..., T],
    job: Any,
    output: Path,
    *,
    counted: str = "batch size and precision",
    kept: bool = True,
    **more: Any,
) -> T:
    """Run a job that writes a file of results, with progress; once stopped, it says that the same command goes on.

    It does not where the file is not `kept`. `counted` names what prompts are answered anew for.
    """
    with resumable() if kept else nullcontext(), Progress("") as progress:

        def begin(outlook: "Outlook") -> None:
            progress.expect(outlook.laps)
            todo = sum(len(heat.prompts) for heat in outlook.heats)
            parts = [f"{todo} prompts to answer (each {counted} counted)"]
            parts += [f"{outlook.done} done before"] if outlook.done else []
            parts += [f"{outlook.too_long} left out, longer than the model's context"] if outlook.too_long else []
            progress.print(" · ".join(parts))

        return run(job, output, on_start=begin, on_lap=progress.advance, **more)
