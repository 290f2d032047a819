"""Tables of a report."""

from collections.abc import Iterable, Sequence

from orthrus.bench import quality
from orthrus.bench.metrics import split
from orthrus.bench.speed.report import Machines, Report, Setting, Summary
from orthrus.bench.tables import Grid, estimate, number, percent
from orthrus.data.records import Record


def tables(report: Report) -> list[Grid]:
    """Return a report's tables, those that have rows."""
    grids = []
    for setting, part in split(report.summaries, lambda summary: summary.setting).items():
        title = _title(report, setting)
        grids += [_speed(title, part), _drafts(title, part), _positions(title, part)]
    grids += [of_passes(report.passes, report.machines()) for of_passes in (_passes, _fused, _prompts)]
    grids += [steps(report.steps), _quality(report.qualities), _runs(report.provenances)]
    return [grid for grid in grids if grid.rows]


def _title(report: Report, setting: Setting) -> str:
    configuration, dtype, batch = setting
    settings = report.settings_of(configuration)
    facts = [str(settings.get("model", configuration)), dtype, f"batch {batch}"]
    if settings:
        facts += [settings["device"], f"threads {settings['threads']}"]
        facts += [f"at most {settings['max_new_tokens']} tokens", f"rounds {settings['rounds']}"]
    priced = report.prices or settings.get("prices", [None])[0]
    return " · ".join([*facts, *([f"computed from {priced}"] if priced else [])])


def _speed(title: str, part: Sequence[Summary]) -> Grid:
    bases = dict.fromkeys(name for summary in part for name in summary.against)
    header = [*_WHO, "prompts", "tokens/s"]
    for base in bases:
        header += [f"× {base}", f"median × {base}", f"least × {base}"]
    rows = []
    for summary in part:
        row = [*_who(summary), str(summary.prompts), number(summary.tokens_per_second.value, 0)]
        for base in bases:
            ratio = summary.against.get(base)
            row += [
                estimate(ratio and ratio.totals),
                estimate(ratio and ratio.median),
                number(ratio and ratio.least, 2),
            ]
        rows.append(row)
    return Grid(title=f"Speed: {title}", header=header, rows=rows, labels=3)


def _drafts(title: str, part: Sequence[Summary]) -> Grid:
    rows = [
        [
            *_who(summary),
            *map(estimate, (*summary.tokens_per_cycle, *summary.tokens_per_forward)),
            *map(percent, (summary.identical, summary.right)),
        ]
        for summary in part
    ]
    header = [*_WHO, "tokens per cycle", "mean", "tokens per forward", "mean", "identical", "right"]
    return Grid(title=f"Drafts and texts: {title}", header=header, rows=rows, labels=3)


def _positions(title: str, part: Sequence[Summary]) -> Grid:
    drafted = [summary for summary in part if summary.accepted_per_position]
    longest = max((len(summary.accepted_per_position) for summary in drafted), default=0)
    slots = [slot for slot in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if slot <= longest]
    rows = []
    for summary in drafted:
        shares = dict(enumerate(summary.accepted_per_position, start=1))
        rows.append([*_who(summary), *(percent(shares.get(slot)) for slot in slots)])
    return Grid(title=f"Accepted per position: {title}", header=[*_WHO, *map(str, slots)], rows=rows, labels=3)


_WHO = ("suite", "domain", "decoder")
_PASSES = ("ar", "draft", "verify")
_FLOOR = ("matmul", "read")
_WHERE = ("model", "dtype", "batch", "context")


def _passes(passes: Sequence[Record], machines: Machines) -> Grid:
    """Put the passes of one width side by side; where it was measured, what they cannot do without.

    The floor of a cycle is the matrix products of its two passes, and one read of the keys in each. The share of
    bandwidth is that of the bytes a plain step or a verification must read, in its time, of what a copy moves.
    """
    timed = split(passes, lambda record: record["pass"])
    kinds = [kind for kind in (*_PASSES, *_FLOOR) if kind in timed or kind in _PASSES]
    copied = any(record.get("bytes") for record in timed.get("copy", ()))
    rows = []
    for where, there in split(passes, lambda record: _where(record, machines)).items():
        last = {record["pass"]: record for record in there}
        of_kinds = [record for record in there if record["pass"] in kinds]
        for width, of_width in split(of_kinds, lambda record: record["width"]).items():
            times = {record["pass"]: 1000 * record["seconds"] for record in of_width}
            row = [*where, str(width), *(number(times.get(kind), 2) for kind in kinds)]
            if "matmul" in kinds:
                whole = "read" in last and {"draft", "verify", "matmul"} <= times.keys()
                floor = 2 * (times["matmul"] + 1000 * last["read"]["seconds"]) if whole else None
                row.append(number((times["draft"] + times["verify"]) / floor if floor else None, 2))
            if copied:
                rates = [_rate(record) for record in of_width if record["pass"] in ("ar", "verify")]
                copy = _rate(last["copy"]) if "copy" in last else 0
                row.append(percent(rates[-1] / copy if copy and any(rates) else None))
            rows.append(row)
    header = ["width", *(f"{kind} ms" for kind in kinds)]
    header += ["cycle / floor"] * ("matmul" in kinds) + ["of bandwidth"] * copied
    return _timed("Cost of passes", header, rows, machines)


