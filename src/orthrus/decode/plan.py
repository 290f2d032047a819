"""What each cycle does: a plain step, a chain of drafts, a tree of them, a copy from the text, or one fused pass.

`parse` reads what was asked for; a `Planner` decides step by step from what was accepted lately and from what steps
were measured to cost. Decisions are a pure function of those numbers: the clock is the engine's, and no plan ever
changes a text. Knows neither model nor tensors.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from orthrus.errors import ConfigError

Kind = Literal["plain", "chain", "tree", "onepass", "lookup"]

LADDER = (1, 2, 3, 4, 6, 8, 11, 15, 23, 31, 47, 63)
"""Draft counts `auto` chooses among, up to the block it was trained for."""

LOOKUPS = (3, 7, 15, 31, 63)
"""Numbers of tokens `auto` may copy, up to the same."""

FUSED = (3, 7, 15, 31, 63)
"""Draft counts `auto` may take one pass a cycle with, and the longest there is."""

STOPS = (1, 2, 4, 8)
"""Numbers of stop points of such passes."""

_FUSED_ROWS = 160
"""Positions of such a pass at most, which is also the scratch that `auto` asks of a cache."""

_TREE_NODES = 31


@dataclass(frozen=True, slots=True)
class Step:
    """One cycle's shape.

    Attributes:
        drafts: tokens drafted per row; 0 is a plain step.
        nodes: tree nodes verified; 0 verifies the chain of drafts.
        stops: places where acceptance may stop for which the same pass drafts the next block; 0 drafts in a pass of
            its own.
        lookup: drafts are copied from the row's own text (`decode.lookup`), which takes no pass.
    """

    drafts: int = 0
    nodes: int = 0
    stops: int = 0
    lookup: bool = False

    @property
    def kind(self) -> Kind:
        """Return the step's kind."""
        if self.drafts == 0:
            return "plain"
        return "lookup" if self.lookup else "tree" if self.nodes else "onepass" if self.stops else "chain"

    @property
    def scratch(self) -> int:
        """Cache positions past a row's length that the step writes at most."""
        verify = 1 + max(self.drafts, self.nodes)
        return verify + self.stops * (self.drafts + 1)


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for: always the same step, or `auto`.

    Attributes:
        name: "auto", "ar", "full", "fixed:K", "tree:N", "onepass", "onepass:M", "lookup" or
            "lookup:M".
        step: the step of a fixed plan; None for `auto`.
    """

    name: str
    step: Step | None

    def steps(self, block: int) -> tuple[Step, ...]:
        """Return every step this plan may take with a view trained for blocks of `block`.

        Raises:
            ConfigError: the plan asks for longer blocks than the view was trained for.
        """
        if self.step is not None:
            return (self._fitted(self.step, block),)
        chains = [Step(m) for m in LADDER if m < block]
        if block - 1 not in LADDER:
            chains.append(Step(block - 1))
        copies = [Step(m, lookup=True) for m in LOOKUPS if m < block]
        tree = Step(block - 1, nodes=_TREE_NODES)
        lengths = [*(m for m in FUSED if m < block - 1), block - 1]
        fused = [Step(m, stops=s) for m in lengths for s in STOPS if s <= m + 1]
        return (Step(), *chains, tree, *(step for step in fused if step.scratch <= _FUSED_ROWS), *copies)

    def _fitted(self, step: Step, block: int) -> Step:
        if step.drafts >= block:
            raise ConfigError(
                f"plan {self.name!r} asks for blocks of {step.drafts + 1}, this view was trained for at most {block}"
            )
        drafts = block - 1 if step.drafts < 0 else step.drafts
        return replace(step, drafts=drafts, stops=min(step.stops, drafts + 1))


_FULL = -1  # stands for "as many as the view was trained for" inside a parsed plan only
_ALL = 1 << 30


def parse(text: str) -> Plan:
    """Read a plan's name; raises ConfigError for anything that is not one."""
    kind, _, number = text.partition(":")
    value = int(number) if number.isdigit() else 0
    named = {
        "auto": None,
        "ar": Step(),
        "full": Step(_FULL),
        "onepass": Step(_FULL, stops=_ALL),
        "lookup": Step(_FULL, lookup=True),
    }
    if text in named:
        return Plan(text, named[text])
    if kind == "fixed" and value >= 2:
        return Plan(text, Step(value - 1))
    if kind == "tree" and value >= 1:
        return Plan(text, Step(_FULL, nodes=value))
    if kind == "onepass" and value >= 1:
        return Plan(text, Step(_FULL, stops=value))
    if kind == "lookup" and value >= 1:
        return Plan(text, Step(value, lookup=True))
    raise ConfigError(
        "a plan is 'auto', 'ar', 'full', 'fixed:K' (K of at least 2), 'tree:N', 'onepass', 'onepass:M', 'lookup' or "
        f"'lookup:M', found {text!r}"
    )


