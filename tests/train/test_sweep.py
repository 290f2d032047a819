"""Sweeps train what is missing, once, and compare variants seed by seed."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orthrus.cli import main
from orthrus.errors import ConfigError, DataError
from orthrus.train import sweep as sweeps
from orthrus.train.loop import TrainResult
from orthrus.train.sections import Recipe

Trained = list[tuple[str, int]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A sweep of two variants and two seeds over a recipe beside it."""
    recipe = Path(__file__).parents[2] / "recipes" / "nano" / "05-view-start.toml"
    (tmp_path / "base.toml").write_text(f'extends = "{recipe}"\n', encoding="utf-8")
    path = tmp_path / "two.sweep.toml"
    path.write_text(
        f'recipe = "base.toml"\noutput = "{tmp_path}/runs"\nseeds = [3, 5]\n'
        '[variants]\nplain = []\n"K of 8" = ["model.block_size=8", "objective.block_lengths=[8]"]\n',
        encoding="utf-8",
    )
    return path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    """Training that takes no time: it notes whom it trained, and gives figures by block length and seed."""
    seen: Trained = []

    def run(recipe: Recipe) -> TrainResult:
        folder = Path(recipe.run.output)
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text(json.dumps({"event": "start", "step": 0, "provenance": {"seed": 1}}) + "\n")
        seen.append((folder.name, recipe.run.seed))
        assert recipe.kind == "view"
        figures = {"heldout/maths/tokens_per_cycle": recipe.model.block_size / recipe.run.seed}
        return TrainResult(step=7, finished=True, metrics=figures, model=folder)

    monkeypatch.setattr(sweeps, "run", run)
    return seen


def test_every_variant_is_trained_with_every_seed_once(file: Path, trained: Trained, tmp_path: Path) -> None:
    """Seed after seed; a second call finds everything done, and a lost line is trained again."""
    results = tmp_path / "results" / "two.jsonl"
    sweep = sweeps.load_sweep(file)
    lines = list(sweeps.carry_out(sweep, file, results))
    assert trained == [("plain-3", 3), ("K of 8-3", 3), ("plain-5", 5), ("K of 8-5", 5)]
    assert sweeps.read_lines(results) == lines
    assert lines[1]["changes"] == ["model.block_size=8", "objective.block_lengths=[8]"]
    assert not list(sweeps.carry_out(sweep, file, results))
    results.write_text("".join(json.dumps(line) + "\n" for line in lines[:3]), encoding="utf-8")
    (tmp_path / "runs" / "K of 8-5" / "log.jsonl").unlink()
    (tmp_path / "runs" / "K of 8-5").rmdir()
    assert [line["variant"] for line in sweeps.carry_out(sweep, file, results)] == ["K of 8"]


def test_half_a_line_is_trained_again_and_joined_to_none(file: Path, trained: Trained, tmp_path: Path) -> None:
    """What a killed process left at the end is no line; one in the middle is an error that says where."""
    sweep, results = sweeps.load_sweep(file), tmp_path / "lines.jsonl"
    lines = list(sweeps.carry_out(sweep, file, results, only=["plain"]))
    whole = results.read_text(encoding="utf-8")
    results.write_text(whole[:-40], encoding="utf-8")
    assert sweeps.read_lines(results) == lines[:1]
    shutil.rmtree(tmp_path / "runs" / "plain-5")
    assert list(sweeps.carry_out(sweep, file, results, only=["plain"])) == lines[1:]
    assert results.read_text(encoding="utf-8") == whole
    results.write_text(whole[:-1], encoding="utf-8")  # a whole line that lacks its end alone is kept
    assert not list(sweeps.carry_out(sweep, file, results, only=["plain"]))
    assert sweeps.read_lines(results) == lines
    lines += sweeps.carry_out(sweep, file, results)
    assert len(lines) == 4
    assert sweeps.read_lines(results) == lines
    results.write_text("{\n" + whole, encoding="utf-8")
    with pytest.raises(DataError, match=r"lines\.jsonl:1: expected one JSON object a line"):
        sweeps.read_lines(results)


def test_a_line_without_figures_costs_its_variant_nothing(file: Path, trained: Trained, tmp_path: Path) -> None:
    """It is passed over in comparing, and its run, which is finished and gives its figures, gets another line."""
    sweep, results = sweeps.load_sweep(file), tmp_path / "lines.jsonl"
    name = "heldout/maths/tokens_per_cycle"
    lines = list(sweeps.carry_out(sweep, file, results))
    spoilt = [*lines[:3], lines[3] | {"figures": {}}]
    assert sweeps.compare(sweep, spoilt, [name])["K of 8"][name].mean == pytest.approx(8 / 3)
    results.write_text("".join(json.dumps(line) + "\n" for line in spoilt), encoding="utf-8")
    shutil.rmtree(tmp_path / "runs" / "K of 8-5")
    assert list(sweeps.carry_out(sweep, file, results)) == lines[3:]
    table = sweeps.compare(sweep, sweeps.read_lines(results), [name])
    assert table["K of 8"][name].mean == pytest.approx((8 / 3 + 8 / 5) / 2)


