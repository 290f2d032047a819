"""Suites come from files, folders and the generator, and judge what can be judged."""

import json
from pathlib import Path

import pytest

from orthrus.bench.suites import judge, read_suite, read_suites
from orthrus.errors import ConfigError, DataError


def test_a_synthetic_suite_is_the_generator_s_problems_and_judges_them() -> None:
    items = read_suite("synthetic:maths@phrasing", limit=3)
    assert [item.id for item in items] == [f"synthetic/maths/phrasing/{i}" for i in range(3)]
    assert {(item.suite, item.domain) for item in items} == {("synthetic:maths@phrasing", "maths")}
    for item in items:
        assert item.problem is not None
        assert item.messages == ({"role": "user", "content": item.problem.prompt},)
        assert judge(item, item.problem.answer) is True
        assert judge(item, "I do not know.") is False


def test_a_synthetic_suite_is_held_out_unless_asked_otherwise() -> None:
    assert read_suite("synthetic:json", limit=2) == read_suite("synthetic:json@heldout", limit=2)
    assert len(read_suite("synthetic:table")) == 100


@pytest.mark.parametrize("name", ["synthetic:poems", "synthetic:maths@secret", "synthetic:"])
def test_unknown_domains_and_splits_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="synthetic"):
        read_suite(name)


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="limit"):
        read_suite("synthetic:maths", limit=0)


def test_files_are_found_by_path_and_by_name_in_a_folder(prompt_file: Path) -> None:
    by_path = read_suite(str(prompt_file))
    assert read_suite("tiny_bench", folder=prompt_file.parent) == by_path
    assert read_suite("tiny_bench.jsonl", folder=prompt_file.parent) == by_path
    assert [(item.suite, item.domain) for item in by_path[:2]] == [
        ("tiny_bench", "writing"),
        ("tiny_bench", "maths"),
    ]
    assert len(read_suite(str(prompt_file), limit=2)) == 2


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        read_suite("nothing_here.jsonl", folder=tmp_path)


def test_only_the_first_turn_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "turns.jsonl"
    messages = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    path.write_text(json.dumps({"id": "x", "messages": messages}))
    assert read_suite(str(path))[0].messages == ({"role": "user", "content": "one"},)


def test_numbers_at_the_end_are_judged_where_the_set_gives_one(tmp_path: Path) -> None:
    path = tmp_path / "gsm8k.jsonl"
    records = [{"prompt": "?", "reference": {"answer": a}} for a in ("1,200", "x + 1")] + [{"prompt": "?"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    number, text, none = read_suite(str(path))
    assert judge(number, "3 times 400 is $1200.") is True
    assert judge(number, "It is 1200, or 1300.") is False
    assert judge(number, "no number") is False
    assert judge(text, "x + 1") is None
    assert judge(none, "7") is None


def test_records_of_the_same_id_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "same.jsonl"
    path.write_text(json.dumps({"id": "x", "prompt": "a"}) + "\n" + json.dumps({"id": "x", "prompt": "b"}))
    assert [item.id for item in read_suite(str(path))] == ["x", "x#2"]


def test_a_count_is_not_given_that_an_id_has_already(tmp_path: Path) -> None:
    path = tmp_path / "same.jsonl"
    path.write_text("".join(json.dumps({"id": id, "prompt": "a"}) + "\n" for id in ("x", "x#2", "x", "x", "x#3")))
    assert [item.id for item in read_suite(str(path))] == ["x", "x#2", "x#3", "x#4", "x#3#2"]


def test_several_suites_are_read_one_after_another(prompt_file: Path) -> None:
    read = read_suites(["synthetic:json", "tiny_bench"], folder=prompt_file.parent, limit=2)
    assert [item.suite for item in read] == ["synthetic:json@heldout"] * 2 + ["tiny_bench"] * 2


def test_suites_of_one_name_with_prompts_of_one_id_are_refused(prompt_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'synthetic:maths' and 'synthetic:maths@heldout' both have"):
        read_suites(["synthetic:maths", "synthetic:maths@heldout"], limit=1)
    other = tmp_path / "other" / prompt_file.name
    other.parent.mkdir()
    other.write_text(json.dumps({"id": "t/3", "prompt": "a"}))
    with pytest.raises(ConfigError, match=f"'{prompt_file}' and '{other}' both have 't/3' of suite 'tiny_bench'"):
        read_suites([str(prompt_file), str(other)])
    other.write_text(json.dumps({"id": "another", "prompt": "a"}))
    assert len(read_suites([str(prompt_file), str(other)])) == 6


def test_a_question_behind_others_is_asked_last() -> None:
    plain, (longer,) = read_suite("synthetic:maths"), read_suite("synthetic:maths+5000", limit=1)
    text, question = longer.messages[0]["content"], plain[0].messages[0]["content"]
    assert (longer.suite, longer.id, longer.problem) == ("synthetic:maths@heldout+5000", plain[0].id, plain[0].problem)
    assert text.startswith(plain[1].messages[0]["content"])
    assert text[5000:] == f"\n\nAnswer this only:\n\n{question}"
    assert len(read_suite("synthetic:maths+5", limit=101)) == 101


def test_system_messages_are_no_questions(tmp_path: Path) -> None:
    """They stay where they are; a suite of one prompt has nothing to put before it."""
    file = tmp_path / "chats.jsonl"
    chats = [
        {"id": name, "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": name * 9}]}
        for name in "ab"
    ]
    file.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    first, _ = read_suite(f"{file}+4")
    assert [message["content"] for message in first.messages] == [
        "Be kind.",
        f"bbbb\n\nAnswer this only:\n\n{'a' * 9}",
    ]
    file.write_text(json.dumps(chats[0]) + "\n")
    with pytest.raises(DataError, match="must have other questions"):
        read_suite(f"{file}+4")
