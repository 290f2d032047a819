"""`orthrus sweep`: train a recipe in several variants and seeds, and compare what they give."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from orthrus.cli.common import Json, out, print_json
from orthrus.cli.train import Set

File = Annotated[Path, typer.Argument(help="A sweep in TOML, such as recipes/objectives.sweep.toml.")]
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
    """Train every run of a sweep that has no line of results yet; then say how variants compare with the first."""
    from orthrus.train.sweep import carry_out, compare, load_sweep, read_lines

    wanted = load_sweep(file)
    if not report:
        for line in carry_out(wanted, file, results, overrides or [], only=variants or []):
            out().print(f"{line['variant']} {line['seed']}: {line['minutes']} minutes", soft_wrap=True)
    lines = [line for line in read_lines(results) if line["variant"] in wanted.variants]
    every = {name.removeprefix("heldout/") for line in lines for name in line["figures"]}
    chosen = figures or sorted(name for name in every if name.endswith("tokens_per_cycle"))
    table = compare(lines, [f"heldout/{name}" for name in chosen])
    if as_json:
        print_json({v: {n: {"mean": f.mean, "ratio": f.ratio, "interval": f.interval} for n, f in row.items()}
                    for v, row in table.items()})  # fmt: skip
        return
    shown = Table("variant", *chosen)
    for variant, row in table.items():
        cells = []
        for name in chosen:
            figure = row.get(f"heldout/{name}")
            span = "" if figure is None or figure.interval is None else " ({:.2f}–{:.2f})".format(*figure.interval)
            cells.append("" if figure is None else f"{figure.mean:.2f} · {figure.ratio:.2f}×{span}")
        shown.add_row(variant, *cells)
    out().print(shown)