def _rate(record: Record) -> float:
    """Return the bytes that a pass must move in a second; 0 where that is not known."""
    return float((record.get("bytes") or 0) / record["seconds"])


def _prompts(passes: Sequence[Record], machines: Machines) -> Grid:
    """Say how long a prompt takes up to its first token: without a view, plainly, and with the first block drafted."""
    rows = []
    read = [record for record in passes if record["pass"] == "prompt"]
    for where, there in split(read, lambda record: _where(record, machines)).items():
        times = {min(record["width"], 2): 1000 * record["seconds"] for record in there}
        rows.append([*where, *(number(times.get(kind), 1) for kind in (0, 1, 2))])
    header = ["backbone alone ms", "plainly ms", "first block drafted ms"]
    return _timed("Time to the first token", header, rows, machines)


def _fused(passes: Sequence[Record], machines: Machines) -> Grid:
    """Say what each fused pass costs in plain passes, and beside the draft and the verification it stands for."""
    rows = []
    for where, there in split(passes, lambda record: _where(record, machines)).items():
        seconds = {(record["pass"], record["width"], record.get("stops", 0)): record["seconds"] for record in there}
        for (kind, width, stops), fused in seconds.items():
            if kind != "fused":
                continue
            plain = seconds.get(("ar", 1, 0))
            both = [seconds.get((part, width, 0), 0.0) for part in ("draft", "verify")]
            rows.append(
                [
                    *map(str, (*where, width, stops, width * (1 + stops))),
                    number(1000 * fused, 2),
                    number(fused / plain if plain else None, 2),
                    number(fused / sum(both) if all(both) else None, 2),
                ]
            )
    header = ["verified", "stops", "rows", "ms", "plain passes", "× draft and verify"]
    return _timed("Cost of fused passes", header, rows, machines)


def steps(records: Sequence[Record]) -> Grid:
    """Put what training steps took side by side, a recipe in a column."""
    described = [_step(record) for record in records]
    rows = [[name, *(facts[name] for facts in described)] for name in (described[0] if described else ())]
    header = ["", *(record["recipe"] for record in records)]
    return Grid(title="Training steps", header=header, rows=rows, labels=1)


def _quality(summaries: Sequence[quality.Summary]) -> Grid:
    """Put precisions below each other, suite by suite."""
    rows = [
        {
            "suite": one.suite,
            "precision": one.dtype,
            "prompts": str(one.prompts),
            "tokens": str(one.tokens),
            "perplexity": f"{one.perplexity:.4f}",
            "÷ float32": f"{one.ratio.value:.4f} ({one.ratio.low:.4f}–{one.ratio.high:.4f})",
            "divergence": f"{one.divergence:.5f}",
            "agreement": percent(one.agreement, 2),
            "right": percent(one.right),
        }
        for one in summaries
    ]
    return Grid.of("Quality: float32's plain answers, read in each precision", rows, labels=2)


def _step(record: Record) -> dict[str, str]:
    """Say what a training step took; shares of phases are of their sum, which medians make differ from the step's."""
    whole = sum(record["phases"].values())
    return {
        "backbone": record["backbone"],
        "where": f"{record['device']}, {record['dtype']}, {record['threads']} thread(s)",
        "rows": f"{record['batch_rows']} of {record['row_tokens']} in {record['parts']} part(s)",
        "step": f"{record['seconds']:.3g} s, median of {len(record['steps_seconds'])}",
        "tokens/s": number(record["tokens_per_second"], 0),
        **{f"  {name}": f"{s:.3g} s, {100 * s / whole:.0f} %" for name, s in record["phases"].items()},
        "peak memory": f"{record['memory_bytes'] / 1e9:.2f} GB",
        "operations": f"{record['operations']:.3g}",
        "matrix product": f"{record['operations_per_second']:.3g} operations/s",
        "floor": f"{record['floor_seconds']:.3g} s",
        "floor / step": percent(record["floor_share"]),
    }


def _where(record: Record, machines: Machines) -> tuple[str, ...]:
    """Return what a pass was timed on, as `_timed` heads it."""
    device = [machines[record.get("provenance")]] if machines else []
    return (*device, *(str(record[name]) for name in _WHERE))


def _timed(title: str, header: Sequence[str], rows: list[list[str]], machines: Machines) -> Grid:
    """Return a table whose rows begin with what passes were timed on."""
    where = [*["device"] * bool(machines), *_WHERE]
    return Grid(title=title, header=[*where, *header], rows=rows, labels=2 + bool(machines))


def _runs(provenances: Iterable[Record]) -> Grid:
    rows = [
        {
            "date": p["date"],
            "commit": f"{(p['commit'] or 'none')[:12]}{' and changes' if p['dirty'] else ''}",
            "versions": f"orthrus {p['orthrus']}, torch {p['torch']}, transformers {p['transformers']}",
            "device": p["device"],
            "command": p["command"].replace("|", "\\|"),
        }
        for p in provenances
    ]
    return Grid.of("Runs", rows, labels=5)


def _who(summary: Summary) -> list[str]:
    return [summary.suite, summary.domain, summary.contender.label]
