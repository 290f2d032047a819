"""Files are written whole or not at all, and the error names the file."""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError

from orthrus.data.records import append, read_records, rewrite
from orthrus.errors import ConfigError, WriteError
from orthrus.writing import replacing, writing

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        PermissionError(errno.EACCES, "No space left on device", "elsewhere"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("PytorchStreamWriter failed writing file data: No space left on device"),
    ],
)
def test_a_failed_write_names_the_path(error: Exception) -> None:
    """Whoever writes: Python itself, or a library that speaks its own words."""
    with (
        pytest.raises(WriteError, match=r"^some/file cannot be written \(.*No space left.*\): make room"),
        writing("some/file"),
    ):
        raise error


@pytest.mark.parametrize("error", [ConfigError("x"), RuntimeError("x"), KeyboardInterrupt()])
def test_other_errors_pass(error: BaseException) -> None:
    with pytest.raises(type(error)), writing("some/file"):
        raise error


@pytest.mark.parametrize("folder", [False, True])
def test_what_was_there_stays_until_all_is_written(tmp_path: Path, folder: bool) -> None:
    """A file or a folder; nothing is left beside it, whether it went well or not."""
    path = tmp_path / "new" / "it"

    def write(text: str, fail: bool) -> None:
        with replacing(path) as temporary:
            if folder:
                temporary.mkdir()
            (temporary / "part" if folder else temporary).write_text(text)
            if fail:
                raise FULL

    write("one", fail=False)
    with pytest.raises(WriteError):
        write("two", fail=True)
    assert (path / "part" if folder else path).read_text() == "one"
    write("three", fail=False)
    assert (path / "part" if folder else path).read_text() == "three"
    assert list(path.parent.iterdir()) == [path]


# ---------------------------------------------------------------- a disk that is full


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A disk of a megabyte, mounted anew with other options by a call; skipped where mounting is not allowed."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a file system is not allowed here")

    def with_option(option: str) -> Path:
        subprocess.run(["mount", "-o", f"remount,{option}", str(path)], check=True)
        return path

    yield with_option
    subprocess.run(["umount", str(path)], check=True)


def test_records_are_appended_whole_or_not_at_all(disk: Callable[[str], Path]) -> None:
    """On a full disk a file of records keeps its lines, and one that was not there is not left empty."""
    path = disk("size=64k")
    append(path / "a.jsonl", [{"n": 1}])
    for write in (append, rewrite):
        with pytest.raises(WriteError, match=r"a\.jsonl cannot be written \(No space left on device\)"):
            write(path / "a.jsonl", [{"n": 2, "text": "x" * 100_000}])
    with pytest.raises(WriteError, match=r"b\.jsonl cannot be written"):
        append(path / "b.jsonl", [{"text": "x" * 100_000}])
    assert read_records(path / "a.jsonl") == [{"n": 1}]
    assert list(path.iterdir()) == [path / "a.jsonl"]
    disk("ro")
    with pytest.raises(WriteError, match=r"a\.jsonl cannot be written \(Read-only file system\)"):
        append(path / "a.jsonl", [{"n": 2}])
