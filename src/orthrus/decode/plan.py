"""What each cycle does: a plain step, a chain of drafts, a tree of them, a copy from the text, or one fused pass.

`parse` reads what was asked for; a `Planner` decides step by step from what was accepted lately and from what steps
were measured to cost. Decisions are a pure function of those numbers: the clock is the engine's, and no plan ever
changes a text. Knows neither model nor tensors.
"""

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

_TREE_NODES = 31
_ONEPASS_STOPS = 2


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
        return (Step(), *chains, tree, Step(block - 1, stops=min(_ONEPASS_STOPS, block)), *copies)

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
    """Seconds per step, as measured: the median of the last few of each shape, first runs (warm-up) left out."""

    def __init__(self, *, window: int = 9) -> None:
        self._seen: dict[int, dict[Step, deque[float]]] = {}
        self._runs: dict[tuple[int, Step], int] = {}
        self._window = window
        self._vectors: dict[tuple[int, tuple[Step, ...]], NDArray[np.float64]] = {}

    def observe(self, step: Step, rows: int, seconds: float) -> None:
        """Add one measured step over so many rows."""
        runs = self._runs[rows, step] = self._runs.get((rows, step), 0) + 1
        if runs > 1:
            self._seen.setdefault(rows, {}).setdefault(step, deque(maxlen=self._window)).append(seconds)
        if runs <= self._window or runs % self._window == 0:
            self._vectors.clear()

    def basis(self, rows: int) -> int:
        """Return the number of rows whose costs to go by: this one, or the nearest where steps can be compared."""
        known = [r for r, steps in self._seen.items() if Step() in steps and any(s.kind == "chain" for s in steps)]
        return min(known, key=lambda r: max(r, rows) / min(r, rows), default=rows)

    def estimates(self, steps: tuple[Step, ...], rows: int) -> NDArray[np.float64]:
        """Return `estimate` of each step, nan where unknown; reckoned anew once per window of observations."""
        if (rows, steps) not in self._vectors:
            costs = [self.estimate(step, rows) for step in steps]
            self._vectors[rows, steps] = np.array([np.nan if cost is None else cost for cost in costs])
        return self._vectors[rows, steps]

    def estimate(self, step: Step, rows: int) -> float | None:
        """Return a step's cost as measured, by interpolation over the length of chains and copies; None where unknown.

        A copy that was never measured is taken to cost half of what a chain of its length does: one of two passes.
        """
        seen = self._seen.get(rows, {})
        if step in seen:
            return median(seen[step])
        if step.kind not in ("chain", "lookup"):
            return None
        points = sorted((s.drafts, median(times)) for s, times in seen.items() if s.kind == step.kind)
        if not points:
            chain = self.estimate(Step(step.drafts), rows) if step.lookup else None
            return None if chain is None else chain / 2
        if Step() in seen:
            # The shortest there could be: passes of one row.
            points.insert(0, (0, (1 if step.lookup else 2) * median(seen[Step()])))
        below = [p for p in points if p[0] < step.drafts]
        above = [p for p in points if p[0] > step.drafts]
        if below and above:
            (x0, y0), (x1, y1) = below[-1], above[0]
            return y0 + (y1 - y0) * (step.drafts - x0) / (x1 - x0)
        # Beyond the measured ones a pass costs at most what a longer one does, and at least what a shorter one did.
        return above[0][1] if above else below[-1][1]

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


KINDS: tuple[Kind, ...] = ("chain", "tree", "onepass", "lookup")
"""Kinds of step that draft, in the order of a record's arrays."""

_SLOTS = 64
_TRIED, _KEPT = 0, 1
_LOOKUP = KINDS.index("lookup")


class Record:
    """How often each slot's draft was tried and kept, given that all before it were; by kind of step.

    Old cycles fade. Arrays, because a planner asks before every cycle: `counts[tried or kept, kind, slot]`.
    """

    __slots__ = ("counts", "fade", "kinds")

    def __init__(self, *, slots: int = _SLOTS, fade: float = 0.95) -> None:
        self.counts: NDArray[np.float64] = np.zeros((2, len(KINDS), slots))
        self.fade = fade
        self.kinds: set[Kind] = set()

    def relax(self) -> None:
        """Forget a little, as text moves on that no draft was tried on."""
        self.counts *= self.fade

    def add(self, kind: Kind, *, drafts: int, accepted: int) -> None:
        """Add one cycle."""
        self.kinds.add(kind)
        tried_kept = self.counts[:, KINDS.index(kind)]
        tried_kept *= self.fade
        tried_kept[_TRIED, : min(accepted + 1, drafts)] += 1
        tried_kept[_KEPT, :accepted] += 1


