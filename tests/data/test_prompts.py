"""Prompt sets: every source gives the same records, and what is broken is named by file and line."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orthrus.data.prompts import PromptRecord, read_prompts, user_prompt
from orthrus.errors import ConfigError, DataError

GZIPPED = gzip.compress(b"x" * 5000)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def written(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_record_keeps_id_task_reference_and_meta(tmp_path: Path) -> None:
    record = {
        "id": "g/1",
        "task": "gsm8k",
        "prompt": "2 + 2?",
        "reference": {"answer": "4"},
        "meta": {"n": 1},
    }
    file = written(tmp_path / "a.jsonl", record)
    assert read_prompts(file) == [
        PromptRecord(id="g/1", task="gsm8k", turns=((user("2 + 2?"),),), reference={"answer": "4"}, meta={"n": 1})
    ]


def test_gzipped_records_are_the_same_and_blank_lines_do_not_count(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", {"prompt": "á"}, {"prompt": "b"})
    zipped = tmp_path / "a.jsonl.gz"
    zipped.write_bytes(gzip.compress(b"\n" + file.read_bytes()))
    assert [record.turns for record in read_prompts(zipped)] == [record.turns for record in read_prompts(file)]
    assert [record.id for record in read_prompts(zipped)] == ["a/2", "a/3"], "ids number the lines of the file"


def test_a_chat_is_cut_wherever_an_answer_is_left_to_write(tmp_path: Path) -> None:
    """Two messages of the user in a row leave an answer to write; given answers stay where they are."""
    system, answer = {"role": "system", "content": "s"}, {"role": "assistant", "content": "A"}
    file = written(
        tmp_path / "a.jsonl",
        {"messages": [user("1"), user("2")]},
        {"messages": [system, user("1"), answer, user("2"), user("3")]},
        {"messages": [user("1"), answer]},
        {"messages": [user("1"), answer, user("2"), answer], "reference": "given"},
    )
    two, given, one, known = read_prompts(file)
    assert two.turns == ((user("1"),), (user("2"),))
    assert given.turns == ((system, user("1"), answer, user("2")), (user("3"),))
    assert (one.turns, one.reference) == (((user("1"),),), "A"), "what the set answers is its reference"
    assert (known.turns, known.reference) == (((user("1"), answer, user("2")),), "given")


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def test_tools_and_their_calls_are_kept(tmp_path: Path) -> None:
    """A chat that ends with a tool's result is answered there; names, calls and schemas reach the template."""
    called = {"role": "assistant", "tool_calls": [CALL]}
    result = {"role": "tool", "name": "f", "tool_call_id": "1", "content": "42"}
    file = written(
        tmp_path / "a.jsonl",
        {"messages": [user("6 * 7?"), called | {"content": None}, result], "tools": [TOOL]},
        {"messages": [user("6 * 7?"), called, result, user("sure?")], "tools": json.dumps([TOOL])},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "1"}], "name": "Ann"}, called]},
    )
    ends, goes_on, calls = read_prompts(file)
    assert (ends.turns, ends.tools) == (((user("6 * 7?"), called, result),), (TOOL,))
    assert (goes_on.turns, goes_on.tools) == (((user("6 * 7?"), called, result), (user("sure?"),)), (TOOL,))
    assert (calls.turns, calls.reference) == ((({"role": "user", "content": "1", "name": "Ann"},),), None)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    """As Windows' editors write one; in gzipped files and plain text too."""
    record = b"\xef\xbb\xbf" + b'{"prompt": "a"}\n'
    (tmp_path / "a.jsonl").write_bytes(record)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(record))
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfa\n")
    for name in ("a.jsonl", "b.jsonl.gz", "c.txt"):
        assert [one.turns for one in read_prompts(tmp_path / name)] == [((user("a"),),)]


def test_plain_text_is_one_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("first\n\n  second  \n")
    assert read_prompts(file) == [
        user_prompt("first", id="p/1", task="p"),
        user_prompt("second", id="p/3", task="p"),
    ]


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    """The line after the limit is broken, and never seen."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b"}\n{broken\n')
    assert [record.id for record in read_prompts(file, 2)] == ["a/1", "a/2"]
    with pytest.raises(ConfigError, match="limit must be at least 1, found 0"):
        read_prompts(file, 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "one JSON object a line"),
        ("[1]", "a JSON object is required, found list"),
        ("{}", "found none"),
        ('{"text": "x"}', "found text"),
        ('{"prompt": ""}', "prompt must be a text that is not empty"),
        ('{"prompt": 3}', "found 3"),
        ('{"messages": []}', r"found \[\]"),
        ('{"messages": [{"role": "user"}]}', "messages must be"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "must hold a message of the user"),
        ('{"prompt": "a", "tools": {"name": "f"}}', "tools must be a list of JSON schemas"),
        ('{"prompt": "a", "tools": "["}', "tools must be a list of JSON schemas"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "found 'image': only text is read"),
        ("[" * 100_000, "one JSON object a line"),
    ],
)
def test_a_broken_record_is_named_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl:2.*{message}"):
        read_prompts(file)


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"\x1f\x8b not gzip at all", GZIPPED[:-20], GZIPPED[:12] + b"\xff" * 50],
    ids=["not UTF-8", "not gzip", "truncated", "damaged"],
)
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / ("a.txt.gz" if content[:1] == b"\x1f" else "a.txt")
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.txt.* readable text file in UTF-8 is required"):
        read_prompts(file)


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="at least one prompt is required"):
        read_prompts(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="found a directory"):
        read_prompts(tmp_path)
    with pytest.raises(DataError, match="found no such file"):
        read_prompts(tmp_path / "missing.jsonl")


def fake_datasets(rows: list[dict[str, Any]], asked: list[Any]) -> SimpleNamespace:
    def load_dataset(name: str, config: str | None, *, split: str, **more: Any) -> list[dict[str, Any]]:
        asked.append((name, config, split, more["streaming"]))
        return rows

    return SimpleNamespace(load_dataset=load_dataset, get_dataset_split_names=lambda name, config: ["train", "test"])


def test_a_dataset_is_read_by_name_with_the_columns_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    rows = [{"question": "2 + 2?", "answer": "4"}, {"question_id": 7, "turns": ["one", "two"]}]
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(rows, asked))
    assert read_prompts("openai/gsm8k:main") == [
        PromptRecord(id="gsm8k/1", task="gsm8k", turns=((user("2 + 2?"),),), reference="4"),
        PromptRecord(id="7", task="gsm8k", turns=((user("one"),), (user("two"),))),
    ]
    read_prompts("openai/gsm8k@train", 1)
    assert asked == [("openai/gsm8k", "main", "test", True), ("openai/gsm8k", None, "train", True)]


def test_a_dataset_that_cannot_be_had_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("Config name is missing\nlong story")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(get_dataset_split_names=refuse))
    with pytest.raises(DataError, match=r"owner/set: .*RuntimeError: Config name is missing$"):
        read_prompts("owner/set")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="need the package datasets: pip install"):
        read_prompts("owner/set")
