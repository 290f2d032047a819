"""`orthrus bench`, a function for each of its commands: measure, and read what was measured.

Options and printing only; `orthrus.bench` measures decoding, `orthrus.train.measure` training.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from orthrus.cli import bench_peers, bench_serve, common, measuring
from orthrus.cli.common import err, print_json, say
from orthrus.cli.train import Recipe, Set
from orthrus.errors import ConfigError
from orthrus.progress import Progress

_ADDED = typer.Option("--output", "-o", metavar="FILE", help="A file of JSON lines; added to.")
Batches = Annotated[list[str], typer.Option("--batch", metavar="N,…", help="Prompts decoded together.")]
_MODES, _EXACTS, _CONTEXTS = ["ar,orthrus"], ["distribution"], ["256"]
_WIDTHS, _BASELINES, _REDUCED = ["1,2,4,8,16,32,64"], ["ar,hf,hf-static"], ["bfloat16"]


def application() -> typer.Typer:
    app = typer.Typer(help="Measure decoding and training, and report what was measured.", no_args_is_help=True)
    for command in (run, passes, train, quality, bench_serve.serve, bench_peers.peers, report):
        app.command()(command)
    return app


def run(
    suite: measuring.Suites,
    output: measuring.Output,
    model: common.ModelArgument = common.DEFAULT,
    backbone: common.Backbone = None,
    data: measuring.Data = None,
    modes: Annotated[
        list[str],
        typer.Option(
            "--modes", metavar="MODE,…", help="ar, orthrus, hf, hf-static, hf-lookup, llama.cpp, llama.cpp-lookup."
        ),
    ] = _MODES,
    plans: measuring.Plans = measuring.AUTO,
    exact: measuring.Exacts = _EXACTS,
    gguf: Annotated[
        list[str],
        typer.Option(
            "--gguf",
            metavar="FORM|FILE,…",
            help="What llama.cpp answers from: a .gguf file, or a form (q8_0, q4_1, bf16, …) made from the backbone's "
            "own one; that as it is unless given.",
        ),
    ] = measuring.NONE,
    batch: Batches = measuring.ONE,
    dtype: measuring.Dtypes = measuring.FLOAT32,
    limit: measuring.Limit = None,
    max_new_tokens: common.MaxNewTokens = 256,
    rounds: Annotated[int, typer.Option(min=1, help="How often everyone answers every prompt.")] = 3,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds over the first prompts that do not count.")] = 1,
    threads: measuring.Threads = None,
    device: common.Device = None,
    compile: common.Compile = False,
    offload: common.Offload = None,
    prices: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Results of orthrus bench passes, from any machine: count what it took for each pass, not the clock.",
        ),
    ] = None,
) -> None:
    """Let decoders race over prompts, greedily, one after another on each; run again to continue.

    Suites of the domain code execute what the model writes (see `orthrus.data.synthetic`).
    """
    from orthrus.bench.contenders import contenders
    from orthrus.bench.speed import run as bench
    from orthrus.checkpoints.load import gguf_source

    ggufs = tuple(measuring.listed(gguf))
    job = bench.Job(
        model=model,
        suites=tuple(suite),
        folder=data,
        limit=limit,
        contenders=contenders(measuring.listed(modes), measuring.listed(plans), measuring.listed(exact), ggufs),
        batches=tuple(measuring.numbers(batch, "--batch", int)),
        dtypes=tuple(measuring.listed(dtype)),
        max_new_tokens=max_new_tokens,
        rounds=rounds,
        warmup=warmup,
        compile=compile,
        offload=offload is not None,
        prices=prices,
        gguf=ggufs,
        gguf_source=gguf_source(model, backbone),
    )
    measuring.prepare(threads, device)
    load = common.loader(model, device=device, backbone=backbone, compile=compile, offload=offload)
    measuring.carried_out(bench.run, job, output, load=load)
    say(f"{output}: complete; orthrus bench report {output}", to=err)


def passes(
    output: Annotated[Path, _ADDED],
    model: Annotated[
        str,
        typer.Argument(
            help="A bundled model, a directory, a Hub id; or a config.json, for random weights of a shape.",
            **common.WHICH,
        ),
    ] = common.DEFAULT,
    backbone: common.Backbone = None,
    widths: Annotated[list[str], typer.Option("--width", metavar="N,…", help="Positions of a pass.")] = _WIDTHS,
    stops: Annotated[
        list[str],
        typer.Option("--stops", metavar="M,…", help="Fused passes for so many stop points, or all; none unless given."),
    ] = measuring.NONE,
    contexts: Annotated[list[str], typer.Option("--context", metavar="N,…", help="Tokens in the cache.")] = _CONTEXTS,
    batch: Batches = measuring.ONE,
    dtype: measuring.Dtypes = measuring.FLOAT32,
    repeats: Annotated[int, typer.Option(min=1, help="How often every pass is timed.")] = 20,
    floor: Annotated[
        bool, typer.Option("--floor", help="Time a pass's matrix products alone, a read of keys, a copy of bytes.")
    ] = False,
    prompt: Annotated[
        bool, typer.Option("--prompt", help="Time reading prompts of --context tokens up to the first token.")
    ] = False,
    positions: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Positions the model is taken to have, beyond what it was trained for."),
    ] = None,
    threads: measuring.Threads = None,
    device: common.Device = None,
    compile: common.Compile = False,
    pack: Annotated[
        bool | None, typer.Option("--pack/--no-pack", help="Packed linear layers or plain ones; as load() decides.")
    ] = None,
) -> None:
    """Time single passes (a plain step, drafts, verifications, fused ones) by width, context and batch."""
    from orthrus.bench import lines
    from orthrus.bench.session import require_precisions
    from orthrus.bench.shapes import is_shape, shaped
    from orthrus.bench.speed.passes import ALL, costs, kinds
    from orthrus.data.records import append

    measuring.prepare(threads, device)
    dtypes = measuring.listed(dtype)
    require_precisions(dtypes)
    wide = measuring.numbers(widths, "--width", int)
    long = measuring.numbers(contexts, "--context", int)
    many = measuring.numbers(batch, "--batch", int)
    fused = measuring.numbers(stops, "--stops", int, words={"all": ALL})
    head: dict[str, Any] = {}
    each = len(long) * len(many) * len(kinds(wide, fused, floor=floor, prompt=prompt)) * repeats
    with Progress("passes", len(dtypes) * each) as progress:
        for name in dtypes:
            if is_shape(model):
                loaded = shaped(model, dtype=name, device=device, compile=compile, pack=pack)
            else:
                loaded, _ = common.loader(model, device=device, backbone=backbone, compile=compile, pack=pack)(name)
            if positions is not None:
                loaded.config.get_text_config().max_position_embeddings = positions
            if not head:
                head = lines.head(dtypes=dtypes, device=loaded.device)
                append(output, [head])
            kind = f"{name} compiled" if compile else f"{name} unpacked" if pack is False else name
            labels = {"kind": lines.PASS, "provenance": head["id"], "model": model, "dtype": kind}
            for cost in costs(
                loaded,
                widths=wide,
                stops=fused,
                contexts=long,
                batches=many,
                repeats=repeats,
                floor=floor,
                prompt=prompt,
                on_pass=progress.advance,
            ):
                append(output, [{**labels, **cost.to_dict()}])
    say(f"{output}: complete; orthrus bench report {output}", to=err)


def train(
    recipe: Recipe,
    overrides: Set = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps that count.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Steps before them that do not.")] = 2,
    output: Annotated[Path | None, _ADDED] = None,
    json: common.Json = False,
) -> None:
    """Time a view recipe's training steps on random rows, beside the machine's matrix products; no run is touched."""
    from transformers.utils import logging

    from orthrus.bench import lines
    from orthrus.bench.speed.tables import steps as table
    from orthrus.data.records import append
    from orthrus.train.config import load_recipe
    from orthrus.train.measure import measure
    from orthrus.train.sections import ViewRecipe

    checked = load_recipe(recipe, overrides or [])
    if not isinstance(checked, ViewRecipe):
        raise ConfigError(f"{recipe}: kind = 'view' is required, found {checked.kind!r}: only views are measured")
    logging.disable_progress_bar()
    with Progress("steps", warmup + steps) as progress:
        cost = measure(checked, steps=steps, warmup=warmup, on_step=progress.advance)
    head = lines.head(dtypes=[checked.run.dtype], device=checked.run.device)
    head |= {"recipe": checked.model_dump(mode="json")}
    record = {
        "kind": lines.STEP,
        "provenance": head["id"],
        "recipe": str(recipe),
        "backbone": checked.model.backbone,
        "device": checked.run.device,
        "dtype": checked.run.dtype,
        "threads": head["threads"],
        "batch_rows": checked.run.batch_rows,
        "row_tokens": checked.data.row_tokens,
        **cost.to_dict(),
    }
    if output is not None:
        append(output, [head, record])
    if json:
        print_json({**record, "provenance": head})
    else:
        measuring.show([table([record])])


def quality(
    suite: measuring.Suites,
    output: measuring.Output,
    model: common.ModelArgument = common.DEFAULT,
    backbone: common.Backbone = None,
    data: measuring.Data = None,
    dtype: Annotated[
        list[str],
        typer.Option(
            "--dtype",
            metavar="DTYPE,…",
            help="Precisions beside float32, which always runs: bfloat16, float16, int8, int4.",
        ),
    ] = _REDUCED,
    forms: Annotated[
        list[str],
        typer.Option(
            "--form",
            metavar="FORM,…",
            help="Forms of llama.cpp's to measure, too (q8_0, q4_1, …): weights and inputs rounded to blocks, in "
            "float32; none unless given.",
        ),
    ] = measuring.NONE,
    limit: measuring.Limit = None,
    max_new_tokens: common.MaxNewTokens = 256,
    threads: measuring.Threads = None,
    device: common.Device = None,
) -> None:
    """Compare precisions (bfloat16 unless given) with float32: perplexity, divergence and agreement; right answers.

    float32 answers plainly, and every precision reads these answers; run again to continue. Suites of the domain code
    execute what the model writes (see `orthrus.data.synthetic`).
    """
    from orthrus.bench import quality as bench
    from orthrus.bench.session import Job

    named = tuple(measuring.listed(dtype))
    job = Job(model=model, suites=tuple(suite), folder=data, limit=limit, dtypes=named, max_new_tokens=max_new_tokens)
    measuring.prepare(threads, device)
    load = common.loader(model, device=device, backbone=backbone)
    rounded = tuple(measuring.listed(forms))
    measuring.carried_out(bench.run, job, output, load=load, forms=rounded, counted="precision")
    say(f"{output}: complete; orthrus bench report {output}", to=err)


def report(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE…", help="What `run`, `passes`, `train`, `quality` wrote.", show_default=False),
    ],
    against: Annotated[
        list[str],
        typer.Option(
            "--against", metavar="MODE,…", help="Baselines of ratios, orthrus:PLAN, llama.cpp:FORM and ar@token too."
        ),
    ] = _BASELINES,
    prices: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Results of orthrus bench passes: of modes ar and orthrus, what counted passes take, not the clock.",
        ),
    ] = None,
    markdown: measuring.Markdown = False,
    plots: measuring.Plots = None,
    json: common.Json = False,
) -> None:
    """Print tables (and draw plots) of measured figures; intervals are 95 %, by bootstrap over prompts."""
    if json and markdown:
        raise typer.BadParameter("--json and --markdown are two ways to print: give one of them")
    from orthrus.bench.speed.plots import plot
    from orthrus.bench.speed.report import read_report
    from orthrus.bench.speed.tables import tables

    read = read_report(files, baselines=measuring.listed(against), prices=prices)
    if plots is not None:
        measuring.name_files(plot(read, plots))
    if json:
        print_json(read.to_dict())
    else:
        measuring.show(tables(read), markdown=markdown)
