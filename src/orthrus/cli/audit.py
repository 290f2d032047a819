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
_DTYPES, _EXACTS, _BATCHES = ["float32", "bfloat16"], ["distribution", "token"], [1, 4]


def audit(
    model: common.ModelArgument = common.DEFAULT,
    backbone: common.Backbone = None,
    suite: measuring.Suites = _SUITES,
    data: measuring.Data = None,
    limit: measuring.Limit = None,
    dtype: measuring.Dtypes = _DTYPES,
    exact: measuring.Exacts = _EXACTS,
    plan: measuring.Plans = measuring.AUTO,
    batch_size: Annotated[list[int], typer.Option(min=1, help="Rows at once; may be repeated.")] = _BATCHES,
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

    Prompts are the generator's four domains, unless --suite names others. Promised are float32, and at any precision
    exact="token". The rest is reported: how many texts are identical, by domain and by how surprising the text is,
    where the others part and how close the choice was there, agreement with Hugging Face's generate, tokens per cycle
    and speed.
    """
    from orthrus.bench.audit import run
    from orthrus.bench.audit.report import read_audit

    measuring.prepare(threads, device)
    job = run.Job(
        model=model,
        suites=tuple(suite),
        folder=data,
        limit=limit,
        dtypes=tuple(measuring.listed(dtype)),
        exacts=tuple(measuring.listed(exact)),
        plans=tuple(measuring.listed(plan)),
        batches=tuple(batch_size),
        max_new_tokens=max_new_tokens,
    )
    with TemporaryDirectory() as folder:
        path = output or Path(folder) / "run.jsonl"
        load = common.loader(model, device=device, backbone=backbone)
        configuration = measuring.carried_out(
            run.run, job, path, load=load, counted="precision", kept=output is not None
        )
        report = read_audit(path, configuration, epsilon=epsilon)
    _show(report, plots, json)
    if not report.contract.holds:
        raise typer.Exit(1)


def _show(report: "AuditReport", plots: Path | None, json: bool) -> None:
    """Print tables or one JSON object on standard output, plots' names and the verdict on standard error."""
    from orthrus.bench.audit.tables import plot, tables, verdict

    if plots is not None:
        measuring.name_files(plot(report, plots))
    if json:
        print_json(report.to_dict())
    else:
        measuring.show(tables(report))
    say(verdict(report.contract), style="green" if report.contract.holds else "bold red", to=err)
