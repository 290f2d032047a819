"""A tiny local model in a directory, as a user has one, and the command line called in this process."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import orthrus
from orthrus.cli import main
from orthrus.data.documents import synthetic_documents
from orthrus.model import traced
from orthrus.train.tokenizer import train_tokenizer, training_texts
from tests.families import perturb, tiny

VOCABULARY = 300
BLOCK = 8
CONTEXT = 512


@dataclass(frozen=True)
class Ran:
    """What one command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Run `orthrus` with some arguments; wide, so that messages stay on their lines."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERMINAL_WIDTH", "300")

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no pass be recorded, which takes a second each."""
    monkeypatch.setattr(traced, "recorder_for", lambda model: None)


@pytest.fixture(scope="session")
def chatml() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a ChatML template, trained on a few generated problems."""
    texts = training_texts(synthetic_documents("maths"), characters=4000)
    return train_tokenizer(texts, vocab_size=VOCABULARY, max_length=CONTEXT)


@pytest.fixture
def nameless(model_dir: Path, tmp_path: Path) -> Path:
    """An adapter alone that does not say which backbone it belongs to, as `orthrus.save` writes one."""
    home = tmp_path / "nameless"
    home.mkdir()
    for name in ("orthrus.safetensors", "orthrus_config.json"):
        shutil.copy(model_dir / name, home)
    return home


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, chatml: PreTrainedTokenizerFast) -> Path:
    return saved(tmp_path_factory.mktemp("tiny-model"), "qwen3", chatml)


def saved(home: Path, family: str, chatml: PreTrainedTokenizerFast) -> Path:
    """Write a self-contained adapter: a random backbone, a view that often drafts wrongly, and the tokenizer."""
    model = tiny(family, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT)
    model.generation_config.eos_token_id = chatml.eos_token_id
    model.save_pretrained(home)
    config = orthrus.OrthrusConfig(block_size=BLOCK, mask_token_id=chatml.mask_token_id)
    orthrus.attach(model, config, attn_implementation="orthrus")
    perturb(model)
    orthrus.save(model, home)
    chatml.save_pretrained(home)
    return home