def test_a_run_that_can_give_no_figures_keeps_its_one_line(
    file: Path, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe that holds nothing back has none to give: to call again adds no line."""
    sweep, results = sweeps.load_sweep(file), tmp_path / "lines.jsonl"
    lines = list(sweeps.carry_out(sweep, file, results, only=["plain"]))
    bare = [line | {"figures": {}} for line in lines]
    results.write_text("".join(json.dumps(line) + "\n" for line in bare), encoding="utf-8")
    monkeypatch.setattr(sweeps, "run", lambda recipe: TrainResult(step=7, finished=True, metrics={}, model=file))
    assert not list(sweeps.carry_out(sweep, file, results, only=["plain"]))
    assert sweeps.read_lines(results) == bare


def test_variants_can_be_picked(file: Path, trained: Trained, tmp_path: Path) -> None:
    """Only those named are trained, and a name that is none is refused."""
    sweep, results = sweeps.load_sweep(file), tmp_path / "lines.jsonl"
    list(sweeps.carry_out(sweep, file, results, only=["K of 8"]))
    assert trained == [("K of 8-3", 3), ("K of 8-5", 5)]
    with pytest.raises(ConfigError, match="plain, K of 8, found 'K of 9'"):
        list(sweeps.carry_out(sweep, file, results, only=["K of 9"]))


def test_ratios_are_paired_by_seed(file: Path, trained: Trained, tmp_path: Path) -> None:
    """A variant that is half as good with every seed is so without any doubt, however far the seeds lie apart."""
    sweep = sweeps.load_sweep(file)
    lines = list(sweeps.carry_out(sweep, file, tmp_path / "lines.jsonl"))
    name = "heldout/maths/tokens_per_cycle"
    table = sweeps.compare(sweep, lines[::-1], [name])  # the first variant is the base, whichever was trained first
    assert table["plain"][name].interval is None
    halved = table["K of 8"][name]
    assert halved.mean == pytest.approx((8 / 3 + 8 / 5) / 2)
    assert halved.ratio == pytest.approx(0.5)
    assert halved.interval == pytest.approx((0.5, 0.5))


def test_an_interval_is_student_s(tmp_path: Path) -> None:
    """Over logarithms of ratios, against an interval reckoned by hand."""
    lines: list[dict[str, Any]] = [
        {"variant": v, "seed": s, "figures": {"x": math.exp(y)}}
        for v, values in {"base": (0.0, 0.0, 0.0), "other": (0.1, 0.2, 0.3)}.items()
        for s, y in enumerate(values)
    ]
    sweep = sweeps.Sweep(recipe="", output="", seeds=[0], variants={"base": [], "other": [], "untried": []})
    table = sweeps.compare(sweep, lines, ["x"])
    assert list(table) == ["base", "other"]
    low, high = table["other"]["x"].interval or (0, 0)
    assert math.log(high) - math.log(low) == pytest.approx(2 * 4.303 * 0.1 / math.sqrt(3))


def test_figures_of_zero_have_no_ratio(tmp_path: Path) -> None:
    """A seed with a zero on either side counts in the mean and not in the ratio."""
    figures = {"base": (2.0, 0.0, 1.0), "other": (3.0, 1.0, 0.0)}
    lines: list[dict[str, Any]] = [
        {"variant": v, "seed": s, "figures": {"x": value}} for v, row in figures.items() for s, value in enumerate(row)
    ]
    sweep = sweeps.Sweep(recipe="", output="", seeds=[0], variants={"base": [], "other": []})
    found = sweeps.compare(sweep, lines, ["x"])["other"]["x"]
    assert (found.mean, found.ratio, found.interval) == (pytest.approx(4 / 3), pytest.approx(1.5), None)


def test_a_sweep_that_was_stopped_says_so(
    file: Path, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 3, as `orthrus train` has it; what is done has its line, and a report of it is no failure."""
    results, train = tmp_path / "lines.jsonl", sweeps.run

    def stopped(recipe: Recipe) -> TrainResult:
        result = train(recipe)
        return replace(result, finished=len(trained) < 2, model=None)

    monkeypatch.setattr(sweeps, "run", stopped)
    assert main(["sweep", str(file), "--output", str(results)]) == 3
    said = capsys.readouterr()
    assert "plain 3: 0.0 minutes" in said.out
    assert said.err == f"{results}: stopped with 3 runs left; the same command goes on from there\n"
    assert len(sweeps.read_lines(results)) == 1
    assert main(["sweep", str(file), "--output", str(results), "--report"]) == 0


def test_the_command_trains_then_reports(
    file: Path, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs first, then a table; a report alone trains nothing, and as JSON it is one object without what is unknown."""
    results = tmp_path / "lines.jsonl"
    assert main(["sweep", str(file), "--output", str(results), "--variant", "K of 8"]) == 0
    assert "K of 8 5: 0.0 minutes" in capsys.readouterr().out
    assert main(["sweep", str(file), "--output", str(results), "--report", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["K of 8"].values()
    assert row == {"mean": pytest.approx((8 / 3 + 8 / 5) / 2), "ratio": None, "interval": None}
    assert len(trained) == 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace("seeds = [3, 5]", "seeds = []"),
        lambda text: text.replace("model.block_size=8", "model.block_sise=8"),
        lambda text: text + "[",
        lambda text: text.replace("base.toml", "none.toml"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(
    spoil: Callable[[str], str], file: Path, trained: Trained, tmp_path: Path
) -> None:
    """A fault in the last variant costs no run of the first."""
    file.write_text(spoil(file.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ConfigError):
        list(sweeps.carry_out(sweeps.load_sweep(file), file, tmp_path / "lines.jsonl"))
    assert not trained
