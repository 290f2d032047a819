"""`orthrus convert --push`: what is asked of the Hub, in which order, and what is left when it says no.

The Hub is a stand-in that notes what it is asked; nothing here needs a network.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from orthrus import zoo
from tests.cli.conftest import Ran

Cli = Callable[..., Ran]
REPO = "some-one/a-view"


class Hub:
    """Notes calls in order; `files` are those of a repository that is there already, `faults` what calls raise."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.files: list[str] | None = None
        self.faults: dict[str, Exception] = {}
        self.uploaded: dict[str, Any] = {}
        self.private: bool | None = None

    def __call__(self) -> "Hub":
        return self

    def _note(self, name: str) -> None:
        self.calls.append(name)
        if name in self.faults:
            raise self.faults[name]

    def whoami(self) -> dict[str, str]:
        self._note("whoami")
        return {"name": "some-one"}

    def repo_exists(self, repo_id: str) -> bool:
        self._note("repo_exists")
        assert repo_id == REPO
        return self.files is not None

    def list_repo_files(self, repo_id: str) -> list[str]:
        return self.files or []

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        self._note("create_repo")
        assert exist_ok
        self.private = private
        return f"https://hub.test/{repo_id}"

    def upload_folder(self, **given: Any) -> None:
        self._note("upload_folder")
        self.uploaded = given


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub, as far as `orthrus convert` looks."""
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    return hub


def test_what_was_written_is_uploaded_and_nothing_else(cli: Cli, hub: Hub, model_dir: Path, tmp_path: Path) -> None:
    """The card is loaded by the repository's name; other files of the folder are nobody's business."""
    out = tmp_path / "o"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    ran = cli("convert", model_dir, out, "--format", "official", "--push", REPO, "--private")
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[-1] == f"https://hub.test/{REPO}"
    assert hub.calls == ["whoami", "repo_exists", "create_repo", "upload_folder"]
    assert hub.private is True
    assert (hub.uploaded["repo_id"], hub.uploaded["folder_path"]) == (REPO, out)
    assert set(hub.uploaded["allow_patterns"]) == {file.name for file in out.iterdir()} - {"diary.txt"}
    assert {"README.md", "model.safetensors", "tokenizer.json"} <= set(hub.uploaded["allow_patterns"])
    assert f'orthrus.load("{REPO}")' in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("call", "fault", "told"),
    [
        ("whoami", LocalTokenNotFoundError("log in"), "a token of the Hugging Face Hub is required"),
        ("whoami", OfflineModeIsEnabled("no network"), "must be reachable"),
        ("whoami", HTTPError("connection refused"), "connection refused"),
        ("repo_exists", HFValidationError("not a name"), "not a name"),
    ],
)
def test_without_a_token_a_network_or_a_name_nothing_is_written(
    cli: Cli, hub: Hub, model_dir: Path, tmp_path: Path, call: str, fault: Exception, told: str
) -> None:
    hub.faults = {call: fault}
    ran = cli("convert", model_dir, tmp_path / "o", "--format", "official", "--push", REPO)
    assert (ran.code, ran.out) == (1, "")
    assert told in ran.err
    assert "nothing was written" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_refused_upload_leaves_the_whole_folder(cli: Cli, hub: Hub, model_dir: Path, tmp_path: Path) -> None:
    """And the error says how to go on."""
    hub.faults = {"upload_folder": ConnectionError("gone")}
    out = tmp_path / "o"
    ran = cli("convert", model_dir, out, "--format", "official", "--push", REPO)
    assert ran.code == 1
    assert f"`hf upload {REPO} {out}`" in ran.err
    assert {"README.md", "config.json", "model.safetensors"} <= {file.name for file in out.iterdir()}


def test_another_model_on_the_hub_is_replaced_only_by_force(
    cli: Cli, hub: Hub, model_dir: Path, tmp_path: Path
) -> None:
    """Its weights then go, its other files stay."""
    hub.files = ["orthrus.safetensors", "orthrus_config.json", "old/model.safetensors", "notes.txt"]
    command = ("convert", model_dir, tmp_path / "o", "--format", "official", "--push", REPO)
    ran = cli(*command)
    assert (ran.code, ran.out) == (1, "")
    assert "holds a model already (orthrus.safetensors, orthrus_config.json)" in ran.err
    assert list(tmp_path.iterdir()) == []
    assert cli(*command, "--force").code == 0
    assert hub.uploaded["delete_patterns"] == ["orthrus.safetensors", "orthrus_config.json"]
    assert hub.private is False


def test_an_adapter_that_others_cannot_load_is_not_published(
    cli: Cli, hub: Hub, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory of this machine is no backbone to others; a bundled model is."""
    command = ("convert", model_dir, tmp_path / "o", "--format", "adapter", "--push", REPO)
    ran = cli(*command, "--backbone", model_dir)
    assert (ran.code, ran.out) == (2, "")
    assert "--with-backbone" in ran.err
    assert list(tmp_path.iterdir()) == []
    assert hub.calls == ["whoami", "repo_exists"]
    monkeypatch.setitem(zoo.BUNDLED, "tiny", model_dir)
    assert cli(*command, "--backbone", "tiny").code == 0
    assert hub.calls[-1] == "upload_folder"


def test_private_is_about_push(cli: Cli, tmp_path: Path) -> None:
    ran = cli("convert", "nano", tmp_path / "o", "--format", "official", "--private")
    assert ran.code == 2
    assert "--push" in ran.err
