"""A tokenizer and a backbone for the tests of training."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from orthrus.train import card
from tests.train.tiny import saved_backbone, tiny_tokenizer


@pytest.fixture(scope="module", autouse=True)
def no_pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let runs end without curves, which take two seconds each, but where they are tested."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ != "tests.train.test_card":
            patch.setattr(card, "_curves", lambda lines, path: None)
        yield


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A small tokenizer with the chat template."""
    return tiny_tokenizer()


@pytest.fixture
def backbone(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny Qwen3 backbone with its tokenizer."""
    return saved_backbone(tmp_path / "backbone", tokenizer, "qwen3")
