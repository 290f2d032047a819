"""`orthrus serve`: an OpenAI-compatible server over one model, with a page to chat on."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orthrus.cli import common
from orthrus.cli.common import err, say
from orthrus.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from orthrus.serve.service import Service

_LIMITS = "Limits"
Name = Annotated[
    str, typer.Argument(metavar="[MODEL]", help="A bundled model, a directory, or a Hub id.", **common.WHICH)
]
Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every network.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")]
Rows = Annotated[int, typer.Option(min=1, help="Completions in a batch at most.")]
Context = Annotated[
    int | None, typer.Option(help="Tokens of prompt and text at most; the model's, up to 8192 and what memory holds.")
]
ServedName = Annotated[str | None, typer.Option("--name", help="The model's name in requests; MODEL's unless given.")]
ApiKey = Annotated[str | None, typer.Option(envvar="ORTHRUS_API_KEY", help="Key that requests under /v1 must carry.")]
CorsOrigin = Annotated[
    list[str] | None, typer.Option(metavar="URL", help="Let pages of this origin call the server; may be repeated.")
]
Queue = Annotated[int, typer.Option(min=0, rich_help_panel=_LIMITS, help="Completions that may wait; more get 429.")]
Timeout = Annotated[float, typer.Option(min=0, rich_help_panel=_LIMITS, help="Seconds per request; 0 for any.")]
BodyLimit = Annotated[int, typer.Option(min=1024, rich_help_panel=_LIMITS, help="Bytes of a request at most.")]


def serve(
    model: Name = common.DEFAULT,
    backbone: common.Backbone = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    rows: Rows = 8,
    context: Context = None,
    plan: common.Plan = None,
    exact: common.Exact = "distribution",
    dtype: common.Dtype = None,
    device: common.Device = None,
    compile: common.Compile = False,
    offload: common.Offload = None,
    drafter: common.Drafter = None,
    name: ServedName = None,
    api_key: ApiKey = None,
    cors_origin: CorsOrigin = None,
    queue: Queue = 64,
    timeout: Timeout = 600.0,
    body_limit: BodyLimit = 4 << 20,
) -> None:
    """Serve a model to OpenAI clients and to a browser; Ctrl-C or SIGTERM lets running requests finish."""
    try:
        from orthrus.serve import server as http
        from orthrus.serve.app import create_app
        from orthrus.serve.service import Service
    except ImportError as error:
        raise ConfigError(f"serving needs the package {error.name!r}: pip install 'orthrus-lm[serve]'") from error
    from orthrus.decode.api import plan_of

    plan_of("orthrus", plan)
    listening = http.listen(host, port)  # before the model is loaded: a port in use shows at once

    def prepared() -> "tuple[Service, PreTrainedModel]":
        loaded, tokenizer = common.load(
            model, backbone=backbone, dtype=dtype, device=device, compile=compile, offload=offload, drafter=drafter
        )
        common.look_at_kernels(loaded, exact, rows=rows)
        service = Service(
            loaded,
            tokenizer,
            name=name or (Path(model).resolve().name if Path(model).is_dir() else model),
            rows=rows,
            context=context,
            plan=plan,
            exact=exact,
            queue=queue,
            timeout=timeout or None,
        )
        common.record(loaded, exact, rows=rows, plan=plan, plain=False)
        return service, loaded

    # By a thread that ends: OpenMP keeps workers for each thread that has computed, and where they are more than the
    # CPUs, all of them sleep between operations.
    with ThreadPoolExecutor(max_workers=1) as loading:
        service, loaded = loading.submit(prepared).result()
    app = create_app(service, key=api_key, origins=cors_origin or (), body_limit=body_limit)
    service.start()
    gigabytes = rows * service.footprint.row(service.context) / 1e9
    size = f"{rows} rows of {service.context} tokens, {gigabytes:.1f} GB"
    say(f"{service.name} · {common.precision(loaded)} · {loaded.device} · {size}", style="dim", to=err)
    say(f"serving on {http.address(listening)}", to=err)
    try:
        http.run(http.Server(app, service), listening)
    finally:
        service.close()