def expected(records: Sequence[Record], prior: Record, *, slots: int = _SLOTS) -> NDArray[np.float64]:
    """Return the tokens each kind of step is expected to give each row by its number of drafts, the bonus included.

    A slot that a row hardly ever tried is taken to be worth what it is in `prior`, and one hardly ever tried there
    what all slots of the kind are.

    Returns:
        Array `[rows, kinds, slots + 1]`, in the order of the kinds.
    """
    tried, kept = prior.counts
    usual = _rate(kept, tried, _rate(kept.sum(1), tried.sum(1), 0.5)[:, None])
    counts = np.array([record.counts[:, :, :slots] for record in records])
    rates = _rate(counts[:, _KEPT], counts[:, _TRIED], usual[:, :slots])
    tokens = np.ones((*rates.shape[:2], slots + 1))
    np.cumprod(rates, axis=2, out=tokens[:, :, 1:])
    return tokens.cumsum(axis=2)


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
    """

    costs: Costs = field(default_factory=Costs)
    worth: Record = field(default_factory=lambda: Record(fade=0.99))
    allowance: float | None = None
    turn: int = 0
    used: dict[Kind, int] = field(default_factory=dict)


class Planner:
    """Choose each step. One per engine; rows share costs and, as a prior, what other rows' drafts were worth.

    `auto` maximises expected tokens per second over the live rows. Kinds of step that are not in use are looked at
    again from an allowance, a small share of the time spent, so that looking for better costs a bounded part.
    """

    PROBE_SHARE = 0.02
    FIRST_PROBES = 4

    def __init__(self, plan: Plan, *, block: int, experience: Experience | None = None) -> None:
        self.plan = plan
        self.steps = plan.steps(block)
        self.known = experience or Experience()
        self.copies = any(step.lookup for step in self.steps)
        self._kinds: list[Kind] = [step.kind for step in self.steps]
        drafts = [min(step.drafts, _SLOTS) for step in self.steps]
        self._slots = max(drafts)
        # A step's place in a table of expected tokens, kind after kind; no drafts give one token in any of them.
        kinds = [KINDS.index(kind) if kind != "plain" else 0 for kind in self._kinds]
        self._place_S = np.array([k * (self._slots + 1) + m for k, m in zip(kinds, drafts, strict=True)])
        self._longest = max(range(len(self.steps)), key=lambda i: (self._kinds[i] == "chain", drafts[i]))

    @property
    def scratch(self) -> int:
        """Cache positions past a row's length that any step of the plan writes."""
        return max(step.scratch for step in self.steps)

    def choose(self, rows: Sequence[Record], found: Sequence[bool] | None = None) -> Step:
        """Return the next step for rows with these records; `found` says whose texts have something to copy."""
        if len(self.steps) == 1:
            return self.steps[0]
        known = self.known
        cost_S = known.costs.estimates(self.steps, known.costs.basis(len(rows)))
        for needed in (self._longest, 0):
            if np.isnan(cost_S[needed]):
                return self.steps[needed]
            if known.allowance is None:
                known.allowance = self.FIRST_PROBES * float(cost_S[needed])
        token_BKM = expected(rows, known.worth, slots=self._slots)
        nothing = [row for row, hit in enumerate(found or [False] * len(rows)) if not hit]
        token_BKM[nothing, _LOOKUP] = 1.0
        speed_S = token_BKM.sum(axis=0).take(self._place_S) / np.maximum(cost_S, 1e-9)
        speed_S[np.isnan(cost_S)] = 0.0
        best = int(speed_S.argmax())
        return self._probe(best, speed_S, cost_S, copies=len(nothing) < len(rows)) or self.steps[best]

    def observe(
        self,
        step: Step,
        rows: Sequence[Record],
        accepted: Sequence[int],
        seconds: float,
        found: Sequence[bool] | None = None,
    ) -> None:
        """Learn from a finished step: what each row's drafts were worth and what it cost; `found` as in `choose`."""
        known = self.known
        known.costs.observe(step, len(rows), seconds)
        known.turn += 1
        known.used[step.kind] = known.turn
        if known.allowance is not None and len(self.steps) > 1:
            known.allowance += seconds * self.PROBE_SHARE
        tried = found if step.lookup and found is not None else [step.kind != "plain"] * len(rows)
        for record, kept, drafted in zip(rows, accepted, tried, strict=True):
            if not drafted:
                record.relax()
            else:
                record.add(step.kind, drafts=step.drafts, accepted=kept)
                known.worth.add(step.kind, drafts=step.drafts, accepted=kept)

    def _probe(
        self, best: int, speed_S: NDArray[np.float64], cost_S: NDArray[np.float64], *, copies: bool
    ) -> Step | None:
        """Return another kind of step at its best length, when the allowance covers what it costs.

        Kinds never measured come first; from plain decoding the most promising one is looked at every other time.
        """
        known = self.known
        if known.allowance is None or known.allowance < cost_S[0]:
            return None
        kinds = {k for k in self._kinds if copies or k != "lookup"} - {"plain", self._kinds[best]}
        if not kinds:
            return None
        speed = {kind: max((speed_S[i], i) for i, k in enumerate(self._kinds) if k == kind) for kind in kinds}
        order = sorted(kinds, key=lambda kind: (known.used.get(kind, 0), kind))
        _, index = speed[order[0]]
        if self._kinds[best] == "plain" and speed_S[index] and known.turn % 2:
            _, index = max(speed.values())
        cost = float(3 * cost_S[0] if np.isnan(cost_S[index]) else cost_S[index])
        if known.allowance < cost:
            return None
        known.allowance -= cost
        return self.steps[index]
