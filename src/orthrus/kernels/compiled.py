"""Operators in C++ (`*.cpp`, `*.h`), compiled where they run, if a compiler is found there.

The first model that could use them starts the compiler in the background, at the lowest priority, and does without.
Models loaded once it is done have them. What no other product stands in for is compiled while its caller waits
(`required`), and so is everything before anything is timed (`prepare`). What was compiled is kept in `orthrus.memory`'s
folder, for a version of torch, a set of instructions and the compiler's options; a process keeps the library that it
loaded first. Without a folder nothing is compiled, and with an empty `CXX` neither. All sources are compiled as one,
since torch's headers take most of the time: each has a namespace of its own.
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
from tempfile import TemporaryDirectory, mkdtemp
from time import time
from typing import Final

import torch
from torch import Tensor

from orthrus import memory
from orthrus.errors import ConfigError, OrthrusError
from orthrus.provenance import digest_of, processor
from orthrus.writing import writing

INSTRUCTIONS: Final = {
    "amx": ("fma", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "amx_tile", "amx_int8", "amx_bf16"),
    "avx512_vnni": ("fma", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    "avx_vnni": ("avx2", "fma", "f16c", "avx_vnni"),
    "avx2": ("avx2", "fma", "f16c"),
}
"""Sets of instructions that there is a form of the operators for, by what Linux calls each; the fastest first."""

_FOLDER: Final = Path(__file__).parent
_SOURCES: Final = sorted(_FOLDER.glob("*.cpp"))
_AGAIN: Final = 86400  # seconds after which a compiler that failed is tried again,
_UNFINISHED: Final = 600  # and one that was ended before it was done
_FAILED: Final = "failed\n"  # the end of a log

_library: list[Path] = []  # of this process: the first one loaded, since no second registers the same operators
_running: list[subprocess.Popen[bytes]] = []  # which outlive this process
_log = logging.getLogger(__name__)


@cache
def instructions() -> str | None:
    """Return the set that operators are compiled for; None for other CPUs than x86, and other systems than Linux.

    It is the fastest that this CPU has, and that is compiled already or known to the compiler.
    """
    here = {*processor().get("flags", "").split()}
    able = [name for name, needed in INSTRUCTIONS.items() if here.issuperset(needed)]
    return next(filter(_is_known, able), next(iter(able), None))


def _is_known(name: str) -> bool:
    """Tell whether a set is compiled for already, or the compiler takes its options: g++ before 11 knows no AMX."""
    with suppress(OSError):  # another user's folder, a CXX that is no command
        if (file := _file(name)) is not None and file.exists():
            return True
        if compiler := _compiler():
            line = [*compiler, *_options(name), "-fsyntax-only", "-x", "c++", os.devnull]
            return subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0
    return False


def linear_int8() -> Callable[..., Tensor] | None:
    """Return the product of rows and weights in 8-bit integers where it is compiled (`_operator`)."""
    return _operator("linear_int8")


def linear_few(*, start: bool = True) -> Callable[..., Tensor] | None:
    """Return the product of one row, or of few by tiles, and weights as they are where it is compiled (`_operator`)."""
    return _operator("linear_few", start=start)


def attention() -> Callable[..., Tensor] | None:
    """Return attention of few query rows where it is compiled (`_operator`)."""
    return _operator("attention")


def between() -> tuple[str, str] | None:
    """Return the names of the norm and the rotation of `between.cpp` where they are compiled and loaded."""
    name = instructions()
    if not _library or _operator("normed") is None:
        return None
    return f"normed_{name}", f"rotated_{name}"


def chosen() -> Callable[..., Tensor] | None:
    """Return what chooses the tokens of the highest scores (`choice.cpp`) where it is compiled and loaded."""
    return loaded(f"chosen_{instructions()}", _library[0]) if _library else None


def compiles() -> bool:
    """Tell whether operators are compiled here, or can be."""
    name = instructions()
    file = None if name is None else _file(name)
    return file is not None and (bool(_library) or file.exists() or bool(_compiler()))


def required(kind: str, *, by: str) -> Callable[..., Tensor]:
    """Return an operator that nothing stands in for, which is compiled now where it is not yet; the caller waits.

    Raises ConfigError: it cannot be compiled here; the message says what `by` requires.
    """
    name, needs = instructions(), f"{by} requires"
    if name is None:
        raise ConfigError(f"{needs} Linux and an x86 CPU with AVX2, found neither: choose another dtype")
    file = _file(name)
    if file is None:
        raise ConfigError(f"{needs} a folder for an operator compiled here: let ORTHRUS_CACHE name one, or unset it")
    found = _operator(kind, start=False)
    if found is None:
        if not _compiler():
            raise ConfigError(f"{needs} a C++ compiler, found none: install g++, or let CXX name one")
        _compile(name, file)
        found = _operator(kind, start=False)
    if found is None:
        raise ConfigError(f"{needs} an operator that could not be compiled or loaded: see {file.with_suffix('.log')}")
    return found


def prepare() -> None:
    """Compile what is not compiled yet, unless that failed not long ago: models then have it from the first on.

    Standard error says where nothing is compiled.
    """
    name = instructions()
    file = None if name is None else _file(name)
    try:
        if name and file and not (_library or file.exists()) and _compiler():
            log = file.with_suffix(".log")
            if failure() is None or time() - log.stat().st_mtime >= _AGAIN:
                _compile(name, file)
            if not file.exists():
                print(f"no operators are compiled: see {log}", file=sys.stderr, flush=True)
    except (OSError, OrthrusError) as error:
        print(f"no operators are compiled: {error}", file=sys.stderr, flush=True)


def _compile(name: str, file: Path) -> None:
    """Compile the operators while the caller waits; raises ConfigError or WriteError for an unfit folder.

    Beside a compiler in the background, or stopped, it leaves no file of the other's changed and none of its own.
    """
    with writing(file.parent):
        _own_folder(file.parent)
        print("compiling the operators once, which takes some 10 seconds", file=sys.stderr, flush=True)
        with TemporaryDirectory(dir=file.parent, ignore_cleanup_errors=True) as own:
            log = Path(own, "log")
            with log.open("w", encoding="utf-8") as told:
                line = ["sh", "-c", command(name, file, Path(mkdtemp(dir=own)))]
                subprocess.run(line, stdin=subprocess.DEVNULL, stdout=told, stderr=told, check=False, umask=0o022)
            log.replace(file.with_suffix(".log"))
    loaded.cache_clear()


def _operator(kind: str, *, start: bool = True) -> Callable[..., Tensor] | None:
    """Return an operator where it is compiled; else None, and the compiler is started (`start`) where there is one."""
    name = instructions()
    try:
        file = None if name is None else _file(name)
        if name is None or file is None:
            return None
        if _library:
            return loaded(f"{kind}_{name}", _library[0])
        if file.exists():
            return _first_loaded(f"{kind}_{name}", file)
        if start and _compiler():
            _start(name, file)
    except (OSError, ConfigError) as error:  # another user's folder
        _log.info("no operators are compiled: %s", error)
    return None


def _first_loaded(name: str, file: Path) -> Callable[..., Tensor] | None:
    """Return an operator of a library that this process keeps; one that does not load is removed."""
    if not (_is_ours(file) and _is_ours(file.parent)):
        _log.info("%s is not loaded: others than this user may write to it or to its folder", file)
        return None
    operator = loaded(name, file)
    if operator is not None:
        _library.append(file)
        return operator
    file.unlink(missing_ok=True)
    with file.with_suffix(".log").open("a", encoding="utf-8") as told:
        told.write(f"the library does not load\n{_FAILED}")
    return None


@cache
def loaded(name: str, file: Path) -> Callable[..., Tensor] | None:
    """Return an operator by its name from a file, or as it is registered already; None if that cannot be loaded."""
    try:
        if not hasattr(torch.ops.orthrus, name):
            torch.ops.load_library(file)  # type: ignore[no-untyped-call]
        operator: Callable[..., Tensor] = getattr(torch.ops.orthrus, name).default
    except (OSError, RuntimeError, AttributeError) as error:
        _log.info("%s cannot be loaded: %s", file, error)
        return None
    return operator


def command(name: str, file: Path, scratch: Path) -> str:
    """Return a command line of the shell that compiles the operators, whole or not at all, and says if it failed.

    It removes `scratch`, a folder on the same disk.
    """
    home = Path(torch.__file__).parent
    object, library = scratch / "operators.o", scratch / "operators.so"
    sources = [each for source in _SOURCES for each in ("-include", source)]
    compiler = [*(_compiler() or ["c++"]), *_options(name)]
    # OpenMP is left out of the link: it has to be torch's own, or there are twice as many threads.
    compile = [*compiler, "-fopenmp", f"-I{home}/include", *sources, "-c", "-x", "c++", os.devnull, "-o", object]
    link = [*compiler, "-shared", object, "-o", library, f"-L{home}/lib", "-ltorch_cpu", "-lc10"]
    steps = [shlex.join(map(str, step)) for step in (compile, link, ["mv", library, file])]
    return f"{' && '.join(steps)} || echo {_FAILED.strip()}; {shlex.join(['rm', '-rf', str(scratch)])}"


def failure() -> Path | None:
    """Return the log of a compiler that failed here; None where none did."""
    name = instructions()
    with suppress(OSError):
        file = None if name is None else _file(name)
        if file is not None and not file.exists() and _has_failed(file.with_suffix(".log")):
            return file.with_suffix(".log")
    return None


def _start(name: str, file: Path) -> None:
    """Start the compiler, unless another process does already, or one failed not long ago."""
    folder, log = file.parent, file.with_suffix(".log")
    _own_folder(folder)
    if log.exists():
        if time() - log.stat().st_mtime < (_AGAIN if _has_failed(log) else _UNFINISHED):
            return
        log.unlink(missing_ok=True)
    with log.open("x", encoding="utf-8") as told:
        line = ["nice", "-n", "19", "sh", "-c", command(name, file, Path(mkdtemp(dir=folder)))]
        _log.info("compiling operators for decoding in the background; log: %s", log)
        _running.append(
            subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=told, stderr=told, start_new_session=True, umask=0o022
            )
        )


def _own_folder(folder: Path) -> None:
    """Make a folder that nobody else may write to, whatever the umask: what is in it is loaded as code.

    Raises:
        ConfigError: it is another user's, or others may write to it and that cannot be changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(PermissionError):
        folder.chmod(folder.stat().st_mode & 0o755)
    if not _is_ours(folder):
        found = folder.stat()
        raise ConfigError(
            f"operators are code, which requires a folder that only this user or root may write to, found {folder} "
            f"of user {found.st_uid} with mode {found.st_mode & 0o777:o}: change its owner and mode, or let "
            f"{memory.FOLDER} name another folder"
        )


