"""A hybrid backbone at every command: each does with it what it does with any other."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import orthrus
from orthrus import zoo
from orthrus.cli import doctor, selfcheck
from tests.cli.conftest import Ran, saved

Cli = Callable[..., Ran]


@pytest.fixture(scope="module")
def hybrid_dir(tmp_path_factory: pytest.TempPathFactory, chatml: PreTrainedTokenizerFast) -> Path:
    return saved(tmp_path_factory.mktemp("tiny-hybrid"), "qwen3_5_text", chatml)


def test_texts_are_written_compared_and_streamed(cli: Cli, hybrid_dir: Path) -> None:
    asked = ("generate", "Tell me.", "--model", hybrid_dir, "--dtype", "float32", "--max-new-tokens", 8)
    compared = cli(*asked, "--compare", "--json")
    assert compared.code == 0, compared.err
    assert json.loads(compared.out)["identical"] is True
    model, tokenizer = orthrus.load(hybrid_dir, dtype="float32")
    [whole] = orthrus.generate(model, tokenizer, "Tell me.", max_new_tokens=8)
    streamed = [
        token for chunk in orthrus.stream(model, tokenizer, "Tell me.", max_new_tokens=8) for token in chunk.token_ids
    ]
    assert streamed == whole.token_ids


def test_a_chat_goes_on(cli: Cli, hybrid_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("One\nTwo\n"))
    ran = cli("chat", "-m", hybrid_dir, "--max-new-tokens", 6)
    assert ran.code == 0, ran.err


@pytest.mark.usefixtures("eager")
def test_it_is_timed_audited_and_looked_at(
    cli: Cli, hybrid_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans, both promises, two batch sizes; a doctor's comparison of both modes, and the bytes of a row's states."""
    asked = ("--suite", "synthetic:maths", "--limit", 2, "--max-new-tokens", 4)
    timed = ("--dtype", "float32", "--plans", "full,onepass,auto", "--batch", "1,2", "--rounds", 1)
    ran = cli("bench", "run", hybrid_dir, *asked, *timed, "-o", tmp_path / "bench.jsonl")
    assert ran.code == 0, ran.err
    lines = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    results = [line for line in lines if line["kind"] == "result"]
    assert {(line["plan"], line["batch"]) for line in results} >= {("full", 1), ("onepass", 2), ("auto", 2)}
    assert all(line["identical"] is not False for line in results)
    ran = cli("audit", hybrid_dir, *asked, "--dtype", "float32", "--plan", "full", "--batch-size", 2, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["contract"]["holds"] is True
    monkeypatch.setattr(selfcheck, "_TOKENS", 8)
    monkeypatch.setattr(doctor, "_PROMPTS", 1)
    monkeypatch.setattr(doctor, "_TOKENS", 8)
    monkeypatch.setitem(zoo.BUNDLED, "nano", hybrid_dir)
    facts = json.loads(cli("doctor", "--json").out)
    assert facts["passed"] is True
    assert facts["bundled"]["cache"]["float32"]["state_bytes"] > 0
