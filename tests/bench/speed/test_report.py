"""Reports put together what belongs together, and say it in tables, JSON and pictures."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from orthrus.bench.lines import Result
from orthrus.bench.speed import plots
from orthrus.bench.speed.plots import plot
from orthrus.bench.speed.report import Report, Summary, read_report, summaries
from orthrus.bench.speed.tables import tables
from orthrus.data.records import append
from orthrus.errors import ConfigError, DataError
from tests.bench.lines_of import result, stats


def _both(id: str, seconds: float, **given: Any) -> list[Result]:
    """Plain decoding in `seconds`, and Orthrus in a quarter of that."""
    fast = {
        "seconds": seconds / 4,
        "stats": stats(cycles=2, accepted=8),
        "proposed_per_position": [2, 2, 2, 2],
        "accepted_at_position": [2, 2, 2, 2],
    }
    return [
        result(id=id, seconds=seconds, **given),
        result(id=id, mode="orthrus", plan="full", **{**fast, **given}),
    ]


RESULTS = [
    *_both("0", 1.0, domain="x"),
    *_both("1", 2.0, domain="y"),
    *_both("0", 3.0, suite="t", domain="x"),
]


def _find(found: list[Summary], suite: str, domain: str, mode: str) -> Summary:
    (one,) = [s for s in found if (s.suite, s.domain, s.contender.mode) == (suite, domain, mode)]
    return one


def test_every_domain_suite_and_the_whole_have_their_figures() -> None:
    found = summaries(RESULTS)
    sections = [(s.suite, s.domain) for s in found if s.contender.mode == "ar"]
    assert sections == [("s", "x"), ("s", "y"), ("s", "all"), ("t", "x"), ("all", "all")]
    assert [s.prompts for s in found if s.contender.mode == "orthrus"] == [1, 1, 2, 1, 3]
    whole = _find(found, "all", "all", "orthrus")
    assert whole.against["ar"].totals.value == 4
    assert whole.tokens_per_second.value == 30 / 1.5
    assert whole.accepted_per_position == [1, 1, 1, 1]
    assert _find(found, "all", "all", "ar").against == {}


def test_settings_are_never_mixed() -> None:
    other = [result(id="0", batch=8, seconds=0.1), result(id="0", dtype="bfloat16", seconds=0.1)]
    found = summaries([*_both("0", 1.0), *other])
    assert {s.setting for s in found} == {("c", "float32", 1), ("c", "float32", 8), ("c", "bfloat16", 1)}
    ratios = [s.against["ar"].totals.value for s in found if "ar" in s.against]
    assert ratios == [4]


def test_baselines_are_whom_one_asks_for_and_token_exact_only_then() -> None:
    token = result(exact="token", seconds=2.0)
    found = summaries([*_both("0", 1.0), result(mode="hf", exact=None, seconds=2.0), token], baselines=["hf"])
    assert {s.contender.label: {b: r.totals.value for b, r in s.against.items()} for s in found} == {
        "ar": {"hf": 2},
        "orthrus full": {"hf": 8},
        "hf": {},
        "ar exact": {"hf": 1},
    }
    (slow,) = [s for s in summaries([result(), token]) if s.contender.exact == "token"]
    assert slow.against["ar"].totals.value == 0.5
    found = summaries([*_both("0", 1.0), token], baselines=["ar@token"])
    assert {s.contender.label: s.against["ar@token"].totals.value for s in found if s.against} == {
        "ar": 2,
        "orthrus full": 8,
    }


def test_a_plan_can_be_a_baseline_and_what_is_no_mode_cannot() -> None:
    (plain,) = [s for s in summaries(_both("0", 1.0), baselines=["orthrus:full"]) if s.contender.mode == "ar"]
    assert plain.against["orthrus:full"].totals.value == 1 / 4
    for name in ("orthrus", "ar:full", "vllm", "hf@token", "ar@", "ar@bits"):
        with pytest.raises(ConfigError, match=name):
            summaries(_both("0", 1.0), baselines=[name])


def test_files_are_read_together_and_a_line_counts_once(tmp_path: Path) -> None:
    one, two = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    append(one, [_provenance(), *(line.to_record() for line in RESULTS[:4])])
    append(two, [line.to_record() for line in RESULTS[2:]])
    report = read_report([one, two, one])
    assert report.summaries == summaries(RESULTS)
    assert report.settings_of("c")["model"] == "tiny"
    assert report.settings_of("unknown") == {}


def test_a_file_without_results_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    append(path, [_provenance()])
    with pytest.raises(DataError, match="at least one result"):
        read_report([path])


def test_a_provenance_line_without_its_fields_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    head = {name: value for name, value in _provenance().items() if name not in ("id", "date")}
    append(path, [head, *(line.to_record() for line in RESULTS)])
    with pytest.raises(DataError, match=r"r\.jsonl: a provenance line must have the fields \['date', 'id'\]"):
        read_report([path])


@pytest.mark.parametrize(
    ("record", "fault"),
    [({"kind": "result"}, "a result line"), ({"kind": "quality"}, "a quality"), ({"kind": "provenance"}, "a prov")],
)
def test_of_several_files_the_one_with_a_bad_line_is_named(record: dict[str, Any], fault: str, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    append(good, [_provenance(), *(line.to_record() for line in RESULTS)])
    append(bad, [record])
    with pytest.raises(DataError, match=f"^{bad}: {fault}"):
        read_report([good, bad])


def test_a_report_is_json_and_has_the_names_of_the_design() -> None:
    record = json.loads(json.dumps(_report().to_dict()))
    orthrus = next(s for s in record["summaries"] if s["mode"] == "orthrus")
    assert orthrus["tokens_per_cycle"]["pooled"] == {"value": 5.0, "low": 5.0, "high": 5.0}
    assert orthrus["tokens_per_forward"]["mean"]["value"] == 2.0
    assert orthrus["identical"] == 1.0
    assert orthrus["against"]["ar"].keys() == {"totals", "median", "least"}


def test_tables_have_a_row_for_every_figure() -> None:
    speed, drafts, positions, passes, runs = tables(_report())
    assert speed.title == "Speed: tiny · float32 · batch 1 · a processor · threads 2 · at most 64 tokens · rounds 3"
    assert [
        "s",
        "y",
        "orthrus full",
        "1",
        "20",
        "4.00 (4.00 to 4.00)",
        "4.00 (4.00 to 4.00)",
        "4.00",
    ] in speed.rows
    assert len(drafts.rows) == len(speed.rows) == 10
    assert [row[2] for row in positions.rows] == ["orthrus full"] * 5
    assert passes.rows == [["tiny", "float32", "1", "64", "8", "–", "3.00", "4.00"]]
    assert runs.rows[0][4] == "orthrus bench run --modes ar\\|orthrus"
    for grid in (speed, drafts, positions, passes, runs):
        assert {len(row) for row in grid.rows} == {len(grid.header)}
        assert grid.to_rich().row_count == len(grid.rows)


def test_passes_of_two_machines_are_told_apart() -> None:
    """Fused passes are compared with the plain, draft and verify passes of their own machine."""
    _, fused, prompts, _ = tables(_timed())
    assert fused.header[:2] == ["device", "model"]
    assert [(row[0], *row[-3:]) for row in fused.rows] == [
        ("fast", "6.00", "6.00", "1.20"),
        ("slow", "60.00", "6.00", "1.20"),
    ]
    costs, *_ = tables(_timed())
    assert costs.rows == [
        ["fast", "tiny", "float32", "1", "64", "1", "1.00", "–", "–"],
        ["fast", "tiny", "float32", "1", "64", "8", "–", "2.00", "3.00"],
        ["slow", "tiny", "float32", "1", "64", "1", "10.00", "–", "–"],
        ["slow", "tiny", "float32", "1", "64", "8", "–", "20.00", "30.00"],
    ]
    assert [(row[0], row[-1]) for row in prompts.rows] == [("fast", "7.0"), ("slow", "70.0")]
    for grid in (costs, fused, prompts):
        assert {len(row) for row in grid.rows} == {len(grid.header)}
        assert grid.labels == 3


def test_a_machine_with_other_threads_or_torch_is_another_one() -> None:
    assert list(_timed(device="fast", threads=1).machines().values()) == ["fast, threads 2", "fast, threads 1"]
    assert list(_timed(device="fast", torch="2.9").machines().values()) == ["fast, torch 2.13.0", "fast, torch 2.9"]
    unknown = dataclasses.replace(_timed(), provenances=_timed().provenances[:1])
    assert len(set(unknown.machines().values())) == 2


def test_runs_of_one_machine_are_one_table_and_the_last_counts() -> None:
    costs, fused, *_ = tables(_timed(device="fast", date="2026-01-02T00:00:00+00:00"))
    assert costs.rows == [
        ["tiny", "float32", "1", "64", "1", "10.00", "–", "–"],
        ["tiny", "float32", "1", "64", "8", "–", "20.00", "30.00"],
    ]
    assert "device" not in costs.header + fused.header


def test_curves_of_two_machines_are_two(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[dict[str, list[tuple[int, float]]]] = []
    monkeypatch.setattr(plots, "curves", lambda axes, curves, **_: drawn.append(curves))
    plot(_timed(), tmp_path)
    (passes,) = drawn
    assert passes["verify, float32, batch 1, context 64, fast"] == [(1, 1.0), (8, 3.0)]
    assert passes["verify, float32, batch 1, context 64, slow"] == [(1, 10.0), (8, 30.0)]
    fused = [len(points) for name, points in passes.items() if name.startswith("fused for 1 stops, ")]
    assert fused == [1, 1]


def test_curves_of_two_models_are_two(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[dict[str, list[tuple[int, float]]]] = []
    monkeypatch.setattr(plots, "curves", lambda axes, curves, **_: drawn.append(curves))
    report = _timed(device="fast")
    report.passes[-2]["model"] = "small"
    plot(report, tmp_path)
    assert [name for name in drawn[0] if name.startswith("fused")] == [
        "fused for 1 stops, float32, batch 1, context 64, tiny",
        "fused for 1 stops, float32, batch 1, context 64, small",
    ]


def test_markdown_rows_have_as_many_cells_as_their_header() -> None:
    text = tables(_report())[0].to_markdown().splitlines()
    assert text[0].startswith("**Speed")
    assert {line.count("|") for line in text[2:]} == {9}
    assert text[3].startswith("| :-- | :-- | :-- | --: |")


def test_plots_are_written_whole(tmp_path: Path) -> None:
    wide = [result(id=str(i), batch=8, seconds=0.5) for i in range(2)]
    written = plot(_report([*RESULTS, *wide]), tmp_path / "plots")
    names = ["ratio-ar-c-float32-batch1.png", "accepted-c-float32-batch1.png", "passes.png"]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(names)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def _report(results: list[Result] = RESULTS) -> Report:
    labels = {"kind": "pass", "model": "tiny", "dtype": "float32", "batch": 1, "context": 64, "width": 8}
    passes = [{**labels, "pass": kind, "seconds": s} for kind, s in (("draft", 0.003), ("verify", 0.004))]
    return Report(provenances=[_provenance()], summaries=summaries(results), passes=passes)


def _timed(results: Sequence[Result] = (), **other: Any) -> Report:
    """Passes of two runs, the second ten times as slow, its machine of another name unless `other` says otherwise."""
    second = {"id": "q", "configuration": "d", "device": "slow", "settings": {"device": "a board"}}
    heads = [_provenance() | {"device": "fast"}, _provenance() | second | other]
    milliseconds = {("ar", 1): 1, ("draft", 8): 2, ("verify", 8): 3, ("fused", 8): 6, ("prompt", 8): 7}
    passes = [
        {
            "kind": "pass",
            "provenance": head["id"],
            "model": "tiny",
            "dtype": "float32",
            "pass": kind,
            "width": width,
            "stops": int(kind == "fused"),
            "batch": 1,
            "context": 64,
            "seconds": taken * slowness / 1000,
        }
        for head, slowness in zip(heads, (1, 10), strict=True)
        for (kind, width), taken in milliseconds.items()
    ]
    return Report(provenances=heads, summaries=summaries(results), passes=passes)


def _provenance() -> dict[str, Any]:
    return {
        "kind": "provenance",
        "id": "p",
        "configuration": "c",
        "settings": {"model": "tiny", "device": "a processor", "threads": 2, "max_new_tokens": 64, "rounds": 3},
        "date": "2026-01-01T00:00:00+00:00",
        "commit": "0123456789abcdef",
        "dirty": False,
        "orthrus": "0.1.0",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "device": "a processor",
        "threads": 2,
        "command": "orthrus bench run --modes ar|orthrus",
    }
