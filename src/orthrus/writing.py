"""Files that are written whole or not at all, and one error that names the file where that fails."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from orthrus.errors import OrthrusError, WriteError

_SPOKEN = ("os error", "No space left", "failed writing")
"""How libraries in Rust and C++ say in words of their own that a write failed."""


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Name the path of what the block cannot write.

    Raises WriteError: a full disk, a folder that may not be written to.
    """
    try:
        yield
    except WriteError as error:  # of a file within: what the caller named is what a reader knows
        raise _cannot(path, error.__cause__ or error) from error
    except OrthrusError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not any(words in str(error) for words in _SPOKEN):
            raise
        raise _cannot(path, error) from error


def _cannot(path: str | Path, error: BaseException) -> WriteError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return WriteError(f"{path} cannot be written ({reason}): make room, or choose another folder")


@contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Give a temporary path beside `path` that takes its place, file or folder, when the block ends without an error.

    Folders are made as needed. Whatever happens, nothing is left under the temporary name.

    Raises WriteError: it cannot be written; what was there stays.
    """
    temporary = temporary or path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        try:
            yield temporary
            if temporary.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            temporary.replace(path)
        finally:
            _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
