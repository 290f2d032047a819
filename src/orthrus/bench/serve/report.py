"""What a load showed: throughput, percentiles of waiting times, plain decoding beside drafts; tables and plots."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from orthrus.bench.metrics import percentiles, split
from orthrus.bench.plots import Album, curves
from orthrus.bench.serve.load import Answered
from orthrus.bench.tables import Grid, milliseconds, number

PERCENTILES: Final = (50, 95, 99)


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """All requests of one setting.

    Attributes:
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


def summaries(answered: Sequence[Answered]) -> list[Summary]:
    """Summarise every setting, in the order they were measured."""
    groups = split(answered, lambda a: (a.mode, a.concurrency, a.rate))
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
        first=percentiles((a.first for a in well), PERCENTILES),
        per_token=percentiles((a.per_token for a in well), PERCENTILES),
        gap=percentiles((gap for a in well for gap in a.gaps), PERCENTILES),
        tokens_per_forward=sum(a.stats.get("emitted", 0) for a in well) / forwards if forwards else None,
        differ=None if plain is None else sum(texts[a.suite, a.id] != a.text_hash for a in compared),
    )


def table(made: Sequence[Summary], title: str) -> Grid:
    rows = [
        {
            "load": f"{one.concurrency} at a time" if one.concurrency is not None else f"{one.rate:g} a second",
            "mode": one.mode,
            "requests": str(one.requests),
            "failed": str(one.failed),
            "tokens/s": number(one.tokens_per_second, 1),
            "first text, ms": milliseconds(one.first),
            "per token, ms": milliseconds(one.per_token),
            "gap, ms": milliseconds(one.gap),
            "tokens per forward": number(one.tokens_per_forward, 2),
            "texts that differ": number(one.differ, 0),
        }
        for one in made
    ]
    marks = " / ".join(f"p{mark}" for mark in PERCENTILES)
    return Grid.of(f"{title} ({marks})", rows, labels=2)


def plot(made: Sequence[Summary], folder: Path) -> list[Path]:
    """Draw throughput and waiting times by load, a curve per mode; raises DataError without matplotlib."""
    album = Album(folder)
    for axis, xlabel in (("concurrency", "requests at a time"), ("rate", "requests a second")):
        part = [one for one in made if getattr(one, axis) is not None]
        for name, ylabel, value in _PICTURES if part else ():
            with album.picture(f"serve-{name}-{axis}.png", xlabel=xlabel, ylabel=ylabel) as axes:
                by_mode = split(part, lambda one: one.mode)
                curves(axes, {m: [(getattr(one, axis), value(one)) for one in of] for m, of in by_mode.items()})
                axes.set_ylim(bottom=0)
    return album.files


def _median(values: Sequence[float]) -> float:
    """Return the first of values at `PERCENTILES`, the median, in milliseconds; 0 where there are none."""
    return 1000 * values[0] if values else 0.0


_PICTURES: Final[tuple[tuple[str, str, Callable[[Summary], float]], ...]] = (
    ("throughput", "tokens per second", lambda one: one.tokens_per_second),
    ("first", "milliseconds to the first text (median)", lambda one: _median(one.first)),
    ("per-token", "milliseconds per token (median)", lambda one: _median(one.per_token)),
)
