"""Documents from files and from the generator: read as they are, or refused with file and line."""

import gzip
import itertools
import json
from pathlib import Path

import pytest

from orthrus.data.documents import Document, jsonl_documents, synthetic_documents
from orthrus.data.synthetic import problem
from orthrus.errors import DataError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_chats_and_texts_are_read_in_order_gzipped_or_not(tmp_path: Path) -> None:
    records = [{"source": "a", "id": "1", "messages": CHAT}, {"source": "b", "id": "2", "text": "wörd"}]
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n"
    (tmp_path / "x.jsonl").write_text(lines, encoding="utf-8")
    with gzip.open(tmp_path / "x.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    expected = [Document(source="a", messages=tuple(CHAT)), Document(source="b", text="wörd")]
    assert list(jsonl_documents(tmp_path / "x.jsonl")) == expected
    assert list(jsonl_documents(tmp_path / "x.jsonl.gz")) == expected


def test_tools_and_their_calls_are_kept(tmp_path: Path) -> None:
    """They change what a template makes of a chat, so that training reads what decoding will."""
    call, tool = {"id": "1", "function": {"name": "f", "arguments": {}}}, {"name": "f"}
    called = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "1"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": called, "tools": [tool]}))
    [document] = jsonl_documents(tmp_path / "x.jsonl")
    assert document.tools == (tool,)
    assert document.messages == (called[0], {"role": "assistant", "tool_calls": [call]}, called[2])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "one JSON object a line is required"),
        ("[" * 100_000, "one JSON object a line is required"),
        ("[]", "a JSON object is required, found list"),
        ("{}", "found the keys []"),
        ('{"text": ""}', "found the keys ['text']"),
        ('{"messages": []}', "found the keys ['messages']"),
        ('{"messages": [{"role": "user"}]}', "found {'role': 'user'}"),
        ('{"messages": [{"role": "user", "content": 3}]}', "'content': 3}"),
    ],
)
def test_a_broken_record_is_named_by_file_and_line(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        list(jsonl_documents(path))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert words in str(caught.value)


def test_files_that_are_absent_cut_short_or_not_text_are_refused(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "' + bytes(range(97, 123)) * 50 + b'"}\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-12])
    (tmp_path / "damaged.jsonl.gz").write_bytes(whole[:10] + b"\xff" * 50)  # the header alone is whole
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    for name in ("absent.jsonl", "cut.jsonl.gz", "damaged.jsonl.gz", "bytes.jsonl"):
        with pytest.raises(DataError, match=rf"{name}: a readable text file in UTF-8 is required"):
            list(jsonl_documents(tmp_path / name))


def test_long_texts_are_cut_at_blank_lines_and_lose_no_word(tmp_path: Path) -> None:
    paragraphs = ["one " * 10, "two " * 10, "three " * 30, "four"]
    text = "\n\n".join(paragraph.strip() for paragraph in paragraphs)
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"source": "s", "text": text}) + "\n", encoding="utf-8")
    pieces = [document.text for document in jsonl_documents(path, split_characters=100)]
    assert len(pieces) == 3
    assert "\n\n".join(pieces) == text
    assert [document.text for document in jsonl_documents(path)] == [text]


def test_documents_know_their_place(tmp_path: Path) -> None:
    """File and line, pieces of a text too, and the number of a generated problem."""
    path = tmp_path / "x.jsonl"
    text = "one " * 10 + "\n\n" + "two " * 10
    path.write_text("\n" + json.dumps({"text": text}) + "\n" + json.dumps({"messages": CHAT}) + "\n", encoding="utf-8")
    places = [document.origin for document in jsonl_documents(path, split_characters=50)]
    assert places == [f"{path}:2", f"{path}:2", f"{path}:3"]
    assert next(synthetic_documents("maths", split="heldout")).origin == "maths, heldout problem 0"


def test_synthetic_documents_are_the_problems_in_order() -> None:
    for split in ("train", "heldout"):
        documents = list(itertools.islice(synthetic_documents("maths", split=split, seed=3), 5))
        problems = [problem("maths", index, split=split, seed=3) for index in range(5)]
        assert [list(document.messages) for document in documents] == [p.messages for p in problems]
