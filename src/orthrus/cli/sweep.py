"""`orthrus sweep`: train a recipe in several variants and seeds, and compare what they give."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from orthrus.cli.common import STOPPED, Json, err, out, print_json, resumable, say
from orthrus.cli.train import Set

if TYPE_CHECKING:
    from orthrus.train.sweep import Figure

HELDOUT = "heldout/"  # what the names of an evaluation's figures begin with

File = Annotated[Path, typer.Argument(help="A sweep in TOML, such as recipes/sweeps/objectives.sweep.toml.")]
Results = Annotated[Path, typer.Option("--output", "-o", help="JSON lines, one per run; runs found there are done.")]
Report = Annotated[bool, typer.Option("--report", help="Train nothing; compare what is there.")]
Variants = Annotated[list[str] | None, typer.Option("--variant", help="Train this variant only; repeatable.")]
Figures = Annotated[
    list[str] | None,
    typer.Option("--figure", help="Figure of the last evaluation to show, such as maths/tokens_per_cycle; repeatable."),
]


def sweep(
    file: File,
    results: Results,
    overrides: Set = None,
    variants: Variants = None,
    report: Report = False,
    figures: Figures = None,
    as_json: Json = False,
) -> None:
    """Train every run of a sweep that has no line of results yet; then say how variants compare with the first.

    Exit code 3 when stopped before its end (run it again to continue).
    """
    from orthrus.train.sweep import carry_out, compare, load_sweep, missing, read_lines

    wanted = load_sweep(file)
    if not report:
        with resumable():
            for line in carry_out(wanted, file, results, overrides or [], only=variants or []):
                out().print(f"{line['variant']} {line['seed']}: {line['minutes']} minutes", soft_wrap=True)
    lines = read_lines(results)
    if not report and (left := missing(wanted, lines, only=variants or [])):
        say(f"{results}: stopped with {len(left)} runs left; the same command goes on from there", to=err)
        raise typer.Exit(STOPPED)
    every = {name.removeprefix(HELDOUT) for line in lines for name in line["figures"]}
    chosen = figures or sorted(name for name in every if name.endswith("tokens_per_cycle"))
    compared = compare(wanted, lines, [HELDOUT + name for name in chosen])
    if as_json:
        print_json(
            {variant: {name: asdict(figure) for name, figure in row.items()} for variant, row in compared.items()}
        )
        return
    table = Table("variant", *chosen)
    for variant, row in compared.items():
        table.add_row(variant, *(_cell(row.get(HELDOUT + name)) for name in chosen))
    out().print(table)


def _cell(figure: "Figure | None") -> str:
    """A mean, its ratio to the first variant's, and the interval of that, as far as there are any."""
    if figure is None:
        return ""
    ratio = "" if figure.ratio is None else f" · {figure.ratio:.2f}×"
    return f"{figure.mean:.2f}{ratio}" + (
        "" if figure.interval is None else " ({:.2f}–{:.2f})".format(*figure.interval)
    )
