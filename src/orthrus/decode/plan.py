"""How many drafts a cycle proposes. Pure: a plan is a function of what it is told, and never changes a text.

Knows neither model nor clock.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from orthrus.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Plan:
    """Propose the same number of drafts every cycle: 0 is plain decoding.

    Attributes:
        name: "ar", "fixed:K" with K the block length (anchor included), or "full" for the trained block length.
        block: K; 1 for plain decoding, 0 until `for_block` has settled "full".
    """

    name: str
    block: int

    @property
    def width(self) -> int:
        """Rows of the widest pass a cycle of this plan runs."""
        return self.block

    def for_block(self, trained: int) -> "Plan":
        """Fit the plan to a view trained for blocks of `trained`; raises ConfigError for a longer one."""
        if self.block > trained:
            raise ConfigError(
                f"plan {self.name!r} asks for blocks of {self.block}, this view was trained for at most {trained}"
            )
        return self if self.block else Plan(self.name, trained)

    def drafts(self, rows: Sequence[object]) -> int:
        """Return how many drafts the next cycle proposes."""
        return self.block - 1


def parse(text: str) -> Plan:
    """Read a plan's name: `ar`, `full`, or `fixed:K`; raises ConfigError for anything else."""
    kind, _, number = text.partition(":")
    if text == "ar":
        return Plan(text, 1)
    if text == "full":
        return Plan(text, 0)
    if kind == "fixed" and number.isdigit() and int(number) >= 2:
        return Plan(text, int(number))
    raise ConfigError(f"a plan is 'ar', 'full' or 'fixed:K' with K of at least 2, found {text!r}")
