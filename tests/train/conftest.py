"""A tokenizer and a backbone for the tests of training."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.train.tiny import saved_backbone, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A small tokenizer with the chat template."""
    return tiny_tokenizer()


@pytest.fixture
def backbone(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny Qwen3 backbone with its tokenizer."""
    return saved_backbone(tmp_path / "backbone", tokenizer, "qwen3")