class Costs:
    """Seconds per step, as measured: the median of the last few of each shape, first runs (warm-up) left out.

    Of a one-pass step only the pass counts, not the draft pass that comes before it when nothing was drafted ahead.
    """

    def __init__(self, *, window: int = 9) -> None:
        self._seen: dict[int, dict[Step, deque[float]]] = {}
        self._runs: dict[tuple[int, Step], int] = {}
        self._window = window
        # What follows from the times, until enough of them are new.
        self._vectors: dict[tuple[int, tuple[Step, ...]], NDArray[np.float64]] = {}
        self._estimates: dict[tuple[int, Step], float | None] = {}
        self._points: dict[tuple[int, Kind], list[tuple[int, float]]] = {}

    def observe(self, step: Step, rows: int, seconds: float) -> None:
        """Add one measured step over so many rows."""
        runs = self._runs[rows, step] = self._runs.get((rows, step), 0) + 1
        if runs > 1:
            self._seen.setdefault(rows, {}).setdefault(step, deque(maxlen=self._window)).append(seconds)
        if 1 < runs <= 4 or runs % self._window == 0:
            for known in (self._vectors, self._estimates, self._points):
                known.clear()

    def basis(self, rows: int) -> int:
        """Return the number of rows whose costs to go by: this one, or the nearest where steps can be compared."""
        known = [r for r, steps in self._seen.items() if Step() in steps and any(s.kind == "chain" for s in steps)]
        return min(known, key=lambda r: max(r, rows) / min(r, rows), default=rows)

    def measured(self, step: Step, rows: int) -> bool:
        """Tell whether this very step was measured over so many rows."""
        return step in self._seen.get(rows, {})

    def estimates(self, steps: tuple[Step, ...], rows: int) -> NDArray[np.float64]:
        """Return each step's `estimate`, and the draft pass and the verification inside a chain of its length.

        Reckoned anew once per window of observations.

        Returns:
            Array `[3, steps]`, nan where unknown.
        """
        if (rows, steps) not in self._vectors:
            costs = [
                (
                    self.estimate(step, rows),
                    self.draft(step.drafts, rows),
                    self.estimate(Step(step.drafts, lookup=True), rows) if step.drafts else None,
                )
                for step in steps
            ]
            self._vectors[rows, steps] = np.array(
                [[np.nan if cost is None else cost for cost in kind] for kind in zip(*costs, strict=True)]
            )
        return self._vectors[rows, steps]

    def draft(self, drafts: int, rows: int) -> float | None:
        """Return what the draft pass of a chain costs: the chain without its verification; None where unknown."""
        chain = self.estimate(Step(drafts), rows) if drafts else None
        verify = self.estimate(Step(drafts, lookup=True), rows) if drafts else None
        return None if chain is None or verify is None else max(0.0, chain - verify)

    def estimate(self, step: Step, rows: int) -> float | None:
        """Return a step's cost as measured, by interpolation over its length; None where unknown.

        A copy that was never measured is taken to cost half of what a chain of its length does: one of two passes. A
        fused pass lies on the line between its verification and those measured, by the positions that it reads.
        """
        if (rows, step) not in self._estimates:
            self._estimates[rows, step] = self._reckon(step, rows)
        return self._estimates[rows, step]

    def _reckon(self, step: Step, rows: int) -> float | None:
        seen = self._seen.get(rows, {})
        if step in seen:
            return median(seen[step])
        if step.kind == "onepass":
            verify = self.estimate(Step(step.drafts, lookup=True), rows)
            wider = [point for point in self._measured("onepass", rows) if point[0] > step.drafts + 1]
            return _on_line([(step.drafts + 1, verify), *wider], step.scratch) if wider and verify is not None else None
        if step.kind not in ("chain", "lookup"):
            return None
        points = self._measured(step.kind, rows)
        if not points:
            chain = self.estimate(Step(step.drafts), rows) if step.lookup else None
            return None if chain is None else chain / 2
        plain = self.estimate(Step(), rows)
        if plain is not None:
            # The shortest there could be: passes of one row.
            points = [(0, (1 if step.lookup else 2) * plain), *points]
        below = [p for p in points if p[0] < step.drafts]
        above = [p for p in points if p[0] > step.drafts]
        if below and above:
            return _on_line([below[-1], above[0]], step.drafts)
        # Beyond the measured ones a pass costs at most what a longer one does, and at least what a shorter one did.
        return above[0][1] if above else below[-1][1]

    def _measured(self, kind: Kind, rows: int) -> list[tuple[int, float]]:
        """Return what was measured of a kind, by drafts, or by positions of the fused pass; in order."""
        if (rows, kind) not in self._points:
            seen = self._seen.get(rows, {})
            self._points[rows, kind] = sorted(
                (s.scratch if kind == "onepass" else s.drafts, median(times))
                for s, times in seen.items()
                if s.kind == kind
            )
        return self._points[rows, kind]

    def table(self) -> list[dict[str, float | int | str]]:
        """Return everything measured, one record per shape and number of rows."""
        return [
            {
                "kind": step.kind,
                "drafts": step.drafts,
                "nodes": step.nodes,
                "stops": step.stops,
                "rows": rows,
                "seconds": median(times),
            }
            for rows, steps in sorted(self._seen.items())
            for step, times in sorted(steps.items(), key=lambda item: repr(item[0]))
        ]


