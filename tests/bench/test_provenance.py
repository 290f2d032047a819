"""Provenance says what a figure came from, and nothing of whom or where."""

import json
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

import orthrus
from orthrus.provenance import device_name, digest, git_state, provenance


def test_it_names_versions_threads_device_command_and_date() -> None:
    now = datetime(2026, 11, 23, 20, 35, tzinfo=UTC)
    record = provenance(dtypes=["float32"], argv=["orthrus", "bench", "a b"], now=now)
    assert record["command"] == "orthrus bench 'a b'"
    assert record["date"] == "2026-11-23T20:35:00+00:00"
    assert record["torch"] == torch.__version__
    assert record["orthrus"] == orthrus.__version__
    assert record["threads"] == torch.get_num_threads()
    assert record["dtypes"] == ["float32"]
    assert record["device"] == device_name(torch.device("cpu")) != ""


def test_it_names_no_host() -> None:
    record = provenance(dtypes=["float32"], argv=["orthrus"])
    name = platform.node()
    assert not name or name not in json.dumps(record)


def test_digests_tell_values_apart_and_keys_in_any_order_alike() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


def test_a_folder_is_dirty_when_it_differs_from_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes beside the folder do not count; a folder that git ignores has no commit."""
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "tester@example.org")
    source, ignored = tmp_path / "src", tmp_path / "ignored"
    for folder in (source, ignored):
        folder.mkdir()
        (folder / "a.py").write_text("1\n")
    (tmp_path / ".gitignore").write_text("ignored/\n")
    assert git_state(source) == (None, None)
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    commit, dirty = git_state(source)
    assert commit is not None
    assert len(commit) == 40
    assert dirty is False
    (tmp_path / "results.jsonl").write_text("{}\n")
    assert git_state(source) == (commit, False)
    (source / "new.py").write_text("2\n")
    assert git_state(source) == (commit, True)
    assert git_state(ignored) == (None, None)
