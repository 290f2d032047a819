"""What a card says of its backbone and reads from other cards; whole cards are `tests/cli/test_convert.py`'s."""

from pathlib import Path

import pytest

from orthrus.checkpoints import card


@pytest.mark.parametrize(
    ("name", "there"),
    [("Qwen/Qwen3-0.6B", True), ("runs/model", False), ("runs/nano/model", False), ("nano", False), (None, False)],
)
def test_a_backbone_is_the_hubs_only_if_it_can_be(
    name: str | None, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory of that name here is the backbone instead."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "model").mkdir(parents=True)
    assert card._on_the_hub(name) is there


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlanguage: [en]\nlicense: apache-2.0\n---\n\n# x\n", "apache-2.0"),
        ("---\nlicense:\n---\n", None),
        ("# x\n\nlicense: mit\n", None),
        ("---\nlanguage: en\n---\n\nlicense: mit\n", None),
        ("---", None),
        ("", None),
    ],
)
def test_the_licence_is_that_of_the_head(text: str, licence: str | None) -> None:
    assert card.licence_of(text) == licence
