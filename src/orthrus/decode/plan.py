"""What each cycle does: a plain step, a chain of drafts, a tree of them, or one pass that verifies and drafts at once.

`parse` reads what was asked for; a `Planner` decides step by step from what was accepted lately and from what steps
were measured to cost. Decisions are a pure function of those numbers: the clock is the engine's, and no plan ever
changes a text. Knows neither model nor tensors.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from orthrus.errors import ConfigError

Kind = Literal["plain", "chain", "tree", "onepass"]

LADDER = (1, 2, 3, 4, 6, 8, 11, 15, 23, 31, 47, 63)
"""Draft counts `auto` chooses among, up to the block it was trained for."""

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
    """

    drafts: int = 0
    nodes: int = 0
    stops: int = 0

    @property
    def kind(self) -> Kind:
        """Return the step's kind."""
        if self.drafts == 0:
            return "plain"
        return "tree" if self.nodes else "onepass" if self.stops else "chain"

    @property
    def scratch(self) -> int:
        """Cache positions past a row's length that the step writes at most."""
        verify = 1 + max(self.drafts, self.nodes)
        return verify + self.stops * (self.drafts + 1)


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for: always the same step, or `auto`.

    Attributes:
        name: "auto", "ar", "full", "fixed:K", "tree:N", "onepass" or "onepass:M".
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
        return (Step(), *chains, Step(block - 1, nodes=_TREE_NODES), Step(block - 1, stops=min(_ONEPASS_STOPS, block)))

    def _fitted(self, step: Step, block: int) -> Step:
        if step.drafts >= block:
            raise ConfigError(
                f"plan {self.name!r} asks for blocks of {step.drafts + 1}, this view was trained for at most {block}"
            )
        drafts = block - 1 if step.drafts < 0 else step.drafts
        return Step(drafts, step.nodes, min(step.stops, drafts + 1))


_FULL = -1  # stands for "as many as the view was trained for" inside a parsed plan only
_ALL = 1 << 30


def parse(text: str) -> Plan:
    """Read a plan's name; raises ConfigError for anything that is not one."""
    kind, _, number = text.partition(":")
    value = int(number) if number.isdigit() else 0
    if text in ("auto", "ar", "full", "onepass"):
        steps = {"auto": None, "ar": Step(), "full": Step(_FULL), "onepass": Step(_FULL, stops=_ALL)}
        return Plan(text, steps[text])
    if kind == "fixed" and value >= 2:
        return Plan(text, Step(value - 1))
    if kind == "tree" and value >= 1:
        return Plan(text, Step(_FULL, nodes=value))
    if kind == "onepass" and value >= 1:
        return Plan(text, Step(_FULL, stops=value))
    raise ConfigError(
        f"a plan is 'auto', 'ar', 'full', 'fixed:K' (K of at least 2), 'tree:N', 'onepass' or 'onepass:M', found {text!r}"
    )


class Costs:
    """Seconds per step, as measured: the median of the last few of each shape, first runs (warm-up) left out."""

    def __init__(self, *, window: int = 9) -> None:
        self._seen: dict[tuple[Step, int], deque[float]] = {}
        self._runs: dict[tuple[Step, int], int] = {}
        self._window = window

    def observe(self, step: Step, rows: int, seconds: float) -> None:
        """Add one measured step over so many rows."""
        key = (step, rows)
        self._runs[key] = self._runs.get(key, 0) + 1
        if self._runs[key] > 1:
            self._seen.setdefault(key, deque(maxlen=self._window)).append(seconds)

    def known(self, step: Step, rows: int) -> float | None:
        """Return what this very step costs, or None when it has not been measured yet."""
        seen = self._seen.get((step, rows))
        return median(seen) if seen else None

    def runs(self, step: Step, rows: int) -> int:
        """Return how often a step was run."""
        return self._runs.get((step, rows), 0)

    def estimate(self, step: Step, rows: int) -> float | None:
        """Return the cost of a step, by interpolation between chains of other lengths where it was not measured."""
        exact = self.known(step, rows)
        if exact is not None or step.kind in ("tree", "onepass"):
            return exact
        points = sorted(
            (s.drafts, median(seen)) for (s, r), seen in self._seen.items() if r == rows and s.kind == "chain"
        )
        if not points or step.kind == "plain":
            return None
        below = [p for p in points if p[0] < step.drafts]
        above = [p for p in points if p[0] > step.drafts]
        if below and above:
            (x0, y0), (x1, y1) = below[-1], above[0]
            return y0 + (y1 - y0) * (step.drafts - x0) / (x1 - x0)
        # Beyond the measured ones a pass costs at most what the longer one does, and at least what the shorter one did.
        return above[0][1] if above else below[-1][1]

    def table(self) -> list[dict[str, float | int | str]]:
        """Return everything measured, one record per shape and number of rows."""
        return [
            {
                "kind": s.kind,
                "drafts": s.drafts,
                "nodes": s.nodes,
                "stops": s.stops,
                "rows": rows,
                "seconds": median(seen),
            }
            for (s, rows), seen in sorted(self._seen.items(), key=lambda item: (item[0][1], repr(item[0][0])))
        ]


