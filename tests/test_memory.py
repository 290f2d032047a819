"""Files that outlive a process: whole or not at all, about just what was asked for, and never an error."""

import json
from pathlib import Path

import pytest
import torch

from orthrus import memory

ABOUT = {"weights": "0123", "threads": 2}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORTHRUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_is_kept_is_recalled_about_the_same_and_about_nothing_else(folder: Path) -> None:
    memory.keep("kind", ABOUT, [1, None, "x"])
    assert memory.recall("kind", {"threads": 2, "weights": "0123"}) == [1, None, "x"]
    assert memory.recall("other", ABOUT) is None
    assert memory.recall("kind", {**ABOUT, "threads": 1}) is None
    memory.keep("kind", ABOUT, 2)
    assert memory.recall("kind", ABOUT) == 2
    assert [file.suffix for file in (folder / "kind").iterdir()] == [".json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "1", '{"about": {}}', '{"about": {"weights": "0"}, "record": 1}'])
def test_a_file_that_is_no_good_is_as_good_as_none(folder: Path, text: str) -> None:
    memory.keep("kind", ABOUT, 1)
    (file,) = (folder / "kind").iterdir()
    file.write_text(text)
    assert memory.recall("kind", ABOUT) is None
    memory.keep("kind", ABOUT, 1)
    assert memory.recall("kind", ABOUT) == 1


def test_a_folder_that_cannot_be_had_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file stands where the folder would be; or none is wanted."""
    (tmp_path / "taken").write_text("mine")
    for named in (str(tmp_path / "taken"), ""):
        monkeypatch.setenv("ORTHRUS_CACHE", named)
        memory.keep("kind", ABOUT, 1)
        assert memory.recall("kind", ABOUT) is None
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("taken", "mine")]


def test_a_disk_that_is_full_leaves_what_was_there_and_no_half_a_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.keep("kind", ABOUT, 1)

    def full(path: Path, text: str, encoding: str) -> int:
        path.write_bytes(text.encode()[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    memory.keep("kind", ABOUT, 2)
    assert memory.recall("kind", ABOUT) == 1
    assert [file.suffix for file in (folder / "kind").iterdir()] == [".json"]


def test_the_folder_is_where_caches_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORTHRUS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert memory.folder() == tmp_path / ".cache" / "orthrus"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert memory.folder() == tmp_path / "caches" / "orthrus"


def test_a_user_without_a_home_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container under a number that nobody knows."""

    def unknown(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ORTHRUS_CACHE")
    monkeypatch.setattr(Path, "expanduser", unknown)
    assert memory.folder() is None
    assert memory.recall("kind", ABOUT) is None


def test_a_machine_is_told_by_all_that_chooses_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As JSON values, the same when asked again, others with other threads, precision or settings of a library."""
    cpu = torch.device("cpu")
    before = memory.machine(cpu)
    assert json.loads(json.dumps(before)) == before == memory.machine(cpu)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    changed = [memory.machine(cpu)]
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    changed.append(memory.machine(cpu))
    monkeypatch.undo()
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # torch's own summary of precisions raises now
    try:
        changed.append(memory.machine(cpu))
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
    with torch.autocast("cpu", torch.bfloat16):
        changed.append(memory.machine(cpu))
    assert all(after != before for after in changed)
    assert memory.machine(cpu) == before
