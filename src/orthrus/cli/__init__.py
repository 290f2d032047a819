"""The command line: `orthrus VERB`. One file per verb; this one joins them and turns errors into exit codes.

0 is done, 1 an error or a check that failed, 2 a command or a value that cannot be honoured, 3 training stopped before
its end, 130 interrupted. Nothing here loads torch before a verb needs it.
"""

import errno
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
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
    try:
        code = _run(argv)
        sys.stdout.flush()
    except OSError as error:  # of standard output: files are named by those who write them
        if not isinstance(error, BrokenPipeError):  # whoever closes the pipe early, as `head` does, knows
            _print_error(f"standard output cannot be written ({error.strerror})")
        _discard_output()
        return 1
    return code


def _run(argv: Sequence[str] | None) -> int:
    command = typer.main.get_command(application())
    try:
        command.main(args=None if argv is None else list(argv), prog_name="orthrus")
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            say("\ninterrupted", style="dim", to=err)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except OrthrusError as error:
        _print_error(str(error))
        return _MISUSED if isinstance(error, ConfigError) else 1
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EPIPE) and error.filename is None:
            raise
        _print_error(str(error))
        return 1
    return 0


def _print_error(message: str) -> None:
    say("error: ", style="bold red", end="", to=err)
    say(message, to=err)


def _discard_output() -> None:
    """Let what is left of standard output go nowhere, so that the interpreter's last flush does not fail again."""
    nowhere = Path(os.devnull).open("w")  # noqa: SIM115 (open until the process ends)
    with suppress(OSError, ValueError):
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    sys.stdout = nowhere


def application() -> typer.Typer:
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
