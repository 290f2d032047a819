"""What each cycle may do: a plain step, a chain of drafts, a tree of them, a copy from the text, or one fused pass.

`parse` reads what was asked for; `planner` decides where that is left open. No plan ever changes a text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from orthrus.errors import ConfigError

Kind = Literal["plain", "chain", "tree", "onepass", "lookup"]

WEIGHED: frozenset[Kind] = frozenset(("tree", "onepass", "lookup"))
"""Kinds that `auto` weighs besides plain steps and chains, from which it reckons what the others cost."""

LADDER = (1, 2, 3, 4, 6, 8, 11, 15, 23, 31, 47, 63)
"""Draft counts `auto` chooses among, up to the block it was trained for."""

LOOKUPS = (3, 7, 15, 31, 63)
"""Numbers of tokens `auto` may copy, up to the same."""

FUSED = (3, 7, 15, 31, 63)
"""Draft counts `auto` may take one pass a cycle with, and the longest there is."""

STOPS = (1, 2, 4, 8)
"""Numbers of stop points of such passes."""

_FUSED_ROWS = 160
"""Positions of such a pass at most."""


class Step(NamedTuple):
    """One cycle's shape.

    Attributes:
        drafts: tokens drafted per row; 0 is a plain step.
        nodes: tree nodes verified; 0 verifies the chain of drafts.
        stops: places where acceptance may stop (after so many drafts, or at a node) for which the same pass drafts the
            next block; 0 drafts in a pass of its own.
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
        return "lookup" if self.lookup else "onepass" if self.stops else "tree" if self.nodes else "chain"

    @property
    def scratch(self) -> int:
        """Cache positions past a row's length that the step writes at most."""
        draft, verify = self.drafts + 1, (self.nodes or self.drafts) + 1
        return max(draft, verify + self.stops * draft)


def step_of(fields: Sequence[Any]) -> Step:
    """Read a step from its four fields, as JSON has them; raises ValueError for others."""
    drafts, nodes, stops, lookup = fields
    return Step(int(drafts), int(nodes), int(stops), bool(lookup))


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for: always the same step, or `auto`.

    Attributes:
        name: "auto", "auto:KINDS", "ar", "full", "fixed:K", "tree:N", "onepass", "onepass:M", "onepass:M:N", "lookup"
            or "lookup:M".
        step: the step of a fixed plan; None for `auto`.
        kinds: what `auto` weighs besides plain steps and chains.
    """

    name: str
    step: Step | None
    kinds: frozenset[Kind] = WEIGHED

    def without(self, *kinds: Kind) -> "Plan":
        """Return the plan with these kinds of step left out of what `auto` weighs; a fixed plan as it is."""
        return self if self.step is not None else replace(self, kinds=self.kinds - set(kinds))

    def steps(self, block: int) -> tuple[Step, ...]:
        """Return every step this plan may take with a view trained for blocks of `block`.

        Raises:
            ConfigError: the plan asks for longer blocks than the view was trained for.
        """
        return _steps(self, block)

    def scratch(self, block: int) -> int:
        """Return the cache positions past a row's length that the plan cannot do without.

        One-pass steps of `auto` need more, and are taken while rows have as much left for tokens still to come.
        """
        steps = self.steps(block)
        return max(step.scratch for step in steps if step.kind != "onepass" or len(steps) == 1)


@lru_cache
def _steps(plan: Plan, block: int) -> tuple[Step, ...]:
    if plan.step is not None:
        return (_fitted(plan, plan.step, block),)
    chains = [Step(m) for m in LADDER if m < block]
    if block - 1 not in LADDER:
        chains.append(Step(block - 1))
    copies = [Step(m, lookup=True) for m in LOOKUPS if m < block]
    # Verified as wide as the longest chain, and twice as wide.
    trees = [Step(block - 1, nodes=nodes) for nodes in (block - 1, 2 * block - 1)]
    blocks = [*(Step(m) for m in FUSED if m < block - 1), Step(block - 1), *(trees if "tree" in plan.kinds else ())]
    fused = [one._replace(stops=s) for one in blocks for s in STOPS if s <= (one.nodes or one.drafts) + 1]
    others = (*trees, *(step for step in fused if step.scratch <= _FUSED_ROWS), *copies)
    return (Step(), *chains, *(step for step in others if step.kind in plan.kinds))


def _fitted(plan: Plan, step: Step, block: int) -> Step:
    if step.drafts >= block:
        raise ConfigError(
            f"plan {plan.name!r} asks for blocks of {step.drafts + 1}, this view was trained for at most {block}"
        )
    drafts = block - 1 if step.drafts < 0 else step.drafts
    return step._replace(drafts=drafts, stops=min(step.stops, (step.nodes or drafts) + 1))


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
    kinds: set[Any] = set(number.split("+"))
    if kind == "auto" and kinds <= {"chain", *WEIGHED}:
        return Plan(text, None, WEIGHED & kinds)
    if kind == "fixed" and value >= 2:
        return Plan(text, Step(value - 1))
    if kind == "tree" and value >= 1:
        return Plan(text, Step(_FULL, nodes=value))
    if kind == "onepass":
        places, branches, nodes = number.partition(":")
        stops = _ALL if places == "all" else int(places) if places.isdigit() else 0
        if stops >= 1 and (not branches or (nodes.isdigit() and int(nodes) >= 1)):
            return Plan(text, Step(_FULL, nodes=int(nodes or 0), stops=stops))
    if kind == "lookup" and value >= 1:
        return Plan(text, Step(value, lookup=True))
    raise ConfigError(
        "a plan is 'auto', 'ar', 'full', 'fixed:K' (K of at least 2), 'tree:N', 'onepass', 'onepass:M' (M places, or "
        "'all'), 'onepass:M:N' (over a tree of N nodes), 'lookup', 'lookup:M' or 'auto:' and some of "
        f"chain+{'+'.join(sorted(WEIGHED))}, found {text!r}"
    )
