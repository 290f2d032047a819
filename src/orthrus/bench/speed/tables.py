"""Tables of a report: one shape for the terminal and for markdown."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table

from orthrus.bench import quality
from orthrus.bench.metrics import Estimate, Ratio
from orthrus.bench.speed.report import Machines, Report, Summary
from orthrus.data.records import Record

_NONE = "–"


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A table as text; the first `labels` columns are words, the rest figures."""

    title: str
    header: list[str]
    rows: list[list[str]]
    labels: int

    def to_rich(self) -> Table:
        """Return the table for a terminal."""
        table = Table(title=self.title, title_justify="left")
        for column, name in enumerate(self.header):
            table.add_column(name, justify="left" if column < self.labels else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        """Return the table in GitHub's markdown, its title as bold text before it."""
        rule = [":--" if column < self.labels else "--:" for column in range(len(self.header))]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(r)} |" for r in (self.header, rule, *self.rows))])


def tables(report: Report) -> list[Grid]:
    """Return a report's tables: speed, drafts and positions of each setting; costs of passes, fused ones apart, and of
    training steps; quality of precisions; runs.
    """
    out = []
    for setting in dict.fromkeys(summary.setting for summary in report.summaries):
        part = [summary for summary in report.summaries if summary.setting == setting]
        configuration, dtype, batch = setting
        settings = report.settings_of(configuration)
        facts = [str(settings.get("model", configuration)), dtype, f"batch {batch}"]
        if settings:
            facts += [
                settings["device"],
                f"threads {settings['threads']}",
                f"at most {settings['max_new_tokens']} tokens",
                f"rounds {settings['rounds']}",
            ]
        priced = report.prices or settings.get("prices", [None])[0]
        facts += [f"computed from {priced}"] * (priced is not None)
        title = " · ".join(facts)
        grids = (_speed(title, part), _drafts(title, part), _positions(title, part))
        out += [grid for grid in grids if grid.rows]
    if report.passes:
        machines = report.machines()
        of_passes = [grid(report.passes, machines) for grid in (_passes, _fused, _prompts)]
        out += [grid for grid in of_passes if grid.rows]
    if report.steps:
        out.append(steps(report.steps))
    if report.qualities:
        out.append(_quality(report.qualities))
    if report.provenances:
        out.append(_runs(report.provenances))
    return out


def _speed(title: str, part: Sequence[Summary]) -> Grid:
    bases = list(dict.fromkeys(name for summary in part for name in summary.against))
    header = ["suite", "domain", "decoder", "prompts", "tokens/s"]
    for base in bases:
        header += [f"× {base}", f"median × {base}", f"least × {base}"]
    rows = []
    for summary in part:
        row = [*_who(summary), str(summary.prompts), _number(summary.tokens_per_second.value, 0)]
        for base in bases:
            row += _ratio(summary.against.get(base))
        rows.append(row)
    return Grid(title=f"Speed: {title}", header=header, rows=rows, labels=3)


def _drafts(title: str, part: Sequence[Summary]) -> Grid:
    header = [
        "suite",
        "domain",
        "decoder",
        "tokens per cycle",
        "mean",
        "tokens per forward",
        "mean",
        "identical",
        "right",
    ]
    rows = [
        [
            *_who(summary),
            *map(_estimate, (*summary.tokens_per_cycle, *summary.tokens_per_forward)),
            _percent(summary.identical),
            _percent(summary.right),
        ]
        for summary in part
    ]
    return Grid(title=f"Drafts and texts: {title}", header=header, rows=rows, labels=3)


def _positions(title: str, part: Sequence[Summary]) -> Grid:
    drafted = [summary for summary in part if summary.accepted_per_position]
    longest = max((len(summary.accepted_per_position) for summary in drafted), default=0)
    slots = [slot for slot in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if slot <= longest]
    rows = [
        [
            *_who(summary),
            *(_percent(dict(enumerate(summary.accepted_per_position, start=1)).get(slot)) for slot in slots),
        ]
        for summary in drafted
    ]
    header = ["suite", "domain", "decoder", *map(str, slots)]
    return Grid(title=f"Accepted per position: {title}", header=header, rows=rows, labels=3)


