"""`orthrus bench quality`: what a precision costs in quality. Options and printing only."""

from typing import Annotated

import typer

from orthrus.cli import common, measuring
from orthrus.cli.common import err, say

_DTYPES = ["bfloat16"]


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
    ] = _DTYPES,
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
    measuring.set_threads(threads)
    load = measuring.loader(model, device, backbone=backbone)
    rounded = tuple(measuring.listed(forms))
    measuring.carried_out(bench.run, job, output, load=load, forms=rounded, counted="precision")
    say(f"{output}: complete; orthrus bench report {output}", to=err)
