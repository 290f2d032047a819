"""What is timed on a first run: operators are compiled before a model is loaded, by every verb with a clock."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orthrus.checkpoints import load
from orthrus.errors import ConfigError
from orthrus.kernels import compiled
from tests.cli.conftest import Ran

SUITE = ("--suite", "synthetic:json", "--limit", 1)


@pytest.mark.parametrize(
    "arguments",
    [
        ("doctor",),
        ("generate", "Hi", "-m", "nano", "--compare"),
        ("demo", "--model", "nano"),
        ("audit", "nano", *SUITE),
        ("bench", "run", "nano", *SUITE, "--dtype", "float32,bfloat16", "-o", "out"),
        ("bench", "passes", "nano", "-o", "out", "--device", "cpu:0"),
        ("bench", "quality", "nano", *SUITE, "-o", "out"),
        ("bench", "peers", "nano", *SUITE, "--peer", "lookup", "-o", "out"),
    ],
    ids=lambda arguments: " ".join(map(str, arguments[:2])),
)
def test_operators_are_compiled_first(
    cli: Callable[..., Ran], arguments: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def loads(*_: object, **__: object) -> None:
        seen.append("loaded")
        raise ConfigError("no model is needed here")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compiled, "prepare", lambda: seen.append("compiled"))
    monkeypatch.setattr(load, "load", loads)
    assert cli(*arguments).code != 0
    assert seen == ["compiled", "loaded"]
