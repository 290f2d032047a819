"""`orthrus bench` from the command line, end to end on a tiny model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from orthrus.bench.tables import Grid
from orthrus.cli import main, measuring
from orthrus.data.records import read_records

Bench = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Bench:
    """Run `orthrus bench …` in this process; returns exit code, output and errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["bench", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_run_then_report(bench: Bench, model_folder: Path, prompt_file: Path, tmp_path: Path) -> None:
    """Prompts from a file and the generator, two modes, two plans; the report has all of them."""
    output = tmp_path / "out" / "results.jsonl"
    arguments = ["--suite", "tiny_bench", "--data", prompt_file.parent, "--suite", "synthetic:json@heldout"]
    arguments += ["--modes", "ar,orthrus", "--plans", "full", "--plans", "fixed:4", "--dtype", "float32"]
    arguments += ["--limit", 2, "--rounds", 1, "--max-new-tokens", 4, "--output", output]
    code, _, errors = bench("run", model_folder, *arguments)
    assert code == 0, errors
    assert "4 prompts to answer" in errors
    assert "12/12" in errors
    assert len(read_records(output)) == 13
    code, _, errors = bench("run", model_folder, *arguments)
    assert code == 0
    assert "0 prompts to answer" in errors
    assert "4 done before" in errors
    code, out, _ = bench("report", output, "--json", "--plots", tmp_path / "plots")
    summaries = json.loads(out)["summaries"]
    assert code == 0
    assert {(s["suite"], s["mode"], s["plan"]) for s in summaries} >= {
        ("tiny_bench", "ar", None),
        ("synthetic:json@heldout", "orthrus", "full"),
        ("all", "orthrus", "fixed:4"),
    }
    assert all(s["identical"] == 1.0 for s in summaries)
    assert len(list((tmp_path / "plots").iterdir())) == 2
    assert "| suite | domain | decoder |" in bench("report", output, "--markdown")[1]
    assert "Drafts and texts" in bench("report", output)[1]


def test_compiled_passes_are_another_configuration(
    bench: Bench, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--compile` reaches the model, and its lines are not taken for eager ones."""
    asked: list[bool] = []
    monkeypatch.setattr("orthrus.checkpoints.load.compile_passes", lambda model: asked.append(True))
    output = tmp_path / "results.jsonl"
    arguments = ["--suite", "synthetic:json@heldout", "--limit", 1, "--rounds", 1, "--max-new-tokens", 2]
    for more, compiled in (([], []), (["--compile"], [True])):
        assert bench("run", model_folder, *arguments, *more, "--output", output)[0] == 0
        assert asked == compiled
    heads = [record for record in read_records(output) if record["kind"] == "provenance"]
    assert [head["settings"].get("compile") for head in heads] == [None, True]


def test_passes_then_report(bench: Bench, model_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "passes.jsonl"
    arguments = ["--width", "1,4", "--stops", "1,all", "--context", "8,16", "--repeats", 1, "--output", output]
    code, _, errors = bench("passes", model_folder, *arguments)
    assert code == 0, errors
    records = read_records(output)
    assert [record["kind"] for record in records] == ["provenance"] + ["pass"] * 10
    assert [record["stops"] for record in records if record.get("pass") == "fused"] == [1, 4] * 2
    assert "Cost of passes" in bench("report", output)[1]
    assert "Cost of fused passes" in bench("report", output)[1]


def test_passes_are_added_to_a_file_that_a_killed_run_left(bench: Bench, model_folder: Path, tmp_path: Path) -> None:
    """Nothing is taken up, and help does not say so."""
    output = tmp_path / "passes.jsonl"
    arguments = ["--width", "1", "--context", "8", "--repeats", 1, "--output", output]
    assert bench("passes", model_folder, *arguments)[0] == 0
    output.write_text(output.read_text() + '{"kind": "pa')
    assert bench("passes", model_folder, *arguments)[0] == 0
    assert [record["kind"] for record in read_records(output)] == ["provenance", "pass"] * 2
    for verb, is_taken_up in (("run", True), ("passes", False), ("train", False)):
        words = " ".join(bench(verb, "--help")[1].replace("│", " ").split())
        assert ("taken up where it ended" in words) is is_taken_up
        assert "A file of JSON lines; added to" in words


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--stops", "all,0", "--stops must be whole numbers above 0 or all, found '0'"),
        ("--stops", "1,every", "found 'every'"),
        ("--batch", "1,1_6,x", "--batch must be whole numbers above 0, found '1_6'"),
        ("--batch", "+4", "found '+4'"),
        ("--width", "4.5", "found '4.5'"),
        ("--context", "1e400", "found '1e400'"),
    ],
)
def test_of_several_numbers_the_one_that_is_none_is_named(
    bench: Bench, model_folder: Path, tmp_path: Path, option: str, value: str, said: str
) -> None:
    code, _, errors = bench("passes", model_folder, option, value, "--output", tmp_path / "passes.jsonl")
    assert code == 2
    assert said in " ".join(errors.split())


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        (["bench", "quality"], ["beside float32, which always runs", "[default: bfloat16]"]),
        (["audit"], ["[default: float32, bfloat16]", "[default: distribution, token]", "[default: auto]"]),
    ],
)
def test_help_states_defaults(verb: list[str], said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([*verb, "--help"])
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert [text for text in said if text not in words] == []


def test_whole_numbers_may_be_written_as_decimals() -> None:
    assert measuring.numbers(["4.0,8", "16"], "--concurrency", int) == [4, 8, 16]
    assert measuring.numbers([".5,1e-1,2"], "--rate", float) == [0.5, 0.1, 2.0]


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["--suite", "synthetic:poems"], 2, "synthetic:poems"),
        (["--suite", "synthetic:json", "--modes", "vllm"], 2, "vllm"),
        (["--suite", "synthetic:json", "--dtype", "float32,float33"], 2, "float33"),
        (["--suite", "synthetic:json", "--batch", "some"], 2, "some"),
        (["--suite", "synthetic:json", "--rounds", "0"], 2, "rounds"),
        ([], 2, "--suite"),
    ],
)
def test_bad_options_are_named_and_nothing_is_written(
    bench: Bench, model_folder: Path, tmp_path: Path, arguments: list[str], code: int, named: str
) -> None:
    output = tmp_path / "out.jsonl"
    found, _, errors = bench("run", model_folder, *arguments, "--output", output)
    assert found == code
    assert named in errors
    assert not output.exists()


def test_a_report_of_nothing_is_an_error(bench: Bench, tmp_path: Path) -> None:
    assert bench("report", tmp_path / "none.jsonl")[0] == 1
    assert bench("report", tmp_path / "none.jsonl", "--json", "--markdown")[0] == 2


def test_tables_wider_than_the_terminal_have_their_rows_as_columns(capsys: pytest.CaptureFixture[str]) -> None:
    """No cell is cut: not of two rows that fit side by side, nor of those that take a table each."""
    for length, tables in ((10, 1), (60, 2)):
        rows = [
            {"suite": f"set {row}", **{f"figure\n{n}": f"{row}{n}" * (length // 2) for n in range(9)}} for row in "ab"
        ]
        measuring.show([Grid.of("Wide", rows, labels=1)])
        printed = capsys.readouterr().out
        assert printed.count("Wide") == printed.count("figure 8") == tables
        assert "…" not in printed
        assert all(cell in printed for row in rows for cell in row.values())


def test_tables_without_rows_are_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    grids = [Grid.of("None", [], labels=1), Grid.of("One", [{"a": "b"}], labels=1)]
    measuring.show(grids, markdown=True)
    assert capsys.readouterr().out == "**One**\n\n| a |\n| :-- |\n| b |\n\n"
    measuring.show(grids)
    assert "None" not in capsys.readouterr().out