_PASSES = ("ar", "draft", "verify")
_FLOOR = ("matmul", "read")
_WHERE = ("model", "dtype", "batch", "context")


def _passes(passes: Sequence[Record], machines: Machines) -> Grid:
    """Put the passes of one width side by side; where it was measured, what they cannot do without.

    The floor of a cycle is the matrix products of its two passes, and one read of the keys in each. The share of
    bandwidth is that of the bytes a plain step or a verification must read, in its time, of what a copy moves.
    """
    milliseconds: dict[tuple[str, ...], dict[str, float]] = {}
    moved: dict[tuple[str, ...], float] = {}
    for record in passes:
        row_key, kind = (*_where(record, machines), str(record["width"])), record["pass"]
        if kind in (*_PASSES, *_FLOOR):
            milliseconds.setdefault(row_key, {})[kind] = 1000 * record["seconds"]
        if kind in ("ar", "verify", "copy") and record.get("bytes"):
            moved[(*row_key[:-1], "copy") if kind == "copy" else row_key] = record["bytes"] / record["seconds"]
    measured = {kind for times in milliseconds.values() for kind in times}
    kinds = [kind for kind in (*_PASSES, *_FLOOR) if kind in measured or kind in _PASSES]
    copied = any(row_key[-1] == "copy" for row_key in moved)
    rows = []
    for row_key, times in milliseconds.items():
        row = [*row_key, *(_number(times[kind], 2) if kind in times else _NONE for kind in kinds)]
        if "matmul" in kinds:
            read = milliseconds.get((*row_key[:-1], "1"), {}).get("read")
            whole = read is not None and {"draft", "verify", "matmul"} <= times.keys()
            floor = 2 * (times["matmul"] + read) if whole and read is not None else None
            row.append(_NONE if floor is None else _number((times["draft"] + times["verify"]) / floor, 2))
        if copied:
            reached, copy = moved.get(row_key), moved.get((*row_key[:-1], "copy"))
            row.append(_percent(reached / copy if reached and copy else None))
        rows.append(row)
    header = [*_head(machines), "width", *(f"{kind} ms" for kind in kinds)]
    header += ["cycle / floor"] * ("matmul" in kinds) + ["of bandwidth"] * copied
    return Grid(title="Cost of passes", header=header, rows=rows, labels=_labels(machines))


def _prompts(passes: Iterable[Record], machines: Machines) -> Grid:
    """Say how long a prompt takes up to its first token: without a view, plainly, and with the first block drafted."""
    milliseconds: dict[tuple[str, ...], dict[int, float]] = {}
    for record in passes:
        if record["pass"] == "prompt":
            milliseconds.setdefault(_where(record, machines), {})[min(record["width"], 2)] = 1000 * record["seconds"]
    rows = [
        [*row_key, *(_number(times[kind], 1) if kind in times else _NONE for kind in (0, 1, 2))]
        for row_key, times in milliseconds.items()
    ]
    header = [*_head(machines), "backbone alone ms", "plainly ms", "first block drafted ms"]
    return Grid(title="Time to the first token", header=header, rows=rows, labels=_labels(machines))


def _fused(passes: Iterable[Record], machines: Machines) -> Grid:
    """Say what each fused pass costs in plain passes, and beside the draft and the verification it stands for."""
    records = list(passes)
    seconds = {_identity(record, machines): record["seconds"] for record in records}
    rows = []
    for record in records:
        if record["pass"] != "fused":
            continue
        where, (_, width, stops) = _identity(record, machines)
        plain, draft, verify = (
            seconds.get((where, kind)) for kind in (("ar", 1, 0), ("draft", width, 0), ("verify", width, 0))
        )
        fused = record["seconds"]
        rows.append(
            [
                *map(str, (*where, width, stops, width * (1 + stops))),
                _number(1000 * fused, 2),
                _NONE if plain is None else _number(fused / plain, 2),
                _NONE if draft is None or verify is None else _number(fused / (draft + verify), 2),
            ]
        )
    header = [*_head(machines), "verified", "stops", "rows", "ms", "plain passes", "× draft and verify"]
    return Grid(title="Cost of fused passes", header=header, rows=rows, labels=_labels(machines))


