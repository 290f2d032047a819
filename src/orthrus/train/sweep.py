"""Sweeps: one recipe in several variants, each with several seeds, and one line of figures for every run.

A sweep that is stopped goes on with the runs that have no line yet.
"""

import math
import statistics
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from orthrus.data.records import append, read_records
from orthrus.errors import ConfigError
from orthrus.train.card import computing_minutes
from orthrus.train.config import load_recipe
from orthrus.train.run import run
from orthrus.train.sections import Recipe
from orthrus.train.sources import Section

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t for a two-sided interval of 95 % over so many runs."""


class Sweep(Section):
    """A file of a sweep: the recipe, beside it, that all runs start from; seeds; and what each variant changes.

    Variants are lists of `section.key=value`, as `--set` takes them; the first is what the others are compared with.
    """

    recipe: str
    output: str = Field(description="folder of the runs, VARIANT-SEED each")
    seeds: list[int] = Field(min_length=1, max_length=10)
    variants: dict[str, list[str]] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Run:
    variant: str
    seed: int
    recipe: Recipe


def load_sweep(path: Path) -> Sweep:
    """Read a sweep. Raises ConfigError where the file cannot be read or does not fit."""
    try:
        return Sweep.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, tomllib.TOMLDecodeError, ValidationError) as error:
        raise ConfigError(f"{path}: a sweep (recipe, output, seeds, variants) is required, found {error}") from None


def runs_of(sweep: Sweep, path: Path, overrides: Sequence[str] = ()) -> Iterator[Run]:
    """Yield the runs of a sweep, seed after seed, so that early results compare all variants.

    `overrides` hold for every run. Raises ConfigError where a variant does not fit the recipe.
    """
    for seed in sweep.seeds:
        for name, changes in sweep.variants.items():
            settings = [f"run.seed={seed}", f"run.output={sweep.output}/{name}-{seed}"]
            yield Run(name, seed, load_recipe(path.parent / sweep.recipe, [*changes, *overrides, *settings]))


def carry_out(
    sweep: Sweep, path: Path, results: Path, overrides: Sequence[str] = (), *, only: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Train every run that has no line with figures in `results` yet, and yield its line once it is written there.

    Raises:
        ConfigError: `only` names no variant, or a variant does not fit the recipe.
        DataError: `results` is broken.
    """
    for name in only:
        if name not in sweep.variants:
            raise ConfigError(f"{path}: variants are {', '.join(sweep.variants)}, found {name!r}")
    # All of them are checked before the first is trained.
    wanted = [one for one in runs_of(sweep, path, overrides) if not only or one.variant in only]
    # A line without figures, as older versions wrote for runs found finished, is made up for from the run's log.
    lines = read_lines(results)
    had = {(line["variant"], line["seed"]) for line in lines}
    done = {(line["variant"], line["seed"]) for line in lines if line["figures"]}
    for one in wanted:
        which = (one.variant, one.seed)
        if which in done:
            continue
        ended = run(one.recipe)
        if not ended.finished:
            return
        if which in had and not ended.metrics:
            continue  # it has none to give
        log = read_records(Path(one.recipe.run.output) / "log.jsonl")
        line = {
            "kind": "run",
            "variant": one.variant,
            "seed": one.seed,
            "changes": sweep.variants[one.variant],
            "steps": ended.step,
            "minutes": round(computing_minutes(log), 2),
            "figures": ended.metrics,
            "provenance": log[0]["provenance"],
        }
        append(results, [line])
        yield line


def missing(sweep: Sweep, lines: Sequence[Mapping[str, Any]], *, only: Sequence[str] = ()) -> list[tuple[str, int]]:
    """Return variant and seed of the runs that have no line yet, of the variants that `only` picks, or of all."""
    done = {(line["variant"], line["seed"]) for line in lines}
    runs = [(variant, seed) for seed in sweep.seeds for variant in sweep.variants if not only or variant in only]
    return [run for run in runs if run not in done]


def read_lines(results: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of results, none where there is no file; raises DataError for a broken one."""
    return read_records(results) if results.exists() else []


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a variant: its mean over seeds, and its ratio to the base's with a 95 % interval.

    The ratio is paired by seed (a geometric mean) where both figures are above zero. The interval needs two of them.
    """

    mean: float
    ratio: float | None
    interval: tuple[float, float] | None


def compare(sweep: Sweep, lines: Sequence[Mapping[str, Any]], figures: Sequence[str]) -> dict[str, dict[str, Figure]]:
    """Compare the variants that have figures with the sweep's first: by variant and by the name of a figure."""
    by_variant: dict[str, dict[int, Mapping[str, float]]] = {variant: {} for variant in sweep.variants}
    for line in lines:
        if line["variant"] in by_variant and line["figures"]:
            by_variant[line["variant"]][line["seed"]] = line["figures"]
    base = next(iter(by_variant.values()))
    return {
        variant: {name: _figure(runs, base, name) for name in figures if all(name in run for run in runs.values())}
        for variant, runs in by_variant.items()
        if runs
    }


def _figure(runs: Mapping[int, Mapping[str, float]], base: Mapping[int, Mapping[str, float]], name: str) -> Figure:
    values = [run[name] for run in runs.values()]
    pairs = [(run[name], base[seed][name]) for seed, run in runs.items() if name in base.get(seed, {})]
    logs = [math.log(value / other) for value, other in pairs if value > 0 and other > 0]
    if not logs:
        return Figure(statistics.fmean(values), None, None)
    middle = statistics.fmean(logs)
    interval = None
    if runs is not base and len(logs) in T_95:
        half = T_95[len(logs)] * statistics.stdev(logs) / math.sqrt(len(logs))
        interval = (math.exp(middle - half), math.exp(middle + half))
    return Figure(statistics.fmean(values), math.exp(middle), interval)
