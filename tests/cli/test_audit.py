"""`orthrus audit` from the command line, end to end on a tiny model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orthrus.bench import texts
from orthrus.decode.rows import Row
from tests.cli.conftest import Ran

ASKED = ("--limit", 2, "--max-new-tokens", 4, "--plan", "full", "--batch-size", 1)


@pytest.mark.usefixtures("eager")
def test_an_audit_of_two_precisions(cli: Callable[..., Ran], model_dir: Path, tmp_path: Path) -> None:
    """Two suites, both promises, two batch sizes: one JSON object, plots, and a verdict on standard error.

    Asked again, everything is done before, and the tables say the same.
    """
    output = tmp_path / "out" / "audit.jsonl"
    asked = ["audit", model_dir, "--suite", "synthetic:json", "--suite", "synthetic:maths", *ASKED]
    asked += ["--batch-size", 2, "--output", output]
    ran = cli(*asked, "--json", "--plots", tmp_path / "plots")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    empty = {"holds": True, "experts": False, "ties": [], "broken": []}
    assert {name: report["contract"][name] for name in empty} == empty
    # 4 prompts x 2 modes x 2 batches, for float32 under both promises and bfloat16 under one.
    assert report["contract"]["texts"] == 4 * 2 * 2 * 3
    assert {(s["dtype"], s["exact"], s["batch"]) for s in report["summaries"]} == {
        (dtype, exact, batch)
        for dtype in ("float32", "bfloat16")
        for exact in ("distribution", "token")
        for batch in (1, 2)
    }
    assert all(s["identical_share"] == 1.0 for s in report["summaries"] if s["claimed"])
    assert {r["exact"]: bool(r["conditions"]["finding"]) for r in report["references"]} == {
        "distribution": False,
        "token": True,
    }
    assert len(list((tmp_path / "plots").iterdir())) == 2
    assert 'holds: 48 texts promised to be plain decoding\'s (float32, exact="token") are' in ran.err
    again = cli(*asked)
    assert again.code == 0
    assert "8 done before" in again.err
    assert "Texts equal to plain decoding's" in again.out


@pytest.mark.parametrize("kept", [True, False])
def test_a_stopped_audit_says_that_it_can_go_on_where_its_file_is_kept(
    kept: bool, cli: Callable[..., Ran], model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("orthrus.bench.audit.run.run", stopped)
    ran = cli("audit", model_dir, *ASKED, *(["--output", tmp_path / "audit.jsonl"] if kept else []))
    assert ran.code == (3 if kept else 130)
    assert ("the same command goes on from there" in ran.err) is kept


def test_a_broken_promise_is_an_error_with_the_prompts_named(
    cli: Callable[..., Ran], model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a file of its own, too."""
    real = texts.Writer.answers

    def wrong(self: texts.Writer, prompts: list[list[int]], who: Any, rows: int) -> list[Row]:
        found = real(self, prompts, who, rows)
        if who.mode == "orthrus":
            found[-1].token_ids[0] += 1
        return found

    monkeypatch.setattr(texts.Writer, "answers", wrong)
    asked = ["audit", model_dir, "--suite", "synthetic:json", "--dtype", "float32", "--exact", "distribution", *ASKED]
    ran = cli(*asked)
    assert ran.code == 1
    assert "BROKEN: of 4 texts promised" in ran.err
    assert "Broken: 1 of 1 texts" in ran.out
    ran = cli(*asked, "--json")
    assert ran.code == 1
    (mismatch,) = json.loads(ran.out)["contract"]["broken"]
    assert (mismatch["suite"], mismatch["at"]) == ("synthetic:json@heldout", 0)


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["--dtype", "float33"], 2, "float33"),
        (["--exact", "bitwise"], 2, "bitwise"),
        (["--plan", "wide"], 2, "wide"),
        (["--suite", "synthetic:poems"], 2, "synthetic:poems"),
        (["--batch-size", "0"], 2, "batch-size"),
        (["--epsilon", "-1"], 2, "epsilon"),
    ],
)
def test_bad_options_are_named_and_nothing_is_written(
    cli: Callable[..., Ran], model_dir: Path, tmp_path: Path, arguments: list[str], code: int, named: str
) -> None:
    output = tmp_path / "out.jsonl"
    ran = cli("audit", model_dir, *arguments, "--output", output)
    assert ran.code == code
    assert named in ran.err
    assert not output.exists()
