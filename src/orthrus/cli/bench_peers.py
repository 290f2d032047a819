"""`orthrus bench peers`: race the view against other ways to decode faster. Options and printing only."""

import time
from typing import Annotated

import typer

from orthrus.cli import common, measuring
from orthrus.cli.common import err, say

Peers = Annotated[
    list[str],
    typer.Option(
        "--peer",
        metavar="KIND[=SOURCE][@HOW]",
        help="orthrus, dflash=DIR, eagle3=DIR, draft=DIR, lookup, hf-lookup, hf-draft=DIR, hf-dflash=DIR, or "
        "blocks=DIR (block diffusion); HOW is a plan (full, fixed:K, tree:N), for blocks a threshold or tokens "
        "per pass, with :entropy for that order, :N for parts; may be repeated.",
        show_default=False,
    ),
]


def peers(
    peer: Peers,
    suite: measuring.Suites,
    output: measuring.Output,
    model: common.ModelArgument = common.DEFAULT,
    backbone: common.Backbone = None,
    data: measuring.Data = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Prompts decoded together; may be repeated.")] = None,
    dtype: Annotated[str, typer.Option(help="Precision: float32, bfloat16, float16.")] = "float32",
    limit: measuring.Limit = None,
    max_new_tokens: common.MaxNewTokens = 256,
    rounds: Annotated[int, typer.Option(min=1, help="How often every peer answers every prompt.")] = 3,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds over the first prompts that are not counted.")] = 1,
    context: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Also time drafts after random prompts of this many tokens; may be repeated."),
    ] = None,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Count CPU time instead of wall time, for busy machines.")
    ] = False,
    plots: measuring.Plots = None,
    markdown: measuring.Markdown = False,
    threads: measuring.Threads = None,
    device: common.Device = None,
) -> None:
    """Race peers and plain decoding over prompts, greedily. Trains nothing. Run again to continue.

    All drafters run in our engine, on the same backbone. Suites of the domain code execute the answers.
    """
    from orthrus.bench.peers import table
    from orthrus.bench.peers.contest import Field, Peer
    from orthrus.bench.race import PLAIN
    from orthrus.bench.speed import run as bench
    from orthrus.data.records import append

    asked = [Peer.parse(text) for text in peer]
    clock = time.process_time if cpu_time else time.perf_counter
    job = bench.Job(
        model=model,
        suites=tuple(suite),
        folder=data,
        limit=limit,
        contenders=(PLAIN, *(one.contender for one in asked)),
        batches=tuple(batch or [1]),
        dtypes=(dtype,),
        max_new_tokens=max_new_tokens,
        rounds=rounds,
        warmup=warmup,
        settings={"peers": [[one.label, one.how, one.weights()] for one in asked], "cpu_time": cpu_time},
    )
    measuring.prepare(threads, device)
    field = Field(
        peers=asked,
        contexts=tuple(dict.fromkeys(context or ())),
        clock=clock,
        load=lambda source: common.loader(source, device=device, backbone=backbone),
    )
    load = common.loader(model, device=device, backbone=backbone)
    labels = measuring.carried_out(bench.run, job, output, load=load, clock=clock, others=field.decoders)
    if labels:
        field.cost(job.batches)
        append(output, field.records(labels))
    elif context:
        say(f"{output} holds the whole race: --context times drafts in a race alone, name another file", to=err)
    measuring.name_files(table.plot(output, plots) if plots is not None else ())
    measuring.show((*table.tables(output), *table.costs(output)), markdown=markdown)
    for caveat in table.CAVEATS:
        say(f"* {caveat}")
