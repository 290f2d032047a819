"""A tiny dual-view model on disk with a tokenizer of its own, a prompt set, and a clock that tests own."""

import itertools
import json
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import orthrus
from orthrus.checkpoints.load import load
from orthrus.data.documents import synthetic_documents
from orthrus.train.tokenizer import train_tokenizer, training_texts
from tests.families import perturb, tiny

VOCAB = 300


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random backbone and a view that is right about half of the time, as `orthrus.load` reads them."""
    folder = tmp_path_factory.mktemp("tiny")
    texts = training_texts(synthetic_documents("maths"), characters=20_000)
    tokenizer = train_tokenizer(texts, vocab_size=VOCAB, max_length=512)
    tokenizer.save_pretrained(folder)
    shape = {"vocab_size": VOCAB, "max_position_embeddings": 512, "num_hidden_layers": 1}
    model = tiny("qwen3", **shape)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    orthrus.attach(model, orthrus.OrthrusConfig(block_size=8))
    perturb(model, scale=0.01)
    orthrus.save(model, folder)
    return folder


@pytest.fixture(scope="session")
def loaded(model_folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load(model_folder, dtype="float32", device="cpu")


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    """Five short prompts in two categories."""
    path = tmp_path / "tiny_bench.jsonl"
    kinds = itertools.cycle(("writing", "maths"))
    records = [
        {
            "id": f"t/{i}",
            "task": "tiny",
            "prompt": f"Say {i} to {'me' * i}",
            "meta": {"category": next(kinds)},
        }
        for i in range(5)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


class Ticks:
    """A clock that moves on by one second whenever it is read."""

    def __init__(self) -> None:
        self.reads = 0

    def __call__(self) -> float:
        self.reads += 1
        return float(self.reads)


@pytest.fixture
def ticks() -> Ticks:
    return Ticks()
