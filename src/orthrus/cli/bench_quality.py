"""`orthrus bench quality`: what a precision costs in quality. Options and printing only."""

from pathlib import Path
from typing import Annotated

import typer

from orthrus.cli import common
from orthrus.cli.common import err, resumable, say
from orthrus.cli.measuring import Threads, loader, progress, set_threads

Suites = Annotated[
    list[str],
    typer.Option("--suite", metavar="SUITE", help="Prompts, as of bench run; may be repeated.", show_default=False),
]


def quality(
    suite: Suites,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A file of JSON lines; added to, and taken up where it ended.")
    ],
    model: common.ModelArgument = common.DEFAULT,
    backbone: common.Backbone = None,
    data: Annotated[Path | None, typer.Option("--data", metavar="DIR", help="The folder of the suites.")] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype",
            metavar="DTYPE,…",
            help="Precisions: bfloat16, float16, int8; bfloat16 unless given. float32 always runs beside them.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts of each suite; all of a file and 100 problems unless given."),
    ] = None,
    max_new_tokens: common.MaxNewTokens = 256,
    threads: Threads = None,
    device: common.Device = None,
) -> None:
    """Compare precisions with float32: perplexity, divergence and agreement on its own answers; right answers.

    float32 answers plainly, and every precision reads these answers; run again to continue. Suites of the domain code
    execute what the model writes (see `orthrus.data.synthetic`).
    """
    from orthrus.bench import quality as bench

    named = [name.strip() for value in dtype or ["bfloat16"] for name in value.split(",") if name.strip()]
    job = bench.Job(
        model=model, suites=tuple(suite), folder=data, limit=limit, dtypes=tuple(named), max_new_tokens=max_new_tokens
    )
    set_threads(threads)

    with resumable(), progress() as (start, lap):
        bench.run(
            job,
            output,
            load=loader(model, device, backbone=backbone),
            on_start=lambda todo, done: start(todo, f"{todo} answers to read · {done} done before"),
            on_lap=lap,
        )
    say(f"{output}: complete; orthrus bench report {output}", to=err)