def steps(records: Sequence[Record]) -> Grid:
    """Put what training steps took side by side, a recipe in a column."""
    described = [_step(record) for record in records]
    rows = [[name, *(facts[name] for facts in described)] for name in described[0]]
    header = ["", *(record["recipe"] for record in records)]
    return Grid(title="Training steps", header=header, rows=rows, labels=1)


def _quality(summaries: Sequence[quality.Summary]) -> Grid:
    """Put precisions below each other, suite by suite."""
    header = ["suite", "precision", "prompts", "tokens", "perplexity", "÷ float32", "divergence", "agreement", "right"]
    rows = [
        [
            *(one.suite, one.dtype, str(one.prompts), str(one.tokens), f"{one.perplexity:.4f}"),
            f"{one.ratio.value:.4f} ({one.ratio.low:.4f}–{one.ratio.high:.4f})",
            *(f"{one.divergence:.5f}", f"{100 * one.agreement:.2f} %", _percent(one.right)),
        ]
        for one in summaries
    ]
    return Grid(title="Quality: float32's plain answers, read in each precision", header=header, rows=rows, labels=2)


def _step(record: Record) -> dict[str, str]:
    """Say what a training step took; shares of phases are of their sum, which medians make differ from the step's."""
    whole = sum(record["phases"].values())
    return {
        "backbone": record["backbone"],
        "where": f"{record['device']}, {record['dtype']}, {record['threads']} thread(s)",
        "rows": f"{record['batch_rows']} of {record['row_tokens']} in {record['parts']} part(s)",
        "step": f"{record['seconds']:.3g} s, median of {len(record['steps_seconds'])}",
        "tokens/s": _number(record["tokens_per_second"], 0),
        **{f"  {name}": f"{s:.3g} s, {100 * s / whole:.0f} %" for name, s in record["phases"].items()},
        "peak memory": f"{record['memory_bytes'] / 1e9:.2f} GB",
        "operations": f"{record['operations']:.3g}",
        "matrix product": f"{record['operations_per_second']:.3g} operations/s",
        "floor": f"{record['floor_seconds']:.3g} s",
        "floor / step": _percent(record["floor_share"]),
    }


def _identity(record: Record, machines: Machines) -> tuple[tuple[str, ...], tuple[str, int, int]]:
    """Return where a pass was timed, and which one it was: kind, width, stop points."""
    return _where(record, machines), (record["pass"], record["width"], record.get("stops", 0))


def _where(record: Record, machines: Machines) -> tuple[str, ...]:
    """Return what a pass was timed on, as `_head` heads it."""
    device = [machines[record.get("provenance")]] if machines else []
    return (*device, *(str(record[name]) for name in _WHERE))


def _head(machines: Machines) -> list[str]:
    return [*["device"] * bool(machines), *_WHERE]


def _labels(machines: Machines) -> int:
    return 2 + bool(machines)


def _runs(provenances: Iterable[Record]) -> Grid:
    rows = [
        [
            p["date"],
            f"{(p['commit'] or 'none')[:12]}{' and changes' if p['dirty'] else ''}",
            f"orthrus {p['orthrus']}, torch {p['torch']}, transformers {p['transformers']}",
            p["device"],
            p["command"].replace("|", "\\|"),
        ]
        for p in provenances
    ]
    return Grid(title="Runs", header=["date", "commit", "versions", "device", "command"], rows=rows, labels=5)


def _who(summary: Summary) -> list[str]:
    return [summary.suite, summary.domain, summary.label]


def _ratio(ratio: Ratio | None) -> list[str]:
    return [_NONE] * 3 if ratio is None else [_estimate(ratio.totals), _estimate(ratio.median), _number(ratio.least, 2)]


def _estimate(estimate: Estimate | None) -> str:
    if estimate is None:
        return _NONE
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def _percent(share: float | None) -> str:
    return _NONE if share is None else f"{100 * share:.1f} %"


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}"
