"""The command line: `orthrus VERB`. One file per verb; this one joins them and turns errors into exit codes.

0 is done, 1 an error or a check that failed, 2 a command or a value that cannot be honoured, 3 training stopped before
its end, 130 interrupted. Nothing here loads torch before a verb needs it.
"""

from collections.abc import Sequence
from typing import Annotated

import typer

from orthrus import __version__
from orthrus.cli import audit, bench, chat, convert, demo, doctor, generate, prepare, serve, sweep, train
from orthrus.cli.common import err, say
from orthrus.errors import ConfigError, OrthrusError

_MISUSED = 2  # as typer and every shell tool say it
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors made on purpose become one line on standard error."""
    command = typer.main.get_command(application())
    try:
        command.main(args=None if argv is None else list(argv), prog_name="orthrus")
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            say("\ninterrupted", style="dim", to=err)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except (OrthrusError, OSError) as error:
        say("error: ", style="bold red", end="", to=err)
        say(str(error), to=err)
        return _MISUSED if isinstance(error, ConfigError) else 1
    return 0


def application() -> typer.Typer:
    """Put the verbs together."""
    app = typer.Typer(
        name="orthrus",
        help="Lossless parallel token generation with a model's own second view.",
        no_args_is_help=True,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    app.command()(generate.generate)
    app.command()(chat.chat)
    app.command()(demo.demo)
    app.command()(serve.serve)
    app.command()(prepare.prepare)
    app.command()(train.train)
    app.command()(sweep.sweep)
    app.command()(convert.convert)
    app.command()(doctor.doctor)
    app.command()(audit.audit)
    app.add_typer(bench.application(), name="bench")
    return app


def _version(wanted: bool) -> None:
    if wanted:
        say(f"orthrus {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Lossless parallel token generation with a model's own second view."""
