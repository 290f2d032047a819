"""One shape of tables, for the terminal and for markdown, and figures as text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from rich.table import Table

from orthrus.bench.metrics import Estimate

NONE: Final = "–"
"""What stands where there is no figure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """A table as text; the first `labels` columns are words, the rest figures."""

    title: str
    header: Sequence[str]
    rows: list[list[str]]
    labels: int

    @classmethod
    def of(cls, title: str, rows: Sequence[Mapping[str, str]], *, labels: int) -> "Grid":
        """Make a table of rows that name their columns, all of them the same."""
        header = list(rows[0]) if rows else []
        return cls(title=title, header=header, rows=[list(row.values()) for row in rows], labels=labels)

    def to_rich(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        for column, name in enumerate(self.header):
            table.add_column(name, justify="left" if column < self.labels else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        """Return the table in GitHub's markdown, its title as bold text before it."""
        rule = [":--" if column < self.labels else "--:" for column in range(len(self.header))]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(r)} |" for r in (self.header, rule, *self.rows))])


def number(value: float | None, digits: int, unit: float = 1.0) -> str:
    """Return a number with so many digits after the point."""
    return NONE if value is None else f"{value / unit:.{digits}f}"


def percent(share: float | None, digits: int = 1) -> str:
    return NONE if share is None else f"{100 * share:.{digits}f} %"


def estimate(of: Estimate | None) -> str:
    return NONE if of is None else f"{of.value:.2f} ({of.low:.2f} to {of.high:.2f})"


def milliseconds(seconds: Sequence[float]) -> str:
    """Return several times, such as percentiles, in milliseconds."""
    return " / ".join(f"{1000 * value:.0f}" for value in seconds) or NONE
