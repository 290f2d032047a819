"""What a step may be: plain, a chain of drafts, a tree of them, a copy from the text, or one fused pass.

`parse` reads the name of a plan; `policy` chooses where the plan is `auto`. No plan ever changes a text.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple

from orthrus.errors import ConfigError

Kind = Literal["plain", "chain", "tree", "onepass", "lookup"]

LENGTHS: Final = (1, 2, 3, 4, 6, 8, 11, 15, 23, 31, 47, 63)
"""Numbers of drafts that `auto` chooses among, up to the block that the view was trained for."""
COPIES: Final = (3, 7, 15, 31, 63)
"""Numbers of tokens that it copies: up to the same, or up to `COPIED` where that is more."""
COPIED: Final = 15
WEIGHED: Final[frozenset[Kind]] = frozenset(("tree", "lookup"))
"""Kinds of step that it chooses among besides plain steps and chains."""


class Step(NamedTuple):
    """What one cycle does.

    Attributes:
        drafts: tokens drafted per row; 0 is a plain step.
        nodes: tree nodes verified; 0 verifies the chain of drafts.
        stops: ends of acceptance (after so many drafts, or at a node) for which the same pass drafts the next block; 0
            drafts in a pass of its own.
        lookup: drafts are copied from the row's own text (`policy.lookup`), which takes no pass.
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
        block = self.drafts + 1
        verify = self.nodes + 2 if self.nodes else block  # behind a first token; a chain has one draft less there
        draws = self.drafts > 0 and not self.lookup
        return max(draws * (block + 1), verify + self.stops * block)


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for: always the same step, or a choice.

    Attributes:
        name: "auto", "auto:KINDS", "ar", "full", "fixed:K", "tree:N", "onepass", "onepass:M", "onepass:M:N", "lookup"
            or "lookup:M".
        kinds: what a choice is made among, besides plain steps and chains; None for a plan of one step.
        drafts: of the one step; None for as many as the view was trained for.
        nodes: of the one step.
        stops: of the one step; None for all there are.
        lookup: of the one step.
        copied: tokens that a choice may copy at once where the view's blocks are shorter.
    """

    name: str
    kinds: frozenset[Kind] | None = None
    drafts: int | None = None
    nodes: int = 0
    stops: int | None = 0
    lookup: bool = False
    copied: int = COPIED

    def without(self, *kinds: Kind) -> "Plan":
        """Return the plan with these kinds left out of its choice; a plan of one step as it is."""
        return self if self.kinds is None else replace(self, kinds=self.kinds - set(kinds))

    def steps(self, block: int) -> tuple[Step, ...]:
        """Return every step this plan may take with a view trained for blocks of `block`.

        Raises:
            ConfigError: the plan asks for longer blocks than the view was trained for.
        """
        return _steps(self, block)

    def scratch(self, block: int) -> int:
        """Return the cache positions past a row's length that the plan's steps write at most."""
        return max(step.scratch for step in self.steps(block))


def slots(block: int) -> int:
    """Return how many drafts a step of `auto` has at most, by a view for blocks of `block`."""
    return max(block - 1, COPIED)


@lru_cache
def _steps(plan: Plan, block: int) -> tuple[Step, ...]:
    longest = block - 1
    if plan.kinds is None:
        drafts = longest if plan.drafts is None else plan.drafts
        if drafts > longest:
            raise ConfigError(
                f"plan {plan.name!r} asks for blocks of {drafts + 1}, this view was trained for at most {block}"
            )
        most = (plan.nodes or drafts) + 1
        return (Step(drafts, plan.nodes, most if plan.stops is None else min(plan.stops, most), plan.lookup),)
    chains = sorted({longest, *(drafts for drafts in LENGTHS if drafts < block)})
    trees = [Step(longest, nodes=wide) for wide in (longest, 2 * block - 1)]  # as wide as the longest chain, and twice
    copies = [Step(drafts, lookup=True) for drafts in COPIES if drafts <= max(longest, plan.copied)]
    return (Step(), *map(Step, chains), *(step for step in (*trees, *copies) if step.kind in plan.kinds))


_WHOLE: Final = {
    "auto": Plan("auto", kinds=WEIGHED),
    "ar": Plan("ar", drafts=0),
    "full": Plan("full"),
    "onepass": Plan("onepass", stops=None),
    "lookup": Plan("lookup", lookup=True),
}


def parse(text: str) -> Plan:
    """Read a plan's name; raises ConfigError for anything that is not one."""
    kind, _, number = text.partition(":")
    count = int(number) if number.isdigit() else 0
    if text in _WHOLE:
        return _WHOLE[text]
    kinds: set[Any] = set(number.split("+"))
    if kind == "auto" and kinds <= {"chain", *WEIGHED}:
        return Plan(text, kinds=frozenset(kinds - {"chain"}))
    if kind == "fixed" and count >= 2:
        return Plan(text, drafts=count - 1)
    if kind == "tree" and count >= 1:
        return Plan(text, nodes=count)
    if kind == "onepass":
        stops, over_tree, nodes = number.partition(":")
        counted = stops == "all" or (stops.isdigit() and int(stops) >= 1)
        if counted and (not over_tree or (nodes.isdigit() and int(nodes) >= 1)):
            return Plan(text, nodes=int(nodes or 0), stops=None if stops == "all" else int(stops))
    if kind == "lookup" and count >= 1:
        return Plan(text, drafts=count, lookup=True)
    raise ConfigError(
        "a plan is 'auto', 'ar', 'full', 'fixed:K' (K of at least 2), 'tree:N', 'onepass', 'onepass:M' (M stops, or "
        "'all'), 'onepass:M:N' (over a tree of N nodes), 'lookup', 'lookup:M' or 'auto:' and some of "
        f"chain+lookup+tree, found {text!r}"
    )
