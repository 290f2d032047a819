"""Files of JSON lines survive what happens to files."""

from pathlib import Path

import pytest

from orthrus.data.records import append, read_records, rewrite
from orthrus.errors import DataError


def test_half_a_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    append(path, [{"kind": "whole"}])
    whole = path.read_text()
    path.write_text(whole + whole[: len(whole) // 2])
    assert len(read_records(path)) == 1


def test_half_a_last_line_may_end_within_a_character(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    append(path, [{"domain": "ä"}])
    path.write_bytes(path.read_bytes() + '{"domain": "ä'.encode()[:-1])
    assert len(read_records(path)) == 1


@pytest.mark.parametrize("rest", ["", '{"kind": "resu', '{"kind": "whole", "id": "b"}'])
def test_what_is_added_begins_a_line_of_its_own(tmp_path: Path, rest: str) -> None:
    """Half a line is cut off first; a whole one, which lacks its line break and nothing else, stays."""
    path = tmp_path / "r.jsonl"
    first, last = {"kind": "whole", "id": "a"}, {"kind": "whole", "id": "c"}
    append(path, [first])
    with path.open("a") as file:
        file.write(rest)
    append(path, [last])
    between = [{"kind": "whole", "id": "b"}] if rest.endswith("}") else []
    assert read_records(path) == [first, *between, last]
    assert path.read_text().count("\n") == len(path.read_text().splitlines())


def test_nothing_is_cut_off_a_file_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("what to do\nand when")
    with pytest.raises(DataError, match=r"notes\.txt:1: expected one JSON object a line"):
        append(path, [{"kind": "pass"}])
    path.write_text("what to do")
    with pytest.raises(DataError, match=r"notes\.txt:1: expected one JSON object a line"):
        append(path, [{"kind": "pass"}])
    assert path.read_text() == "what to do"


def test_a_broken_line_before_the_last_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"kind": "other"}\n{"kind": \n{"kind": "other"}\n')
    with pytest.raises(DataError, match=r"r\.jsonl:2"):
        read_records(path)


def test_a_file_that_is_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="readable"):
        read_records(tmp_path / "none.jsonl")


def test_a_file_that_cannot_be_rewritten_stays(tmp_path: Path) -> None:
    """What cannot be said in JSON is found out before anything is replaced."""
    path = tmp_path / "r.jsonl"
    append(path, [{"kind": "whole"}])
    with pytest.raises(TypeError):
        rewrite(path, [{"kind": "other"}, {"kind": {1}}])
    assert read_records(path) == [{"kind": "whole"}]
