"""Tables and plots of a race of peers: cost of training, drafts, speed and texts, by precision and batch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

from orthrus.bench import metrics
from orthrus.bench.lines import Result
from orthrus.bench.metrics import section, split
from orthrus.bench.peers.contest import PEER
from orthrus.bench.plots import Album, curves
from orthrus.bench.race import Contender
from orthrus.bench.speed.report import Summary, summaries
from orthrus.bench.tables import NONE, Grid, estimate, number, percent
from orthrus.data.records import read_records
from orthrus.errors import DataError

CAVEATS: Final = (
    "accepted: drafts kept per cycle, without the bonus; tokens/pass: per pass of the backbone, with a view's drafts",
    "a small backbone has few layers: one layer of a drafter is a large share of it, and a view through all is shallow",
    "a converted model was trained on the backbone's answers: other training data would cost it more right answers",
    "equal compute at small budgets favours models that start from the backbone's weights",
)


def tables(path: Path) -> list[Grid]:
    """Read the file of a race; raises DataError where it holds no result."""
    records = read_records(path)
    results = Result.read(records, where=str(path))
    if not results:
        raise DataError(f"{path}: at least one result line is required, found none")
    peers = {(r["configuration"], r["dtype"], r["mode"], r["plan"]): r for r in records if r.get("kind") == PEER}
    out = []
    for setting, part in split(summaries(results, baselines=("ar",)), lambda summary: summary.setting).items():
        raced = [r for r in results if (r.configuration, r.dtype, r.batch) == setting]
        rows = [_row(summary, raced, peers.get((*setting[:2], *summary.contender[:2]), {})) for summary in part]
        title = f"Peers: {setting[1]}, batch {setting[2]}, {len({r.prompt for r in raced})} prompts"
        out.append(Grid.of(title, rows, labels=2))
    return out


def _row(summary: Summary, results: Sequence[Result], peer: Mapping[str, Any]) -> dict[str, str]:
    mine = [r for r in results if _is_in(r, summary) and r.contender == summary.contender]
    plain = [r for r in results if _is_in(r, summary) and r.mode == "ar"]
    training = peer.get("training") or {}
    cost = _costs(peer).get((summary.setting[2], None), {})
    ratio = summary.against.get("ar")
    parameters = training.get("trainable", peer.get("parameters"))
    cycle, forward = summary.tokens_per_cycle[0], summary.tokens_per_forward[0]
    firsts = [r.stats["first_token_seconds"] for r in mine if "first_token_seconds" in r.stats]
    cycles = sum(r.stats.get("cycles", 0) for r in mine)
    drew = sum(sum(r.stats.get("draft_passes", {}).values()) for r in mine)
    return {
        "suite": section(summary.suite, summary.domain),
        "peer": " ".join(dict.fromkeys(summary.contender.label.split())),
        "trained M": number(parameters, 2, 1e6),
        "operations": NONE if "operations" not in training else f"{training['operations']:.2g}",
        "rows": number(training.get("rows"), 0),
        "accepted": number(sum(r.stats.get("accepted", 0) for r in mine) / cycles if cycles else None, 2),
        "tokens/cycle": number(cycle and cycle.value, 2),
        "tokens/pass": number(forward and forward.value, 2),
        "draft passes": number(drew / cycles if drew else None, 1),
        "draft ÷ verify": _drafting(cost),
        "first token ms": number(1000 * median(firsts) if firsts else None, 1),
        "× plain": estimate(ratio and ratio.totals),
        "weights MB": number(peer.get("weight_bytes"), 1, 1e6),
        "keys B/token": number(peer.get("key_bytes_per_token"), 0),
        "identical": percent(summary.identical),
        "right": percent(summary.right),
        "right − plain": _difference(mine, plain),
    }


def costs(path: Path) -> list[Grid]:
    """Return the cost of a draft relative to a verification, by batch and context; no table without contexts."""
    peers = [record for record in read_records(path) if record.get("kind") == PEER]
    settings = sorted({where for peer in peers for where in _costs(peer) if where[1] is not None})
    if not settings:
        return []
    rows = [
        [
            Contender(peer["mode"], peer["plan"]).name,
            *(_drafting(_costs(peer).get(where, {})) for where in settings),
        ]
        for peer in peers
        if any(where in _costs(peer) for where in settings)
    ]
    header = ["peer", *(f"batch {batch}, {context} tokens" for batch, context in settings)]
    return [Grid(title="Draft ÷ verify, random prompts", header=header, rows=rows, labels=1)]


def _costs(peer: Mapping[str, Any]) -> dict[tuple[int, int | None], Mapping[str, Any]]:
    return {(cost["batch"], cost.get("context")): cost for cost in peer.get("costs", ())}


def _drafting(cost: Mapping[str, Any]) -> str:
    draft, verify = cost.get("draft_seconds"), cost.get("verify_seconds")
    return NONE if draft is None or verify is None else f"{draft / verify:.2f}"


def _is_in(result: Result, summary: Summary) -> bool:
    return summary.suite in ("all", result.suite) and summary.domain in ("all", result.domain)


def _difference(mine: Sequence[Result], plain: Sequence[Result]) -> str:
    """Return the paired difference in right answers to plain decoding, in points, with its interval."""
    right = {r.prompt: r.right for r in plain}
    pairs = [(r.right, right[r.prompt]) for r in mine if r.right is not None and right.get(r.prompt) is not None]
    if not pairs or all(one == other for one, other in pairs):
        return NONE if not pairs else "0"
    values = np.array([[float(one) - float(other), 1.0] for one, other in pairs])  # type: ignore[arg-type]
    gain = metrics.bootstrap(values, metrics.ratio_of_sums)
    return f"{100 * gain.value:+.1f} ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"


def plot(path: Path, folder: Path) -> list[Path]:
    """Draw acceptance by position, for each precision and batch; returns the files."""
    album = Album(folder)
    results = Result.read(read_records(path), where=str(path))
    for (dtype, batch), part in split(results, lambda r: (r.dtype, r.batch)).items():
        by_peer = split(part, lambda r: r.contender.name)
        accepted = {name: metrics.accepted_per_position(raced) for name, raced in by_peer.items()}
        labels = {"xlabel": "position after the anchor", "ylabel": "share of drafts accepted"}
        with album.picture(f"peers-accepted-{dtype}-batch{batch}.png", ylim=(0, 1), **labels) as axes:
            curves(axes, {name: list(enumerate(shares, start=1)) for name, shares in accepted.items() if shares})
    return album.files
