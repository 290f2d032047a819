"""Operators in C++ (`linear.cpp`), compiled where they run, if a compiler is found there.

The first model that could use them starts the compiler in the background, at the lowest priority, and does without.
Models loaded once it is done, in this process or another, have them. What was compiled is kept in `orthrus.memory`'s
folder, for a version of torch and a set of instructions. Without a folder nothing is compiled. Knows files; knows no
layer.
"""

import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from time import time
from typing import Any, Final

import torch
from torch import Tensor

from orthrus import memory
from orthrus.provenance import digest_of, processor

INSTRUCTIONS: Final = {
    "avx512_vnni": ("avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    "avx_vnni": ("avx2", "fma", "avx_vnni"),
    "avx2": ("avx2", "fma"),
}
"""Sets of instructions that there is a form of the operators for, by what Linux calls each; the fastest first."""

_SOURCE: Final = Path(__file__).with_name("linear.cpp")
_AGAIN: Final = 86400  # seconds after which a compiler that failed is tried again

_running: list[subprocess.Popen[bytes]] = []  # which outlive this process
_log = logging.getLogger(__name__)


@cache
def instructions() -> str | None:
    """Return which set of instructions this CPU has; None for other CPUs than x86, and other systems than Linux."""
    here = processor().get("flags", "").split()
    return next((name for name, needed in INSTRUCTIONS.items() if {*needed} <= {*here}), None)


def linear_int8() -> Callable[..., Tensor] | None:
    """Return the product of rows and weights in 8-bit integers where it is compiled (`_operator`)."""
    return _operator("linear_int8")


def linear_one() -> Callable[..., Tensor] | None:
    """Return the product of one row and weights as they are where it is compiled (`_operator`)."""
    return _operator("linear_one")


def _operator(kind: str) -> Callable[..., Tensor] | None:
    """Return an operator where it is compiled; else None, and the compiler is started where there is one."""
    name, file = instructions(), _file()
    if name is None or file is None:
        return None
    if file.exists():
        return loaded(f"{kind}_{name}", file)
    log = file.with_suffix(".log")
    if _compiler() is not None and not (log.exists() and time() - log.stat().st_mtime < _AGAIN):
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w", encoding="utf-8") as told:
                line = ["sh", "-c", command(name, file)]
                _running.append(subprocess.Popen(line, stdout=told, stderr=told, start_new_session=True))
    return None


@cache
def loaded(name: str, file: Path) -> Callable[..., Tensor] | None:
    """Return an operator by its name from a file; None if that cannot be loaded."""
    try:
        torch.ops.load_library(file)  # type: ignore[no-untyped-call]
        operator: Callable[..., Tensor] = getattr(torch.ops.orthrus, name).default
    except (OSError, RuntimeError, AttributeError) as error:
        _log.info("%s cannot be loaded: %s", file, error)
        return None
    return operator


def command(name: str, file: Path) -> str:
    """Return a command line of the shell that compiles the operators for a set of instructions, whole or not at all."""
    home = Path(torch.__file__).parent
    flags = [f"-m{each.replace('_vnni', 'vnni')}" for each in INSTRUCTIONS[name]]
    # Without multiplications and additions in one, which round otherwise than torch's.
    options = ["-O3", "-std=c++20", "-fPIC", "-ffp-contract=off", f"-DNAME={name}", *flags]
    object, library = (file.with_suffix(f".{os.getpid()}{suffix}") for suffix in (".o", ".so"))
    compiler: list[Any] = ["nice", "-n", "19", *shlex.split(_compiler() or "c++")]  # CXX may hold options
    # OpenMP is left out of the link: it has to be torch's own, or there are twice as many threads.
    compile = [*compiler, *options, "-fopenmp", f"-I{home}/include", "-c", _SOURCE, "-o", object]
    link = [*compiler, "-shared", object, "-o", library, f"-L{home}/lib", "-ltorch_cpu", "-lc10"]
    steps = [shlex.join(map(str, step)) for step in (compile, link, ["mv", library, file])]
    return f"{' && '.join(steps)}; {shlex.join(map(str, ['rm', '-f', object, library]))}"


def _file() -> Path | None:
    folder = memory.folder()
    if folder is None or not sys.platform.startswith("linux"):
        return None
    about = digest_of(_SOURCE.read_text(encoding="utf-8") + torch.__version__ + torch.__config__.show())
    return folder / "compiled" / f"linear-{instructions()}-{about}.so"


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
