"""Files of results survive what happens to files."""

from pathlib import Path

import pytest

from orthrus.bench.lines import Result, take_up
from orthrus.data.records import append, read_records
from orthrus.errors import DataError
from tests.bench.lines_of import result

AR, ORTHRUS = ("ar", None, "distribution"), ("orthrus", "full", "distribution")
BOTH = {1: {AR, ORTHRUS}}


def test_lines_come_back_as_they_went(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "r.jsonl"
    given = [result(id="a\u2028b", domain="ä"), result(id="c", plan="full", mode="orthrus", right=True)]
    append(path, [line.to_record() for line in given])
    assert Result.read(read_records(path), where="r") == given


def test_a_result_line_without_its_fields_is_named() -> None:
    """And only those that are missing; fields with a default may be."""
    record = result().to_record()
    del record["seconds"], record["right"], record["proposed_per_position"]
    with pytest.raises(DataError, match=r"^f: a result line must have the fields \['seconds', 'right'\], found one"):
        Result.read([result().to_record(), record], where="f")


def test_taking_up_keeps_whole_prompts_and_drops_parts(tmp_path: Path) -> None:
    """A prompt that one of two contenders answered is measured again; other runs' lines stay."""
    path = tmp_path / "r.jsonl"
    whole = [result(id="a"), result(id="a", mode="orthrus", plan="full")]
    part = [result(id="b")]
    foreign = [result(id="a", configuration="other")]
    records = [{"kind": "provenance", "id": "p"}] + [line.to_record() for line in [*whole, *part, *foreign]]
    append(path, records)
    with path.open("a") as file:
        file.write('{"kind": "resu')
    done = take_up(path, "c", BOTH)
    assert done == {whole[0].prompt}
    assert Result.read(read_records(path), where="r") == [*whole, *foreign]
    assert read_records(path)[0] == {"kind": "provenance", "id": "p"}
    assert path.read_text().endswith("}\n")


def test_taking_up_leaves_a_file_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("what to do")
    with pytest.raises(DataError, match=r"notes\.txt:1: expected one JSON object a line"):
        take_up(path, "c", BOTH)
    assert path.read_text() == "what to do"


def test_taking_up_leaves_batches_that_are_not_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    append(path, [result(batch=4).to_record()])
    take_up(path, "c", BOTH)
    assert len(read_records(path)) == 1


def test_a_file_that_is_not_there_has_nothing_done(tmp_path: Path) -> None:
    assert take_up(tmp_path / "new.jsonl", "c", BOTH) == set()
