"""What a finished run leaves for readers: `RUN.md`, a card, and `curves.png`, both from its log."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orthrus.data.records import read_records
from orthrus.train.sections import BackboneRecipe, Recipe, ViewRecipe
from orthrus.writing import replacing

Line = Mapping[str, Any]

COLUMNS = 2  # panels side by side
NOT_DRAWN = frozenset({"grad_norm", "lr_factor", "step_seconds"})


def write_card(recipe: Recipe, output: Path) -> list[Path]:
    """Write `RUN.md`, and `curves.png` where matplotlib is installed, beside `log.jsonl`; returns the files."""
    lines = read_records(output / "log.jsonl")
    picture = _curves(lines, output / "curves.png")
    card = output / "RUN.md"
    with replacing(card) as temporary:
        temporary.write_text(_card(recipe, lines, picture), encoding="utf-8")
    return [card, *([picture] if picture else [])]


def computing_minutes(lines: Sequence[Line]) -> float:
    """Minutes spent in steps, over all processes of one run and all its resumptions; evaluations left out."""
    seconds, before = 0.0, 0
    for line in lines:
        if line["event"] == "step":
            seconds += (line["step"] - before) * line.get("step_seconds", 0.0)
            before = line["step"]
    return seconds / 60


def _card(recipe: Recipe, lines: Sequence[Line], picture: Path | None) -> str:
    starts = [line for line in lines if line["event"] == "start"]
    starts = [line for line in starts if line["step"] < recipe.schedule.steps] or starts  # later calls do nothing
    about = starts[-1]["provenance"]
    steps = max((line["step"] for line in lines if line["event"] == "step"), default=0)
    tokens = steps * recipe.run.batch_rows * recipe.data.row_tokens
    facts = {
        "Recipe": f"{recipe.kind}, {_what(recipe)}",
        "Steps": f"{steps} of {recipe.schedule.steps}, in {len(starts)} piece{'s' if len(starts) > 1 else ''}",
        "Tokens read": f"{tokens:,} ({recipe.run.batch_rows} rows of {recipe.data.row_tokens} a step)",
        "Time in steps": f"{computing_minutes(lines):.1f} minutes",
        "Hardware": f"{about['device']}, {about['platform']}, {about.get('processes', 1)} process(es) of "
        f"{about['threads']} thread(s), {recipe.run.dtype}",
        "Commit": f"{about['commit']}{' (with changes)' if about['dirty'] else ''}",
        "Versions": f"orthrus {about['orthrus']}, torch {about['torch']}, transformers {about['transformers']}, "
        f"Python {about['python']}",
        "Command": f"`{about['command']}`",
        "Started": about["date"],
    }
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    parts = [f"# {Path(recipe.run.output).name}", "\n".join(["| | |", "|---|---|", *rows])]
    parts += _figures(lines)
    if picture is not None:
        parts.append(f"![Curves of the run]({picture.name})")
    parts.append("## Recipe\n\n```json\n" + recipe.model_dump_json(indent=2) + "\n```")
    return "\n\n".join(parts) + "\n"


def _what(recipe: Recipe) -> str:
    if isinstance(recipe, ViewRecipe):
        return f"blocks of {recipe.model.block_size} for `{recipe.model.backbone}`"
    if isinstance(recipe, BackboneRecipe):
        return f"{recipe.model.num_hidden_layers} layers of {recipe.model.hidden_size}"
    return f"for `{recipe.model.backbone}`"


def _figures(lines: Sequence[Line]) -> list[str]:
    """The last evaluation and the last report, as a table."""
    last: dict[str, float] = {}
    for event in ("step", "evaluation"):
        for line in [line for line in lines if line["event"] == event][-1:]:
            last |= {name: value for name, value in line.items() if isinstance(value, float)}
    rows = [f"| {name} | {value:.4g} |" for name, value in last.items()]
    return ["\n".join(["| Figure at the end | |", "|---|---|", *rows])] if rows else []


def _curves(lines: Sequence[Line], path: Path) -> Path | None:
    """Draw the figures of the log over steps, those of one kind in one panel."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    panels = _panels(lines)
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(4.5 * COLUMNS, 2.8 * max(1, rows)))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.05, right=0.98, bottom=0.3 / max(1, rows), top=0.97, hspace=0.45, wspace=0.2)
    for number, (title, curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, COLUMNS, number)
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 20 else None)
        axes.set_title(title)
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend(fontsize="x-small", ncols=2)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)
    return path


def _panels(lines: Sequence[Line]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Curves by what they measure: `heldout/maths/loss` is the curve `maths` of the panel `held out: loss`."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in lines:
        for key, value in line.items():
            if line["event"] == "start" or key in NOT_DRAWN or not isinstance(value, float):
                continue
            parts = key.split("/")
            panel = key if len(parts) == 1 else f"held out: {parts[2] if len(parts) > 2 else 'loss'}"
            curve = parts[1] if len(parts) > 1 else key
            panels.setdefault(panel, {}).setdefault(curve, []).append((line["step"], value))
    return panels
