"""Prices are read off measured passes, and a run that goes by them counts passes and nothing else."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orthrus.bench.contenders import contenders
from orthrus.bench.lines import Result
from orthrus.bench.speed.prices import Meter, Prices
from orthrus.bench.speed.report import read_report
from orthrus.bench.speed.run import Job, run
from orthrus.bench.speed.tables import tables
from orthrus.checkpoints.load import load
from orthrus.data.records import read_records
from orthrus.decode.passes import Passes
from orthrus.errors import ConfigError, DataError
from orthrus.model.cache import ScratchCache
from tests.decode.drive import configure, dual


def line(kind: str, width: int, seconds: float, **more: Any) -> dict[str, Any]:
    """Return a line of `orthrus bench passes`."""
    given = {"kind": "pass", "dtype": "float32", "stops": 0, "batch": 1, "context": 256}
    return {**given, "pass": kind, "width": width, "seconds": seconds, **more}


PLAIN = [line("ar", 1, 1.0), line("draft", 16, 3.0), line("verify", 16, 2.5), line("verify", 32, 4.5)]
FUSED = [line("fused", 4, 2.0, stops=1), line("fused", 4, 3.0, stops=3)]


def test_prices_lie_on_a_line_between_widths() -> None:
    """A plain step is the narrowest of both kinds; past the widest the line goes on."""
    prices = Prices([*PLAIN, *FUSED, line("draft", 16, 9.0, dtype="bfloat16")], "float32", where="here")

    def seconds(kind: str, positions: int) -> float:
        return prices.seconds(kind, positions, batch=1, context=256)

    assert [seconds("verify", n) for n in (1, 16, 24, 48)] == [1.0, 2.5, 3.5, 6.5]
    assert [seconds("draft", n) for n in (1, 11, 16)] == [1.0, 1 + 2 * 10 / 15, 3.0]
    assert [seconds("fused", n) for n in (8, 12, 16)] == [2.0, 2.5, 3.0]


def test_prices_are_those_of_the_nearest_batch_and_context() -> None:
    wider = [line(r["pass"], r["width"], 10 * r["seconds"], batch=8) for r in PLAIN]
    longer = [line(r["pass"], r["width"], 2 * r["seconds"], context=4096) for r in PLAIN]
    prices = Prices([*PLAIN, *wider, *longer], "float32", where="here")
    places = [(1, 1), (2, 300), (3, 300), (8, 300), (99, 300), (1, 900), (1, 1100)]
    found = [prices.seconds("verify", 1, batch=batch, context=context) for batch, context in places]
    assert found == [1.0, 1.0, 10.0, 10.0, 10.0, 1.0, 2.0]


def test_prices_are_of_one_machine(tmp_path: Path) -> None:
    """Of any number of its runs."""
    said = dict.fromkeys(["command", "commit", "dirty", "orthrus", "torch", "transformers", "date"], "")
    runs = [{"kind": "provenance", "id": str(n), "device": "one", "threads": 2, **said} for n in range(2)]
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, [*runs, *PLAIN])))
    assert Prices.read(tmp_path / "one.jsonl", "float32").seconds("verify", 1, batch=1, context=256) == 1.0
    runs[1]["device"] = "other"
    (tmp_path / "two.jsonl").write_text("\n".join(map(json.dumps, [*runs, *PLAIN])))
    with pytest.raises(DataError, match="one machine are required, found one, 2 threads and other, 2 threads"):
        Prices.read(tmp_path / "two.jsonl", "float32")


def test_what_was_not_measured_is_asked_for() -> None:
    with pytest.raises(DataError, match=r"here, float16: .*'verify' are required, found \[\]: orthrus bench passes"):
        Prices(PLAIN, "float16", where="here")
    with pytest.raises(DataError, match="'draft' are required"):
        Prices([line("verify", 16, 1.0)], "float32", where="here")
    with pytest.raises(DataError, match=r"'fused' are required, found \['draft', 'verify'\]"):
        Prices(PLAIN, "float32", where="here").seconds("fused", 4, batch=1, context=1)
    with pytest.raises(DataError, match="a readable file"):
        Prices.read(Path("nowhere.jsonl"), "float32")
    assert Meter(Prices(PLAIN, "float32", where="here"))() == 0.0


def test_passes_of_compiled_models_have_prices_too() -> None:
    compiled = [{**record, "dtype": "bfloat16 compiled"} for record in PLAIN]
    for dtype in ("bfloat16", None):
        assert Prices(compiled, dtype, where="here").seconds("verify", 16, batch=1, context=1) == 2.5
    with pytest.raises(DataError, match="of one precision are required, found float32 and bfloat16 compiled"):
        Prices([*PLAIN, *compiled], None, where="here")


def test_a_report_computes_seconds_from_counts(job: dict[str, Any], model_folder: Path, tmp_path: Path) -> None:
    """A prompt, one pass for each plain step, and for each cycle two as wide as its drafts, the anchor and the first
    token.
    """
    output, prices = tmp_path / "timed.jsonl", tmp_path / "measured.jsonl"
    prices.write_text("".join(json.dumps(record) + "\n" for record in PLAIN))
    who = contenders(["ar", "orthrus"], ["full"])
    run(Job(**{**job, "prices": None}, contenders=who), output, load=lambda dtype: load(model_folder, dtype=dtype))
    report = read_report([output], prices=prices)
    plain, full = (s for s in report.summaries if s.suite == report.summaries[0].suite and s.domain == "all")
    prices_of = Prices(PLAIN, "float32", where="here")
    for summary in (plain, full):
        expected, emitted = 0.0, 0
        for result in Result.read(read_records(output), where="timed"):
            if (result.mode == "ar") == (summary is plain):
                prompt = prices_of.seconds("verify", result.prompt_tokens, batch=1, context=1)
                stats = result.stats
                width = 2 + stats["drafted"] / max(stats["cycles"], 1)
                wide = stats["forwards"] - 1 - stats["plain_steps"]
                cycles = wide * prices_of.seconds("verify", width, batch=1, context=1)
                expected, emitted = expected + prompt + stats["plain_steps"] + cycles, emitted + stats["emitted"]
        assert summary.tokens_per_second.value == pytest.approx(emitted / expected)
    with pytest.raises(DataError, match="counts must tell the width of passes, found plan 'tree:6'"):
        Prices(PLAIN, None, where="here").completion(replace(result, plan="tree:6"))
    (speed,) = [grid for grid in tables(report) if "Speed" in grid.title]
    assert speed.title.endswith("computed from measured.jsonl")


@pytest.fixture
def job(prompt_file: Path, tmp_path: Path) -> dict[str, Any]:
    """A job over the prompt file, by a list on which all verifications cost 1, drafts 2 and fused passes 2.5."""
    records = [line("verify", 1, 1.0), line("draft", 1, 2.0), line("fused", 1, 2.5)]
    (tmp_path / "prices.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return {
        "model": "tiny",
        "suites": (str(prompt_file),),
        "max_new_tokens": 12,
        "rounds": 2,
        "prices": tmp_path / "prices.jsonl",
    }


def test_a_run_by_prices_counts_passes(job: dict[str, Any], model_folder: Path, tmp_path: Path) -> None:
    """One for each that reads or verifies, two for each that drafts, and a fused one for both; texts are as ever.

    The pass that reads a prompt's end drafts for the first cycle.
    """
    who = contenders(["ar", "orthrus"], ["full", "tree:6", "lookup", "onepass:2", "auto"])
    texts = {}
    for name, more in (("priced", {}), ("timed", {"prices": None})):
        output = tmp_path / f"{name}.jsonl"
        run(Job(**{**job, **more}, contenders=who), output, load=lambda dtype: load(model_folder, dtype=dtype))
        found = Result.read(read_records(output), where=name)
        texts[name] = [(r.id, r.contender, r.token_hash) for r in found]
        if name == "priced":
            for r in found:
                cycles, forwards = r.stats["cycles"], r.stats["forwards"]
                if r.plan in (None, "lookup"):
                    assert r.rounds_seconds == [forwards] * 2
                elif r.plan in ("full", "tree:6"):
                    assert r.rounds_seconds == [1 + 1 + 3 * (cycles - 1)] * 2
                elif r.plan == "onepass:2":
                    assert r.rounds_seconds == [1 + 2.5 * cycles + 2 * (forwards - 1 - cycles)] * 2
            (head,) = [grid for grid in tables(read_report([output])) if "Speed" in grid.title]
            assert head.title.endswith("computed from prices.jsonl")
    assert texts["priced"] == texts["timed"]


@pytest.mark.parametrize("anchor", ["twin", "backbone"])
def test_a_draft_pass_costs_what_was_measured_of_as_many_drafts(anchor: str) -> None:
    """Whoever reads the anchor: `bench passes` makes two drafts fewer than the width that it says."""
    model = configure(dual(num_hidden_layers=1), anchor=anchor)
    points = [line("verify", 1, 1.0), line("draft", 2, 2.0), line("draft", 6, 6.0)]
    cache = ScratchCache(rows=1, capacity=32, device=model.device)
    passes = Passes(model, cache)
    passes.prefill(slice(0, 1), [[5, 6, 7]], chunk=8)
    meter = Meter(Prices(points, None, where="here"))
    priced = meter.engine()["passes"](model, cache, None)
    priced.draft(slice(0, 1), torch.tensor([8]), 3)
    assert meter.now == pytest.approx(5.0)


def test_other_people_s_passes_have_no_price(job: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"modes must be ar and orthrus, found \['hf'\]"):
        Job(**job, contenders=contenders(["ar", "hf"]))


def test_a_price_list_that_lacks_a_precision_stops_a_run_at_its_start(
    job: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    given = Job(**job, dtypes=("float32", "bfloat16"), contenders=contenders(["ar"]))
    with pytest.raises(DataError, match="bfloat16"):
        run(given, tmp_path / "out.jsonl", load=lambda dtype: load(model_folder, dtype=dtype))
    assert not (tmp_path / "out.jsonl").exists()
