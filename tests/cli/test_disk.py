"""Full disks, read-only folders, readers that leave: one line, exit code 1, nothing half-written."""

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orthrus.checkpoints import files
from orthrus.cli import main
from tests.cli.conftest import Ran
from tests.test_writing import disk  # noqa: F401  (a fixture)

Cli = Callable[..., Ran]
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_conversion_that_finds_the_disk_full_leaves_nothing(
    cli: Cli,
    model_dir: Path,
    disk: Callable[[str], Path],  # noqa: F811
) -> None:
    for option, reason in (("size=64k", "No space left on device"), ("ro", "Read-only file system")):
        path = disk(option)
        ran = cli("convert", model_dir, path / "o", "--format", "adapter", "--with-backbone")
        assert (ran.code, ran.out) == (1, "")
        assert ran.err.startswith(f"error: {path / 'o'} cannot be written (")
        assert reason in ran.err
        assert ran.err.count("\n") == 1
        assert list(path.iterdir()) == []


def test_a_conversion_that_fails_leaves_what_was_there(
    cli: Cli, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no disk can be mounted, too: every library that writes says so in its own way."""

    def fail(*_: Any, **__: Any) -> None:
        raise FULL

    command = ("convert", model_dir, tmp_path / "o", "--format", "official", "--force")
    assert cli(*command).code == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "o").iterdir()}
    monkeypatch.setattr(files, "save_torch_state_dict", fail)
    expected = (
        f"error: {tmp_path / 'o'} cannot be written (No space left on device): make room, or choose another folder\n"
    )
    assert cli(*command) == Ran(1, "", expected)
    assert {file.name: file.read_bytes() for file in (tmp_path / "o").iterdir()} == before
    assert list(tmp_path.iterdir()) == [tmp_path / "o"]


class Closed(io.StringIO):
    """A standard output that fails when written to, or when flushed."""

    def __init__(self, error: OSError, *, at_last: bool) -> None:
        super().__init__()
        self._error, self._at_last = error, at_last

    def write(self, text: str) -> int:
        if self._at_last:
            return len(text)
        raise self._error

    def flush(self) -> None:
        raise self._error

    def fileno(self) -> int:
        return os.open(os.devnull, os.O_WRONLY)


@pytest.mark.parametrize("at_last", [False, True], ids=["written", "flushed"])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), ""),
        (FULL, "error: standard output cannot be written (No space left on device)\n"),
    ],
)
def test_a_reader_that_leaves_ends_the_command_quietly(
    error: OSError, said: str, at_last: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `| head` does; a full disk under `>` is an error, whenever it shows."""
    monkeypatch.setattr("sys.stdout", Closed(error, at_last=at_last))
    assert main(["--version"]) == 1
    assert capsys.readouterr().err == said


def test_a_cache_that_cannot_be_used_disturbs_nothing(
    cli: Cli, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Someone else's folder, or a file in its place."""
    (tmp_path / "cache").write_text("in the way")
    monkeypatch.setenv("CXX", "")  # or a compiler would start
    monkeypatch.setenv("ORTHRUS_CACHE", str(tmp_path / "cache"))
    command = ("generate", "Hi", "-m", model_dir, "--max-new-tokens", 4, "--plan", "auto")
    expected = cli("generate", "Hi", "-m", model_dir, "--max-new-tokens", 4, "--mode", "ar")
    assert (cli(*command).code, cli(*command).out) == (0, expected.out)
    monkeypatch.setenv("ORTHRUS_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(Path, "read_text", _forbidden(Path.read_text, tmp_path / "other"))
    monkeypatch.setattr(Path, "write_text", _forbidden(Path.write_text, tmp_path / "other"))
    assert (cli(*command).code, cli(*command).out) == (0, expected.out)


def _forbidden(real: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    def method(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.is_relative_to(folder):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **options)

    return method
