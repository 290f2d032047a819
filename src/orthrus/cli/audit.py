"""`orthrus audit MODEL`: check that texts equal plain decoding's where that is promised, and measure it elsewhere.

Options and printing only; `orthrus.bench.audit` does the work.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from orthrus.cli import common, measuring
from orthrus.cli.common import err, print_json, say

if TYPE_CHECKING:
    from orthrus.bench.audit.report import AuditReport

_SUITES = [f"synthetic:{domain}" for domain in ("maths", "code", "table", "json")]


def audit(
    model: common.ModelArgument = common.DEFAULT,
    backbone: common.Backbone = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SUITE",
            help="Prompts, as `orthrus bench run` takes them; may be repeated. The generator's four unless given.",
        ),
    ] = None,
    data: measuring.Data = None,
    limit: measuring.Limit = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype",
            metavar="DTYPE,…",
            help="Precisions: float32, bfloat16, float16, int8, int4; float32,bfloat16 unless given.",
        ),
    ] = None,
    exact: Annotated[
        list[str] | None,
        typer.Option("--exact", metavar="EXACT,…", help="Promises: distribution, token; both unless given."),
    ] = None,
    plan: Annotated[
        list[str] | None,
        typer.Option(
            "--plan", "--plans", metavar="PLAN,…", help="Of mode orthrus: auto, full, fixed:K, …; auto unless given."
        ),
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Rows at once, may be repeated; 1 and 4 unless given.")
    ] = None,
    max_new_tokens: common.MaxNewTokens = 128,
    epsilon: Annotated[
        float, typer.Option(min=0, help="Mixtures of experts may part where two logits are this close.")
    ] = 1e-3,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A file of JSON lines; added to, and taken up where it ended."),
    ] = None,
    plots: measuring.Plots = None,
    json: common.Json = False,
    threads: measuring.Threads = None,
    device: common.Device = None,
) -> None:
    """Compare the text of every plan, batch size and precision with plain decoding's; exit code 1 if a promise breaks.

    Promised are float32, and at any precision exact="token". The rest is reported: how many texts are identical, by
    domain and by how surprising the text is, where the others part and how close the choice was there, agreement with
    Hugging Face's generate, tokens per cycle and speed.
    """
    from orthrus.bench.audit import run
    from orthrus.bench.audit.report import read_audit

    measuring.set_threads(threads)
    job = run.Job(
        model=model,
        suites=tuple(suite or _SUITES),
        folder=data,
        limit=limit,
        dtypes=tuple(measuring.listed(dtype, "float32,bfloat16")),
        exacts=tuple(measuring.listed(exact, "distribution,token")),
        plans=tuple(measuring.listed(plan, "auto")),
        batches=tuple(batch_size or (1, 4)),
        max_new_tokens=max_new_tokens,
    )
    with TemporaryDirectory() as folder:
        path = output or Path(folder) / "run.jsonl"
        load = measuring.loader(model, device, backbone=backbone)
        configuration = measuring.carried_out(
            run.run, job, path, load=load, counted="precision", kept=output is not None
        )
        report = read_audit(path, configuration, epsilon=epsilon)
    _show(report, plots, json)
    if not report.contract.holds:
        raise typer.Exit(1)


def _show(report: "AuditReport", plots: Path | None, json: bool) -> None:
    """Print tables or one JSON object on standard output, plots' names and the verdict on standard error."""
    from orthrus.bench.audit.plots import plot
    from orthrus.bench.audit.tables import tables, verdict

    if plots is not None:
        measuring.name_files(plot(report, plots))
    if json:
        print_json(report.to_dict())
    else:
        measuring.show(tables(report))
    say(verdict(report.contract), style="green" if report.contract.holds else "bold red", to=err)
