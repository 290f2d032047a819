"""An audit's report as tables, and its verdict as a line."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Final

from orthrus.bench.audit.contract import COUNTED, Contract
from orthrus.bench.audit.report import AuditReport, PlainSummary, Summary, widest
from orthrus.bench.audit.verdicts import Setting, Verdict
from orthrus.bench.metrics import section, split
from orthrus.bench.plots import Album, bars
from orthrus.bench.tables import NONE, Grid, estimate, number, percent

_SHOWN: Final = 20  # mismatches in a table; JSON has all of them


def tables(report: AuditReport) -> list[Grid]:
    """Return a report's tables: texts by setting, by perplexity, the references, mismatches that count."""
    title = f"{report.settings.get('model', '')}, at most {report.settings.get('max_new_tokens', '?')} tokens"
    grids = [_texts(title, report.summaries), _perplexity(title, widest(report.summaries)), _references(report.plain)]
    grids.append(_conditions(report.plain))
    grids += [_mismatches("Broken", report.contract.broken), _mismatches("Ties", report.contract.ties)]
    return [grid for grid in (*grids, _wasteful(report.contract.wasteful)) if grid.rows]


def verdict(contract: Contract) -> str:
    if contract.texts == 0:
        return "nothing was promised: audit float32, or exact='token'"
    promised = f'{contract.texts} texts promised to be plain decoding\'s (float32, exact="token")'
    if contract.broken:
        return f"BROKEN: of {promised} {len(contract.broken)} are not"
    if contract.wasteful:
        return (
            f"BROKEN: of {contract.counted} texts under {COUNTED} {len(contract.wasteful)} took more passes than plain "
            "decoding"
        )
    ties = f", {len(contract.ties)} of them up to ties within {contract.epsilon:g}" if contract.ties else ""
    return f"holds: {promised} are{ties}"


def plot(report: AuditReport, folder: Path) -> list[Path]:
    """Draw the share of identical texts by domain, for each batch size; raises DataError without matplotlib."""
    album = Album(folder)
    for batch, part in split(report.summaries, lambda summary: summary.setting.batch).items():
        shares: dict[str, dict[str, float]] = {}
        by_promise = split(part, lambda s: (f"{s.setting.dtype} {s.setting.exact} {s.setting.mode}", s.suite, s.domain))
        for (label, suite, domain), drawn in by_promise.items():
            share = sum(summary.identical for summary in drawn) / sum(summary.prompts for summary in drawn)
            shares.setdefault(label, {})[section(suite, domain)] = share
        labels = {"ylabel": "share of identical texts", "title": f"batch {batch}"}
        with album.picture(f"identical-batch{batch}.png", ylim=(0, 1.02), **labels) as axes:
            bars(axes, shares)
    return album.files


def _texts(title: str, summaries: Sequence[Summary]) -> Grid:
    header = ["suite", "domain", *_SETTING, "prompts", "identical", "= HF"]
    header += ["parts at", "gap there", "at most", "tokens per cycle", "tokens per forward", "× ar"]
    rows = [
        [
            *(s.suite, s.domain, *_setting(s.setting), str(s.prompts)),
            *(percent(s.identical / s.prompts), percent(s.identical_to_hf / s.prompts)),
            number(median(parting.at for parting in s.partings) if s.partings else None, 0),
            *((f"{median(s.gaps):.3g}", f"{max(s.gaps):.3g}") if s.gaps else (NONE, NONE)),
            number(s.tokens_per_cycle, 2),
            f"{s.tokens_per_forward:.2f} (least {s.least_tokens_per_forward:.2f}, "
            f"{s.below_one_token_per_forward} below 1)",
            estimate(s.speed),
        ]
        for s in summaries
    ]
    return Grid(title=f"Texts equal to plain decoding's, alone: {title}", header=header, rows=rows, labels=5)


def _perplexity(title: str, summaries: Sequence[Summary]) -> Grid:
    most = max(len(summary.by_perplexity) for summary in summaries)
    rows = [
        [
            *_setting(s.setting),
            *(f"{percent(q.identical / q.prompts)} ({q.low:.2f} to {q.high:.2f})" for q in s.by_perplexity),
        ]
        for s in summaries
    ]
    header = [*_SETTING, *(f"quantile {i + 1}" for i in range(most))]
    return Grid(title=f"The same by perplexity of plain decoding's text: {title}", header=header, rows=rows, labels=3)


def _references(plain: Sequence[PlainSummary]) -> Grid:
    margins = list(plain[0].close) if plain else []
    rows = [
        [
            *(p.dtype, p.exact, str(p.prompts), str(p.positions), percent(p.identical_to_hf / p.prompts)),
            *(percent(p.close[margin], 2) for margin in margins),
        ]
        for p in plain
    ]
    header = ["dtype", "exact", "prompts", "positions", "= HF", *(f"gap < {margin}" for margin in margins)]
    return Grid(title="Plain decoding itself: positions a recheck would see", header=header, rows=rows, labels=2)


def _conditions(plain: Sequence[PlainSummary]) -> Grid:
    rows = []
    for p in plain:
        finding = p.conditions.get("finding")
        shape = finding and " ".join(f"{name} {value}" for name, value in finding["geometry"].items())
        broken = finding and ("; ".join(finding["broken"]) or "nothing")
        row = {name: str(p.conditions.get(name, NONE)) for name in ("device", "attention", "threads")}
        row["compiled here"] = ", ".join(p.conditions.get("operators", ())) or NONE
        found = {"fixed shapes": shape or NONE, "what the probe found broken": broken or NONE}
        rows.append({"dtype": p.dtype, "exact": p.exact, **row, **found})
    return Grid.of("Conditions", rows, labels=8)


def _mismatches(name: str, texts: Sequence[Verdict]) -> Grid:
    rows = [[*_text(v), str(v.diverges_at), NONE if v.gap is None else f"{v.gap:.3g}"] for v in texts[:_SHOWN]]
    title = f"{name}: {len(rows)} of {len(texts)} texts"
    return Grid(title=title, header=[*_TEXT, "parts at", "gap there"], rows=rows, labels=5)


def _wasteful(texts: Sequence[Verdict]) -> Grid:
    rows = [[*_text(v), str(v.tokens), str(v.passes)] for v in texts[:_SHOWN]]
    title = f"More passes than plain decoding: {len(rows)} of {len(texts)} texts"
    return Grid(title=title, header=[*_TEXT, "tokens", "passes"], rows=rows, labels=5)


_SETTING: Final = ("dtype", "exact", "decoder", "batch")
_TEXT: Final = ("suite", "prompt", *_SETTING)


def _text(verdict: Verdict) -> list[str]:
    return [verdict.suite, verdict.id, *_setting(verdict.setting)]


def _setting(setting: Setting) -> list[str]:
    return [setting.dtype, setting.exact, setting.label, str(setting.batch)]
