"""`orthrus bench serve`: load a server as its users would, and say how long they wait."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orthrus.cli import common, measuring
from orthrus.cli.common import print_json
from orthrus.errors import ConfigError
from orthrus.progress import Progress

if TYPE_CHECKING:
    from orthrus.bench.serve.load import Setting

Url = Annotated[str, typer.Argument(help="The server's address, http://host:port.", show_default=False)]
Concurrency = Annotated[
    list[str], typer.Option(metavar="N,…", help="Closed loop: requests in flight; 1,2,4,8 unless --rate is given.")
]
Rate = Annotated[list[str], typer.Option(metavar="X,…", help="Open loop: requests a second, at random times.")]
_MODES = ["orthrus,ar"]
Modes = Annotated[
    list[str],
    typer.Option("--modes", metavar="MODE,…", help="orthrus, ar (plainly); or server, for servers without modes."),
]


def serve(
    url: Url,
    suite: measuring.Suites,
    concurrency: Concurrency = measuring.NONE,
    rate: Rate = measuring.NONE,
    modes: Modes = _MODES,
    requests: Annotated[int, typer.Option(min=1, help="Requests of each setting.")] = 64,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before each setting that do not count.")] = 4,
    join: Annotated[
        int | None,
        typer.Option(min=1, metavar="TOKENS", help="Then let a prompt of about so many tokens join running streams."),
    ] = None,
    max_new_tokens: common.MaxNewTokens = 128,
    limit: measuring.Limit = None,
    data: measuring.Data = None,
    name: Annotated[str | None, typer.Option("--name", help="The model to ask; the first one unless given.")] = None,
    api_key: Annotated[str, typer.Option(envvar="ORTHRUS_API_KEY", help="The server's API key.")] = "none",
    seed: Annotated[int, typer.Option(help="Of the times in an open loop.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="A file of JSON lines; added to.")
    ] = None,
    plots: measuring.Plots = None,
    markdown: measuring.Markdown = False,
    json: common.Json = False,
) -> None:
    """Load a running server with streams, setting after setting; waiting times are those of the client."""
    try:
        from orthrus.bench.serve import joining, load, report
    except ImportError as error:
        raise ConfigError(f"this needs the package {error.name!r}: pip install 'orthrus-lm[bench]'") from error
    from dataclasses import asdict

    from orthrus.bench import lines
    from orthrus.bench.suites import read_suites
    from orthrus.data.records import append

    settings = _settings(modes, concurrency, rate)
    items = read_suites(suite, folder=data, limit=limit)
    target = load.Target(url=url, key=api_key, model=name, max_tokens=max_new_tokens)
    answered, joined = [], []
    if join is not None and any(setting.concurrency is None for setting in settings):
        raise ConfigError("--join needs --concurrency and no --rate: a number of streams that run meanwhile")
    head = lines.head(dtypes=[])
    if output is not None:
        append(output, [head])
    with Progress("requests", len(settings) * (requests + warmup)) as progress:
        for setting in settings:
            if warmup:
                load.run(target, items, setting, requests=warmup, on_answer=progress.advance)
            made = load.run(target, items, setting, requests=requests, seed=seed, on_answer=progress.advance)
            answered += made
            if output is not None:
                append(output, [{"provenance": head["id"], **one.to_record()} for one in made])
            if join is not None:
                joined.append(joining.join(target, items, setting, tokens=join))
                if output is not None:
                    append(output, [{"provenance": head["id"], **joined[-1].to_record()}])
    summaries = report.summaries(answered)
    measuring.name_files(report.plot(summaries, plots) if plots is not None else ())
    if json:
        facts = {name: value for name, value in head.items() if name not in ("kind", "id")}
        made_json = {"provenance": facts, "settings": [asdict(one) for one in summaries]}
        print_json(made_json | ({"joined": [asdict(one) for one in joined]} if joined else {}))
        return
    said = f"{target.model or url} · {', '.join(suite)} · at most {max_new_tokens} tokens"
    grids = [report.table(summaries, said), *([joining.table(joined, "a prompt that joins")] if joined else [])]
    measuring.show(grids, markdown=markdown)


def _settings(modes: list[str], concurrency: list[str], rate: list[str]) -> "list[Setting]":
    """Return the settings in the order they are measured: of each load every mode."""
    from orthrus.bench.serve.load import MODES, Setting

    names = measuring.listed(modes)
    for name in names:
        if name not in MODES:
            raise ConfigError(f"--modes must be among {', '.join(MODES)}, found {name!r}")
    closed = measuring.numbers(concurrency or ([] if rate else ["1,2,4,8"]), "--concurrency", int)
    loads = [(n, None) for n in closed] + [(None, x) for x in measuring.numbers(rate, "--rate", float)]
    return [Setting(mode=mode, concurrency=n, rate=x) for n, x in loads for mode in names]  # type: ignore[arg-type]