def _on_line(points: Sequence[tuple[int, float]], x: int) -> float:
    """Read a line through two or more points in order at x; past the last one it goes on, but never down."""
    right = min(max(bisect_right(points, x, key=lambda point: point[0]), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    if x1 == x0:
        return y1
    value = y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return value if x <= x1 else max(value, y1)


KINDS: tuple[Kind, ...] = ("chain", "tree", "onepass", "lookup")
"""Kinds of step that draft, in the order of a record's arrays."""

_SLOTS = 64
_TRIED, _KEPT = 0, 1
_CHAIN, _ONEPASS, _LOOKUP = (KINDS.index(kind) for kind in ("chain", "onepass", "lookup"))
_LENGTHS = 8


class Record:
    """How often each slot's draft was tried and kept, given that all before it were; by kind of step.

    "onepass" stands for drafts that a fused pass made ahead, whatever step verifies them; those that a one-pass step
    made in a pass of its own are a chain's. Old cycles fade. Arrays, because a planner asks before every cycle:
    `counts[tried or kept, kind, slot]`, and of fused passes `hits[tried or met, length, stops]`: how often acceptance
    stopped where they had drafted ahead, by the binary digits of their draft count and by `STOPS`.
    """

    __slots__ = ("counts", "fade", "hits")

    def __init__(self, *, slots: int = _SLOTS, fade: float = 0.95) -> None:
        self.counts: NDArray[np.float64] = np.zeros((2, len(KINDS), slots))
        self.hits: NDArray[np.float64] = np.zeros((2, _LENGTHS, len(STOPS)))
        self.fade = fade

    def relax(self) -> None:
        """Forget a little, as text moves on that no draft was tried on."""
        self.counts *= self.fade

    def add(self, kind: Kind, *, drafts: int, accepted: int) -> None:
        """Add one cycle."""
        tried_kept = self.counts[:, KINDS.index(kind)]
        tried_kept *= self.fade
        tried_kept[_TRIED, : min(accepted + 1, drafts)] += 1
        tried_kept[_KEPT, :accepted] += 1

    def stopped(self, step: Step, rank: int) -> None:
        """Add where a fused pass' acceptance stopped: at its stop number `rank` by likelihood, or at none of them.

        What would have been met with fewer stops is known as well, and with more of them if it was met.
        """
        length, asked = divmod(_cell(step), len(STOPS))
        told = slice(0, asked + 1 if rank >= step.stops else len(STOPS))
        tried_met = self.hits[:, length, told]
        tried_met *= self.fade
        tried_met[_TRIED] += 1
        tried_met[_KEPT] += np.array(STOPS[told]) > rank


def _cell(step: Step) -> int:
    """Return a one-pass step's place in the flattened `[lengths, stops]` of what was met."""
    length = min(step.drafts.bit_length(), _LENGTHS - 1)
    return length * len(STOPS) + bisect_right(STOPS, step.stops) - 1


def expected(
    records: Sequence[Record], prior: Record, *, slots: int = _SLOTS, ahead: bool = True
) -> NDArray[np.float64]:
    """Return the tokens each kind of step is expected to give each row by its number of drafts, the bonus included.

    A slot that a row hardly ever tried is taken to be worth what it is in `prior`, and one hardly ever tried there
    what all slots of the kind are. Drafts made ahead are measured by a chain's: a slot hardly ever tried is worth
    what the chain's is, less what being ahead costs in `prior`. They take a while to reckon, and are left out without
    `ahead`.

    Returns:
        Array `[rows, kinds, slots + 1]`, in the order of the kinds.
    """
    tried, kept = prior.counts
    usual = _rate(kept, tried, _rate(kept.sum(1), tried.sum(1), 0.5)[:, None])
    counts = np.array([record.counts[:, :, :slots] for record in records])
    rates = _rate(counts[:, _KEPT], counts[:, _TRIED], usual[:, :slots])
    if ahead:
        chain_M = usual[_CHAIN, :slots]
        loss_M = _rate(kept[_ONEPASS, :slots], tried[_ONEPASS, :slots], chain_M) / chain_M
        own_BM = np.minimum(rates[:, _CHAIN] * loss_M, 1.0)
        rates[:, _ONEPASS] = _rate(counts[:, _KEPT, _ONEPASS], counts[:, _TRIED, _ONEPASS], own_BM)
    tokens = np.ones((*rates.shape[:2], slots + 1))
    np.cumprod(rates, axis=2, out=tokens[:, :, 1:])
    whole: NDArray[np.float64] = tokens.cumsum(axis=2)
    return whole


def usually_met(prior: Record) -> NDArray[np.float64]:
    """Return the chance that a row stops where a fused pass has drafted ahead, `[lengths, stops]`.

    Unknown, it is taken to be one half for one stop point, and each further number of them to halve the misses.
    """
    tried, met = prior.hits
    usual, before = np.zeros(tried.shape), np.zeros(len(tried))
    for column in range(len(STOPS)):
        usual[:, column] = before = _rate(met[:, column], tried[:, column], (1 + before) / 2)
    return usual


def _rate(
    kept: NDArray[np.float64], tried: NDArray[np.float64], prior: NDArray[np.float64] | float
) -> NDArray[np.float64]:
    return (kept + 2.0 * prior) / (tried + 2.0)


@dataclass(slots=True)
class Experience:
    """What engines of one model have learned together: costs, what drafts were worth lately, what may be spent.

    Attributes:
        costs: seconds per step.
        worth: the record over all rows: a new row's prior.
        allowance: seconds that may be spent on looking at steps other than the best known one.
        turn: steps seen so far.
        used: the turn at which each kind was last used.
        usual_met: `usually_met` of the record over all rows.
    """

    costs: Costs = field(default_factory=Costs)
    worth: Record = field(default_factory=lambda: Record(fade=0.99))
    allowance: float | None = None
    turn: int = 0
    used: dict[Kind, int] = field(default_factory=dict)
    usual_met: NDArray[np.float64] = field(default_factory=lambda: usually_met(Record()))


class Planner:
    """Choose each step. One per engine; rows share costs and, as a prior, what other rows' drafts were worth.

    `auto` maximises expected tokens per second over the live rows. A one-pass step counts as what taking it for good
    gives: where acceptance stops at a place that it has drafted for, the next one needs no draft pass, but has to do
    with drafts made ahead. Kinds of step that are not in use are looked at again from an allowance, a small share of
    the time spent, so that looking for better costs a bounded part. A decision that has been confirmed stands for some
    turns, since deciding takes time as well. Without `may_fuse`, `auto` takes no one-pass steps.
    """

    STANDS = 4
    PROBE_SHARE = 0.02
    FIRST_PROBES = 4
    FIRST_TURNS = 64
    THINK_AHEAD_EVERY = 8

    def __init__(self, plan: Plan, *, block: int, experience: Experience | None = None, may_fuse: bool = True) -> None:
        self.plan = plan
        steps = plan.steps(block)
        self.steps = steps if may_fuse or len(steps) == 1 else tuple(step for step in steps if not step.stops)
        self.known = experience or Experience()
        self.copies = any(step.lookup for step in self.steps)
        self._kinds: list[Kind] = [step.kind for step in self.steps]
        self._drafts_S = np.array([min(step.drafts, _SLOTS) for step in self.steps])
        self._slots = int(self._drafts_S.max())
        # A step's place in a table of expected tokens, kind after kind; no drafts give one token in any of them.
        kinds = np.array([KINDS.index(kind) if kind != "plain" else 0 for kind in self._kinds])
        self._place_S = kinds * (self._slots + 1) + self._drafts_S
        self._chains, self._fused = (
            slice(self._kinds.index(kind), self._kinds.index(kind) + self._kinds.count(kind))
            if kind in self._kinds
            else slice(0, 0)
            for kind in ("chain", "onepass")
        )
        self._longest = max(self._chains.stop - 1, 0)
        fused = self.steps[self._fused]
        self._hit_F = np.array([_cell(step) for step in fused], dtype=int)
        self._certain_F = np.array([step.stops > step.drafts for step in fused], dtype=bool)
        # Measured before one-pass steps are weighed: those of the widest's drafts with two stops, and the widest.
        widest = max(fused, key=lambda step: step.scratch, default=Step())
        few = [step for step in fused if step.drafts == widest.drafts and step.stops <= 2]
        self._ends = [self.steps.index(step) for step in (*few[-1:], widest) if step.stops]
        self._last, self._situation = Step(), tuple[int, ...]()
        self._stands = self._thought_ahead = 0

    @property
    def scratch(self) -> int:
        """Cache positions past a row's length that any step of the plan writes."""
        return max(step.scratch for step in self.steps)

    @property
    def first_drafts(self) -> int:
        """How many drafts the pass that reads a prompt should make for the first step, as far as can be told.

        0 where the step may need none, and under plans that ask for a draft pass in every cycle.
        """
        if len(self.steps) == 1:
            return self.steps[0].drafts if self.steps[0].stops else 0
        return self._slots if self._last.kind in ("chain", "onepass") or self.known.turn == 0 else 0

    def choose(self, rows: Sequence[Record], found: Sequence[bool] | None = None, *, ready: int = 0) -> Step:
        """Return the next step for rows with these records.

        Args:
            rows: their records.
            found: whose texts have something to copy.
            ready: drafts that the pass before has made for every row; chains and one-pass steps use them.
        """
        if len(self.steps) == 1:
            return self.steps[0]
        situation = (len(rows), ready, *(found or ()))
        if self._stands and situation == self._situation:
            self._stands -= 1
            return self._last
        step = self._decide(rows, found, ready)
        confirmed = (step, situation) == (self._last, self._situation) and self.known.turn >= self.FIRST_TURNS
        self._stands = self.STANDS if confirmed else 0
        self._last, self._situation = step, situation
        return step

    def _decide(self, rows: Sequence[Record], found: Sequence[bool] | None, ready: int) -> Step:
        known = self.known
        basis = known.costs.basis(len(rows))
        cost_S, draft_S, verify_S = known.costs.estimates(self.steps, basis)
        for needed in (self._longest, 0):
            if np.isnan(cost_S[needed]):
                return self.steps[needed]
            if known.allowance is None:
                known.allowance = self.FIRST_PROBES * float(cost_S[needed])
        # One-pass steps take a while to reckon: those that are not in use need not be thought of each time.
        ahead = ready > 0 or known.used.get("onepass") == known.turn
        since = known.turn - self._thought_ahead
        ahead = ahead or known.turn < self.FIRST_TURNS or since >= self.THINK_AHEAD_EVERY
        self._thought_ahead = known.turn if ahead else self._thought_ahead
        token_BKM = expected(rows, known.worth, slots=self._slots, ahead=ahead)
        nothing = [row for row, hit in enumerate(found or [False] * len(rows)) if not hit]
        token_BKM[nothing, _LOOKUP] = 1.0
        token_KM = token_BKM.sum(axis=0)
        speed_S = token_KM.take(self._place_S) / np.maximum(cost_S, 1e-9)
        fused = self._fused
        speed_S[fused] = self._lasting(rows, token_KM, cost_S[fused], draft_S[fused]) if ahead else 0.0
        speed_S[np.isnan(speed_S)] = 0.0
        best = int(speed_S.argmax())
        if ready and self._kinds[best] != "onepass":
            drafts_C = self._drafts_S[self._chains]
            speed_C = token_KM[_ONEPASS, drafts_C] / np.maximum(verify_S[self._chains], 1e-9)
            speed_C[drafts_C > ready] = 0.0
            if speed_C.max() > speed_S[best]:
                return self.steps[self._chains.start + int(speed_C.argmax())]
        other = self._probe(best, basis, speed_S, cost_S, draft_S, copies=len(nothing) < len(rows), ahead=ahead)
        return self.steps[best] if other is None else self.steps[other]

    def _lasting(
        self,
        rows: Sequence[Record],
        token_KM: NDArray[np.float64],
        cost_F: NDArray[np.float64],
        draft_F: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Return tokens per second of each one-pass step, taken again and again."""
        tried_met = np.array([record.hits for record in rows]).reshape(len(rows), 2, -1)[:, :, self._hit_F]
        met_F = _rate(tried_met[:, _KEPT], tried_met[:, _TRIED], self.known.usual_met.take(self._hit_F)).prod(axis=0)
        miss_F = np.where(self._certain_F, 0.0, 1 - met_F)
        drafts_F = self._drafts_S[self._fused]
        ahead_F, known_F = token_KM[_ONEPASS, drafts_F], token_KM[_CHAIN, drafts_F]
        cycle_F = np.maximum(cost_F + miss_F * draft_F, 1e-9)
        speed_F: NDArray[np.float64] = (ahead_F + miss_F * (known_F - ahead_F)) / cycle_F
        return speed_F

    def observe(
        self,
        step: Step,
        rows: Sequence[Record],
        accepted: Sequence[int],
        seconds: float,
        found: Sequence[bool] | None = None,
        *,
        drew: bool = True,
        blind: Sequence[bool] | None = None,
        ranks: Sequence[int] | None = None,
    ) -> None:
        """Learn from a finished step: what each row's drafts were worth and what it cost.

        Args:
            step: what was done.
            rows: the records of the rows it was done to.
            accepted: drafts that each row kept.
            seconds: how long it took.
            found: as in `choose`.
            drew: whether its drafts took a pass of their own.
            blind: whose drafts were made without knowing the token before them; without, all of those not drawn.
            ranks: after a fused pass, at which of its stops by likelihood each row stopped; `stops` for none of them.
        """
        known = self.known
        known.costs.observe(*self._priced(step, len(rows), seconds, drew=drew))
        known.turn += 1
        known.used[step.kind] = known.turn
        if known.allowance is not None and len(self.steps) > 1:
            known.allowance += seconds * self.PROBE_SHARE
        tried = found if step.lookup and found is not None else [step.kind != "plain"] * len(rows)
        blind = blind or [not drew] * len(rows)
        for record, kept, drafted, unknowing in zip(rows, accepted, tried, blind, strict=True):
            if not drafted:
                record.relax()
            else:
                kind: Kind = step.kind
                if kind in ("chain", "onepass"):
                    kind = "onepass" if unknowing else "chain"
                record.add(kind, drafts=step.drafts, accepted=kept)
                known.worth.add(kind, drafts=step.drafts, accepted=kept)
        if step.kind == "onepass":
            for record, rank in zip(rows, ranks or [step.stops] * len(rows), strict=True):
                record.stopped(step, rank)
                known.worth.stopped(step, rank)
            known.usual_met = usually_met(known.worth)

    def _priced(self, step: Step, rows: int, seconds: float, *, drew: bool) -> tuple[Step, int, float]:
        """Return what a measured time tells the cost of: a chain that did not draw is a verification, as a copy is."""
        if step.kind == "chain" and not drew:
            return Step(step.drafts, lookup=True), rows, seconds
        draft = self.known.costs.draft(step.drafts, rows) if step.kind == "onepass" and drew else None
        # A fused pass holds both the verification and a draft, so it is never the smaller half.
        return step, rows, seconds if draft is None else max(seconds - draft, seconds / 2)

    def _probe(
        self,
        best: int,
        basis: int,
        speed_S: NDArray[np.float64],
        cost_S: NDArray[np.float64],
        draft_S: NDArray[np.float64],
        *,
        copies: bool,
        ahead: bool,
    ) -> int | None:
        """Return another kind of step at its best length, when the allowance covers what it costs.

        Kinds never measured come first; from plain decoding the most promising one is looked at every other time.
        One-pass steps are looked at, whatever is best, until two of their shapes are measured: the others lie between.
        """
        known = self.known
        if known.allowance is None or known.allowance < cost_S[0]:
            return None
        ends = [i for i in self._ends if not known.costs.measured(self.steps[i], basis)]
        kinds = {k for k in self._kinds if copies or k != "lookup"} - {"plain"}
        if not ends or self._kinds[best] != "onepass":
            kinds -= {self._kinds[best]}
        if not kinds:
            return None
        speed = {kind: max((speed_S[i], i) for i, k in enumerate(self._kinds) if k == kind) for kind in kinds}
        order = sorted(kinds, key=lambda kind: (known.used.get(kind, 0), kind))
        kind = order[0]
        if self._kinds[best] == "plain" and speed[kind][0] and known.turn % 2:
            kind = max(speed, key=lambda kind: speed[kind])
        if kind == "onepass" and not ahead:
            return None  # it is weighed before long
        index = ends[0] if kind == "onepass" and ends else speed[kind][1]
        cost = float(3 * cost_S[0] if np.isnan(cost_S[index]) else cost_S[index])
        if kind == "onepass":
            # It drafts and verifies what a chain would have; what it costs beyond that is only what it drafts ahead.
            step = self.steps[index]
            fused = (1 + step.stops) * draft_S[index] if np.isnan(cost_S[index]) else cost_S[index]
            chain = self._chains.start + int((self._drafts_S[self._chains] <= step.drafts).sum()) - 1
            earned = speed_S[chain] * cost_S[chain] / speed_S[best]
            cost = max(float(draft_S[index] + fused - earned), float(cost_S[0]))
        elif self._kinds[best] == "onepass":
            cost += float(draft_S[best])  # what was drafted ahead is lost
        if known.allowance < cost:
            return None
        known.allowance -= cost
        return index
