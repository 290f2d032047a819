"""What a load showed: throughput, percentiles of waiting times, plain decoding beside drafts; tables and plots."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from orthrus.bench.serve.load import REQUEST, Answered
from orthrus.bench.speed.plots import save
from orthrus.bench.speed.tables import Grid
from orthrus.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PERCENTILES: Final = (50, 95, 99)


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """All requests of one setting.

    Attributes:
        mode, concurrency, rate: the setting.
        requests, failed: how many there were, and how many of them ended with an error.
        tokens_per_second: tokens of all texts, by the seconds from the first request to the last end.
        first, per_token, gap: seconds at `PERCENTILES`, to the first text, per token after it, between two pieces.
        tokens_per_forward: pooled over the requests; None where the server does not tell.
        differ: texts that differ from those of mode "ar" at the same load; None where it did not run.
    """

    mode: str
    concurrency: int | None
    rate: float | None
    requests: int
    failed: int
    tokens_per_second: float
    first: list[float]
    per_token: list[float]
    gap: list[float]
    tokens_per_forward: float | None
    differ: int | None

    @property
    def load(self) -> str:
        """The load in words."""
        return f"{self.concurrency} at a time" if self.concurrency is not None else f"{self.rate:g} a second"


def answers(records: Iterable[dict[str, Any]], *, where: str) -> list[Answered]:
    """Return the requests among records; raises DataError for a line that is not of this format."""
    names = {one.name for one in fields(Answered)}
    try:
        made = [{k: v for k, v in record.items() if k in names} for record in records if record.get("kind") == REQUEST]
        return [Answered(**one) for one in made]
    except TypeError as error:
        raise DataError(f"{where}: a line of a request must have the fields {sorted(names)}: {error}") from None


def summaries(answered: Sequence[Answered]) -> list[Summary]:
    """Summarise every setting, in the order they were measured."""
    settings = dict.fromkeys((a.mode, a.concurrency, a.rate) for a in answered)
    groups = {key: [a for a in answered if (a.mode, a.concurrency, a.rate) == key] for key in settings}
    return [_summary(key, group, groups.get(("ar", *key[1:]))) for key, group in groups.items()]


def _summary(key: tuple[str, int | None, float | None], group: list[Answered], plain: list[Answered] | None) -> Summary:
    well = [a for a in group if a.error is None]
    span = max((a.sent + a.seconds for a in group), default=0.0) - min((a.sent for a in group), default=0.0)
    forwards = sum(a.stats.get("forwards", 0) for a in well)
    texts = {(a.suite, a.id): a.text_hash for a in plain or () if a.error is None}
    compared = [a for a in well if (a.suite, a.id) in texts]
    return Summary(
        mode=key[0],
        concurrency=key[1],
        rate=key[2],
        requests=len(group),
        failed=len(group) - len(well),
        tokens_per_second=sum(a.tokens for a in well) / span if span else 0.0,
        first=_percentiles(a.first for a in well),
        per_token=_percentiles(a.per_token for a in well),
        gap=_percentiles(gap for a in well for gap in a.gaps),
        tokens_per_forward=sum(a.stats.get("emitted", 0) for a in well) / forwards if forwards else None,
        differ=None if plain is None else sum(texts[a.suite, a.id] != a.text_hash for a in compared),
    )


def _percentiles(values: Iterable[float | None]) -> list[float]:
    measured = [value for value in values if value is not None]
    return [float(value) for value in np.percentile(measured, PERCENTILES)] if measured else []


def table(made: Sequence[Summary], title: str) -> Grid:
    """Return one row a setting."""
    header = ["load", "mode", "requests", "failed", "tokens/s", "first text, ms", "per token, ms", "gap, ms"]
    rows = [
        [
            one.load,
            one.mode,
            str(one.requests),
            str(one.failed),
            f"{one.tokens_per_second:.1f}",
            *(_milliseconds(values) for values in (one.first, one.per_token, one.gap)),
            "–" if one.tokens_per_forward is None else f"{one.tokens_per_forward:.2f}",
            "–" if one.differ is None else str(one.differ),
        ]
        for one in made
    ]
    marks = " / ".join(f"p{mark}" for mark in PERCENTILES)
    header += ["tokens per forward", "texts that differ"]
    return Grid(title=f"{title} ({marks})", header=header, rows=rows, labels=2)


def _milliseconds(values: Sequence[float]) -> str:
    return " / ".join(f"{1000 * value:.0f}" for value in values) or "–"


def plot(made: Sequence[Summary], folder: Path) -> list[Path]:
    """Draw throughput and waiting times by load, a curve per mode; returns the files.

    Raises:
        DataError: matplotlib is not installed.
    """
    out = []
    for axis in ("concurrency", "rate"):
        part = [one for one in made if getattr(one, axis) is not None]
        if not part:
            continue
        pictures = {
            "throughput": ("tokens per second", lambda one: one.tokens_per_second),
            "first": ("milliseconds to the first text (median)", lambda one: 1000 * _median(one.first)),
            "per-token": ("milliseconds per token (median)", lambda one: 1000 * _median(one.per_token)),
        }
        for name, (label, value) in pictures.items():
            out.append(save(folder / f"serve-{name}-{axis}.png", _curves(part, axis, label, value)))
    return out


def _median(values: Sequence[float]) -> float:
    return values[0] if values else 0.0


def _curves(part: Sequence[Summary], axis: str, label: str, value: Any) -> Any:
    def draw(axes: "Axes") -> None:
        for mode in dict.fromkeys(one.mode for one in part):
            points = sorted((getattr(one, axis), value(one)) for one in part if one.mode == mode)
            axes.plot(*zip(*points, strict=True), marker="o", label=mode)
        axes.set_xlabel("requests at a time" if axis == "concurrency" else "requests a second")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.legend()

    return draw
