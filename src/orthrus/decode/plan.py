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
        "a plan is 'auto', 'ar', 'full', 'fixed:K' (K of at least 2), 'tree:N', 'onepass' or 'onepass:M', "
        f"found {text!r}"
    )


class Costs:
    """Seconds per step, as measured: the median of the last few of each shape, first runs (warm-up) left out."""

    def __init__(self, *, window: int = 9) -> None:
        self._seen: dict[int, dict[Step, deque[float]]] = {}
        self._runs: dict[tuple[int, Step], int] = {}
        self._window = window

    def observe(self, step: Step, rows: int, seconds: float) -> None:
        """Add one measured step over so many rows."""
        self._runs[rows, step] = self._runs.get((rows, step), 0) + 1
        if self._runs[rows, step] > 1:
            self._seen.setdefault(rows, {}).setdefault(step, deque(maxlen=self._window)).append(seconds)

    def basis(self, rows: int) -> int:
        """Return the number of rows whose costs to go by: this one, or the nearest where steps can be compared."""
        known = [r for r, steps in self._seen.items() if Step() in steps and any(s.kind == "chain" for s in steps)]
        return min(known, key=lambda r: max(r, rows) / min(r, rows), default=rows)

    def estimate(self, step: Step, rows: int) -> float | None:
        """Return a step's cost as measured, for chains by interpolation over their length; None where unknown."""
        seen = self._seen.get(rows, {})
        if step in seen:
            return median(seen[step])
        points = sorted((s.drafts, median(times)) for s, times in seen.items() if s.kind == "chain")
        if step.kind != "chain" or not points:
            return None
        if Step() in seen:
            points.insert(0, (0, 2 * median(seen[Step()])))  # the shortest chain there could be: two passes of one row
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


@dataclass(slots=True)
class Record:
    """How often each slot's draft was kept, given that all before it were; old cycles fade."""

    tried: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    fade: float = 0.95

    def relax(self) -> None:
        """Forget a little, as text moves on that no draft was tried on."""
        self.tried = [t * self.fade for t in self.tried]
        self.kept = [k * self.fade for k in self.kept]

    def add(self, *, drafts: int, accepted: int) -> None:
        """Add one cycle."""
        self.relax()
        self.tried += [0.0] * (drafts - len(self.tried))
        self.kept += [0.0] * (drafts - len(self.kept))
        for j in range(min(accepted + 1, drafts)):
            self.tried[j] += 1
            self.kept[j] += j < accepted

    def expected(self, drafts: int, prior: "Record | None" = None) -> float:
        """Return the tokens a chain of so many drafts is expected to give, the bonus included.

        A slot that was hardly ever tried is taken to be worth what it is in `prior`, or what all slots are.
        """
        tokens = run = 1.0
        for j in range(drafts):
            run *= self.slot_rate(j, prior)
            tokens += run
        return tokens

    def slot_rate(self, slot: int, prior: "Record | None" = None) -> float:
        """Return how often a slot's draft is kept once all before it were."""
        general = _rate(sum(self.kept), sum(self.tried), 0.5) if prior is None else prior.slot_rate(slot)
        known = slot < len(self.tried)
        return _rate(self.kept[slot] if known else 0.0, self.tried[slot] if known else 0.0, general)


def _rate(kept: float, tried: float, prior: float, weight: float = 2.0) -> float:
    return (kept + prior * weight) / (tried + weight)


@dataclass(slots=True)
class Experience:
    """What engines of one model have learned together: costs, what drafts were worth lately, what may be spent.

    Attributes:
        costs: seconds per step.
        worth: records over all rows, by kind of step: a new row's prior.
        allowance: seconds that may be spent on looking at steps other than the best known one.
        turn: steps seen so far.
        used: the turn at which each kind was last used.
    """

    costs: Costs = field(default_factory=Costs)
    worth: dict[Kind, Record] = field(default_factory=dict)
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

    @property
    def scratch(self) -> int:
        """Cache positions past a row's length that any step of the plan writes."""
        return max(step.scratch for step in self.steps)

    def choose(self, rows: Sequence[dict[Kind, Record]]) -> Step:
        """Return the next step for rows with these records."""
        if len(self.steps) == 1:
            return self.steps[0]
        costs = self.known.costs
        basis = costs.basis(len(rows))
        plain, longest = self.steps[0], max((s for s in self.steps if s.kind == "chain"), key=lambda s: s.drafts)
        for needed in (longest, plain):
            cost = costs.estimate(needed, basis)
            if cost is None:
                return needed
            if self.known.allowance is None:
                self.known.allowance = self.FIRST_PROBES * cost
        speed = {step: self._speed(step, rows, basis) for step in self.steps}
        best = max(self.steps, key=speed.__getitem__)
        return self._probe(best, speed, basis) or best

    def observe(self, step: Step, rows: Sequence[dict[Kind, Record]], accepted: Sequence[int], seconds: float) -> None:
        """Learn from a finished step: what each row's drafts were worth and what it cost."""
        known = self.known
        known.costs.observe(step, len(rows), seconds)
        known.turn += 1
        known.used[step.kind] = known.turn
        if known.allowance is not None:
            known.allowance += seconds * self.PROBE_SHARE
        if step.kind == "plain":
            for record in rows:
                for kind in record:
                    record[kind].relax()
            return
        worth = known.worth.setdefault(step.kind, Record(fade=0.99))
        for record, kept in zip(rows, accepted, strict=True):
            worth.add(drafts=step.drafts, accepted=kept)
            record.setdefault(step.kind, Record()).add(drafts=step.drafts, accepted=kept)

    def _speed(self, step: Step, rows: Sequence[dict[Kind, Record]], basis: int) -> float:
        """Return expected tokens per second; 0 for a step whose cost nobody knows."""
        cost = self.known.costs.estimate(step, basis)
        return 0.0 if cost is None else sum(self._expected(step, row) for row in rows) / max(cost, 1e-9)

    def _expected(self, step: Step, row: dict[Kind, Record]) -> float:
        if step.kind == "plain":
            return 1.0
        return row.get(step.kind, Record()).expected(step.drafts, prior=self.known.worth.get(step.kind))

    def _probe(self, best: Step, speed: dict[Step, float], basis: int) -> Step | None:
        """Return another kind of step at its best length, when the allowance covers what it costs.

        Kinds never measured come first; from plain decoding the most promising one is looked at every other time.
        """
        costs, used = self.known.costs, self.known.used
        kinds = sorted({step.kind for step in self.steps} - {"plain", best.kind}, key=lambda k: (used.get(k, 0), k))
        if not kinds:
            return None
        candidates = [max((s for s in self.steps if s.kind == kind), key=speed.__getitem__) for kind in kinds]
        step = candidates[0]
        if best.kind == "plain" and speed[step] and self.known.turn % 2:
            step = max(candidates, key=speed.__getitem__)
        cost = costs.estimate(step, basis) or 3 * (costs.estimate(self.steps[0], basis) or 0.0)
        if self.known.allowance is None or self.known.allowance < cost:
            return None
        self.known.allowance -= cost
        return step
