"""Load on a server, and what its report says of it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.bench.serve.joining import join
from orthrus.bench.serve.joining import table as joined_table
from orthrus.bench.serve.load import Answered, Setting, Target, run
from orthrus.bench.serve.report import plot, summaries, table
from orthrus.bench.suites import Item
from orthrus.cli import main
from orthrus.data.records import read_records
from orthrus.errors import ConfigError
from tests.serve.conftest import Running, made_small, running

ITEMS = [Item(suite="s", id=str(i), domain="d", messages=({"role": "user", "content": f"say {i}"},)) for i in range(3)]


@pytest.fixture(scope="module")
def server(characters: PreTrainedTokenizerBase) -> Iterator[Running]:
    model: PreTrainedModel = made_small()
    with running(model, characters, rows=4, plan="full") as made:
        yield made


def answered(**changes: object) -> Answered:
    base = {
        "mode": "orthrus", "concurrency": 1, "rate": None, "suite": "s", "id": "a", "sent": 0.0, "first": 0.1,
        "seconds": 1.1, "prompt_tokens": 5, "tokens": 11, "gaps": [0.5, 0.5], "finish_reason": "length",
        "text_hash": "x", "stats": {"forwards": 4, "emitted": 11},
    }  # fmt: skip
    return Answered(**{**base, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("load", [{"concurrency": 3}, {"rate": 500.0}])
def test_every_request_is_answered_and_counted(server: Running, load: dict[str, float]) -> None:
    target = Target(url=server.url, max_tokens=9)
    made = run(target, ITEMS, Setting(mode="orthrus", **load), requests=7)  # type: ignore[arg-type]
    assert [one.id for one in made] == ["0", "1", "2", "0", "1", "2", "0"]
    assert all(one.error is None and one.tokens == 9 and one.stats["emitted"] == 9 for one in made)
    assert all(one.first is not None and 0 < one.first <= one.seconds for one in made)
    plain = run(target, ITEMS, Setting(mode="ar", **load), requests=7)  # type: ignore[arg-type]
    assert [one.text_hash for one in plain] == [one.text_hash for one in made]
    assert all(one.stats["drafted"] == 0 for one in plain)


def test_gaps_of_running_streams_are_timed_while_a_long_prompt_joins(server: Running) -> None:
    """The prompt is about as long as asked for; gaps that overlap with its reading stand apart."""
    target = Target(url=server.url, max_tokens=24)
    made = join(target, ITEMS, Setting(mode="ar", concurrency=2), tokens=60)
    assert made.error is None
    assert 40 <= made.prompt_tokens <= 100
    assert made.during
    assert len(made.during) + len(made.otherwise) >= 23 * 2
    (row,) = joined_table([made], "t").rows
    assert row[:3] == ["2", "ar", str(made.prompt_tokens)]
    refused = join(target, ITEMS, Setting(mode="ar", concurrency=2), tokens=100_000)
    assert refused.error is not None
    assert "sample" in refused.error
    with pytest.raises(ConfigError, match="concurrency"):
        join(target, ITEMS, Setting(mode="ar", rate=1.0), tokens=60)


def test_failures_are_kept_apart(server: Running) -> None:
    (made,) = run(Target(url=server.url, max_tokens=10**6), ITEMS, Setting(mode="server", concurrency=1), requests=1)
    assert made.error is not None
    assert "400" in made.error or "BadRequest" in made.error
    assert made.first is None


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:9"):
        run(Target(url="http://127.0.0.1:9"), ITEMS, Setting(mode="ar", concurrency=1), requests=1)


def test_a_summary_says_what_its_lines_say() -> None:
    lines = [
        answered(), answered(id="b", sent=1.0, error="gone", first=None, tokens=0), answered(id="b", sent=1.1),
        answered(mode="ar", seconds=2.1, stats={"forwards": 11, "emitted": 11}),
        answered(mode="ar", id="b", sent=2.1, seconds=2.1, text_hash="y", stats={}),
    ]  # fmt: skip
    drafted, plain = summaries(lines)
    assert (drafted.requests, drafted.failed, drafted.differ) == (3, 1, 1)
    assert drafted.tokens_per_second == pytest.approx(22 / 2.2)
    assert drafted.first == [0.1] * 3
    assert drafted.per_token == pytest.approx([0.1] * 3)
    assert drafted.gap == [0.5] * 3
    assert drafted.tokens_per_forward == 22 / 8
    assert plain.tokens_per_second == pytest.approx(22 / 4.2)
    assert plain.per_token == pytest.approx([0.2] * 3)
    grid = table([drafted, plain], "t")
    assert [len(row) for row in grid.rows] == [len(grid.header)] * 2
    assert Answered.read([one.to_record() for one in lines], where="f") == lines


def test_the_command_writes_lines_a_table_and_plots(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, results = tmp_path / "p.jsonl", tmp_path / "r.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(2)))
    shared = ["bench", "serve", server.url, "--suite", str(prompts), "--requests", "2", "--warmup", "1"]
    plots = ["--concurrency", "1,2", "--max-new-tokens", "5", "-o", str(results), "--plots", str(tmp_path), "--json"]
    assert main([*shared, *plots]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [(s["mode"], s["concurrency"], s["failed"]) for s in printed["settings"]] == [
        ("orthrus", 1, 0), ("ar", 1, 0), ("orthrus", 2, 0), ("ar", 2, 0),
    ]  # fmt: skip
    assert len(Answered.read(read_records(results), where="r")) == 8
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "serve-first-concurrency.png", "serve-per-token-concurrency.png", "serve-throughput-concurrency.png",
    ]  # fmt: skip
    for bad in (["--concurrency", "0"], ["--concurrency", "1.5"], ["--rate", "x"], ["--modes", "fast"]):
        assert main([*shared, *bad]) != 0


def test_plots_of_an_open_loop_stand_apart(tmp_path: Path) -> None:
    made = summaries([answered(concurrency=None, rate=0.5), answered(concurrency=None, rate=1.0)])
    assert next(path.name for path in plot(made, tmp_path)) == "serve-throughput-rate.png"