@dataclass(slots=True)
class Record:
    """How often each slot's draft was kept, given that all before it were; old cycles fade."""

    tried: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    fade: float = 0.9

    def add(self, *, drafts: int, accepted: int) -> None:
        """Add one cycle."""
        grow = drafts - len(self.tried)
        self.tried = [t * self.fade for t in self.tried] + [0.0] * grow
        self.kept = [k * self.fade for k in self.kept] + [0.0] * grow
        for j in range(min(accepted + 1, drafts)):
            self.tried[j] += 1
            self.kept[j] += j < accepted

    def expected(self, drafts: int, prior: "Record | None" = None) -> float:
        """Return the tokens a chain of so many drafts is expected to give, the bonus included."""
        general = _rate(sum(self.kept), sum(self.tried), 0.5 if prior is None else prior.rate)
        tokens = run = 1.0
        for j in range(drafts):
            tried = self.tried[j] if j < len(self.tried) else 0.0
            kept = self.kept[j] if j < len(self.kept) else 0.0
            run *= _rate(kept, tried, general)
            tokens += run
        return tokens

    @property
    def rate(self) -> float:
        """The share of all drafts kept."""
        return _rate(sum(self.kept), sum(self.tried), 0.5)


def _rate(kept: float, tried: float, prior: float, weight: float = 1.0) -> float:
    return (kept + prior * weight) / (tried + weight)


class Planner:
    """Choose each step. One per engine; rows share costs and, as a prior, what other rows' drafts were worth.

    `auto` maximises expected tokens per second over the live rows. A kind of step that has not been measured is tried
    only from an allowance: a small share of the time spent since, so that looking for better costs a bounded part.
    """

    PROBE_SHARE = 0.02

    def __init__(self, plan: Plan, *, block: int, costs: Costs | None = None) -> None:
        self.plan = plan
        self.steps = plan.steps(block)
        self.costs = costs or Costs()
        self.shared: dict[Kind, Record] = {}
        self.allowance = 0.0

    @property
    def scratch(self) -> int:
        """Cache positions past a row's length that any step of the plan writes."""
        return max(step.scratch for step in self.steps)

    def choose(self, rows: Sequence[dict[Kind, Record]]) -> Step:
        """Return the next step for rows with these records."""
        if len(self.steps) == 1:
            return self.steps[0]
        count = len(rows)
        plain = self.costs.known(self.steps[0], count)
        if plain is None:
            return self.steps[0]
        chains = [s for s in self.steps if s.kind == "chain"]
        if all(self.costs.known(s, count) is None for s in chains):
            return chains[-1]
        scored = {s: self._speed(s, rows, count) for s in self.steps}
        best = max(self.steps, key=lambda s: scored[s] or 0.0)
        probe = self._probe(best, rows, count, plain)
        return probe or best

    def observe(self, step: Step, rows: Sequence[dict[Kind, Record]], accepted: Sequence[int], seconds: float) -> None:
        """Learn from a finished step: what each row's drafts were worth and what it cost."""
        self.costs.observe(step, len(rows), seconds)
        self.allowance += seconds * self.PROBE_SHARE
        if step.kind == "plain":
            return
        for record, kept in zip(rows, accepted, strict=True):
            for place in (record, self.shared):
                place.setdefault(step.kind, Record(fade=0.9 if place is record else 0.98)).add(
                    drafts=step.drafts, accepted=kept
                )

    def _speed(self, step: Step, rows: Sequence[dict[Kind, Record]], count: int) -> float | None:
        """Return expected tokens per second, or None for a step whose cost or worth nobody knows."""
        cost = self.costs.estimate(step, count)
        if cost is None:
            return None
        return sum(self._expected(step, row) for row in rows) / max(cost, 1e-9)

    def _expected(self, step: Step, row: dict[Kind, Record]) -> float:
        if step.kind == "plain":
            return 1.0
        shared = self.shared.get(step.kind)
        own = row.get(step.kind)
        if own is None:
            return (shared or Record()).expected(step.drafts)
        return own.expected(step.drafts, prior=shared)

    def _probe(self, best: Step, rows: Sequence[dict[Kind, Record]], count: int, plain: float) -> Step | None:
        """Return the step worth another look, when the allowance covers what it may lose."""
        others = [s for s in self.steps if s.kind not in ("plain", best.kind) or (best.kind == "plain" and s.drafts)]
        for step in sorted(others, key=lambda s: self._looked(s, count)):
            cost = self.costs.estimate(step, count) or plain * 4
            if self.allowance >= cost:
                self.allowance = 0.0
                return step
        return None

    def _looked(self, step: Step, count: int) -> tuple[int, int]:
        """Order steps by how little is known of them; long chains say more than short ones."""
        return (self.costs.runs(step, count), -step.drafts)