def _has_failed(log: Path) -> bool:
    return log.read_bytes().endswith(_FAILED.encode())


def _is_ours(path: Path) -> bool:
    """Tell whether a file or folder belongs to this user or to root, and nobody else may write to it."""
    found = path.stat()
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & 0o022


def _file(name: str) -> Path | None:
    folder = memory.folder()
    if folder is None or not sys.platform.startswith("linux"):
        return None
    made = shlex.join([os.environ.get("CXX", ""), *_options(name)])
    sources = [file.read_text(encoding="utf-8") for file in (*sorted(_FOLDER.glob("*.h")), *_SOURCES)]
    about = digest_of("".join(sources) + torch.__version__ + torch.__config__.show() + made)
    return folder / "compiled" / f"operators-{name}-{about}.so"


def _options(name: str) -> list[str]:
    flags = [f"-m{each.replace('_vnni', 'vnni').replace('_', '-')}" for each in INSTRUCTIONS[name]]
    # Without multiplications and additions in one, which round otherwise than torch's; said last, as others imply it.
    return ["-O3", "-std=c++20", "-fPIC", "-fno-fast-math", "-ffp-contract=off", f"-DNAME={name}", *flags]


def _compiler() -> list[str]:
    """Return the compiler's command, which may hold options; nothing where there is none, or none is wanted."""
    named = os.environ.get("CXX", shutil.which("g++") or shutil.which("c++") or "")
    try:
        return shlex.split(named)
    except ValueError as error:
        _log.info("no operators are compiled: CXX cannot be read (%s)", error)
        return []
