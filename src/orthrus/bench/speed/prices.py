"""Decoding by a price list: a clock that only passes move on, each by what a file of measured passes says it takes.

Tells what plans would give on a device that somebody has measured (`orthrus bench passes`), with this model's own
drafts: counts and texts are real, seconds are computed, and whatever takes time between passes counts nothing.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedModel

from orthrus.bench.lines import PASS, Result, provenances
from orthrus.data.records import Record, read_records
from orthrus.decode.frames import Reading
from orthrus.decode.geometry import Geometry
from orthrus.decode.passes import Logits, Passes, Proposal
from orthrus.errors import DataError
from orthrus.model.cache import ScratchCache

_KINDS: Final = {"ar": "verify", "verify": "verify", "draft": "draft", "fused": "fused"}


class Prices:
    """What passes take: read off measured ones, on a line between widths, at the nearest batch and context.

    Lines of `dtype` count, those of compiled passes where there are no others; None stands for the only one there is.
    """

    def __init__(self, records: Sequence[Record], dtype: str | None, *, where: str) -> None:
        labels = list(dict.fromkeys(record["dtype"] for record in records if record.get("kind") == PASS))
        if dtype is None and len(labels) != 1:
            raise DataError(f"{where}: passes of one precision are required, found {' and '.join(labels) or 'none'}")
        label = next((one for one in (dtype, f"{dtype} compiled") if one in labels), None if dtype else labels[0])
        self._points: dict[str, dict[tuple[int, int], list[tuple[int, float]]]] = {}
        self._where = f"{where}, {label or dtype}"
        for record in records:
            if record.get("kind") == PASS and record["dtype"] == label and record.get("pass") in _KINDS:
                at = (record["batch"], record["context"])
                point = (record["width"] * (1 + record["stops"]), record["seconds"])
                kinds = ["verify", "draft"] if record["pass"] == "ar" else [_KINDS[record["pass"]]]
                for kind in kinds:
                    self._points.setdefault(kind, {}).setdefault(at, []).append(point)
        for kind in ("verify", "draft"):
            self._measured(kind)

    @classmethod
    def read(cls, path: Path, dtype: str | None) -> "Prices":
        """Read a file of measured passes; raises DataError where none is of this precision, or several machines'."""
        records = read_records(path)
        machines = {f"{p['device']}, {p['threads']} threads" for p in provenances(records, where=str(path)).values()}
        if len(machines) > 1:
            raise DataError(f"{path}: passes of one machine are required, found {' and '.join(sorted(machines))}")
        return cls(records, dtype, where=str(path))

    def seconds(self, kind: str, positions: float, *, batch: int, context: int) -> float:
        """Return what a pass of so many positions per row takes, draft blocks included, after `context` tokens.

        `kind` is "verify", "draft" or "fused"; raises DataError where none of that kind was measured.
        """
        measured = self._measured(kind)
        nearest = min(measured, key=lambda nearest: (_apart(nearest[0], batch), _apart(nearest[1], context)))
        points = sorted(measured[nearest])
        return _on_line(points, positions) if len(points) > 1 else points[0][1]

    def completion(self, result: Result) -> float:
        """Return what a completion's passes take by their counts: its prompt, plain steps, cycles of its mean width.

        A draft pass counts as a verification of as many positions. Raises DataError where counts do not tell the width
        of passes: trees, one pass a cycle, other drafters than the view.
        """
        stats: Mapping[str, int] = result.stats
        if (result.plan or "").startswith(("tree", "onepass")) or stats.get("draft_passes"):
            raise DataError(
                f"{result.id}: counts must tell the width of passes, found plan {result.plan!r}: leave it out, or "
                "price the run itself (orthrus bench run --prices)"
            )
        cycles, plain, drafted = (stats[name] for name in ("cycles", "plain_steps", "drafted"))
        passes = [(result.prompt_tokens, 1), (1, plain), (2 + drafted / max(cycles, 1), stats["forwards"] - 1 - plain)]
        where = {"batch": result.rows, "context": result.prompt_tokens}
        return sum(count * self.seconds("verify", width, **where) for width, count in passes) / result.rows

    def _measured(self, kind: str) -> dict[tuple[int, int], list[tuple[int, float]]]:
        if kind not in self._points:
            raise DataError(
                f"{self._where}: measured passes of kind {kind!r} are required, found {sorted(self._points)}: "
                "orthrus bench passes --stops 1,2,4,all"
            )
        return self._points[kind]


class Meter:
    """A clock in seconds that stands still but for passes, each of which moves it on by its price."""

    def __init__(self, prices: Prices) -> None:
        self.prices = prices
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def engine(self) -> dict[str, Any]:
        """Return arguments of an engine that goes by this clock, and whose passes move it on."""
        return {"passes": partial(_Priced, meter=self), "clock": self}


class _Priced(Passes):
    def __init__(
        self, model: PreTrainedModel, cache: ScratchCache, geometry: Geometry | None = None, *, meter: Meter
    ) -> None:
        super().__init__(model, cache, geometry)
        self.meter = meter

    def _charge(self, kind: str, rows: slice, positions: int) -> None:
        for part in self.parts(rows):
            batch, context = part.stop - part.start, max(self.cache.lengths[part])
            self.meter.now += self.meter.prices.seconds(kind, positions, batch=batch, context=context)

    def prefill(self, rows: slice, pending: Sequence[Sequence[int]], *, chunk: int, **more: Any) -> Proposal | None:
        """Read prompts: each chunk costs what verifying as many positions does, those that draft included."""
        longest = max(map(len, pending)) + bool(more.get("anchors"))
        for start in range(0, longest, chunk):
            drafts = more.get("drafts", 0) if start + chunk >= longest else 0
            self._charge("verify", rows, min(chunk, longest - start) + (drafts + 2 if drafts else 0))
        return super().prefill(rows, pending, chunk=chunk, **more)

    def run(self, rows: slice, reading: Reading) -> Logits:
        """Run a pass: AR rows cost what verifying does, one and a block what drafting does, others fused passes."""
        blocks = 0 if reading.stop_BS is None else reading.stop_BS.shape[1]
        kind = "verify" if not blocks else "draft" if reading.token_BQ.shape[1] == 1 else "fused"
        # `bench passes` says of a draft pass how long the block is that an anchor of the view's would begin.
        self._charge(kind, rows, reading.drafts + 2 if kind == "draft" else self.scratch(reading))
        return super().run(rows, reading)


def _on_line(points: Sequence[tuple[int, float]], x: float) -> float:
    """Read a line through two or more points in order at x; past the last one it goes on, but never down."""
    right = min(max(bisect_right(points, x, key=lambda point: point[0]), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    if x1 == x0:
        return y1
    value = y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return value if x <= x1 else max(value, y1)


def _apart(one: int, other: int) -> float:
    return max(one, other) / max(1, min(one, other))
