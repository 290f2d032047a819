"""One shape of tables, for the terminal and for markdown, and figures as text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from rich.console import Console
from rich.table import Table

from orthrus.bench.metrics import Estimate

_UNBOUNDED: Final = 10_000
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

    @property
    def width(self) -> int:
        """Columns of a terminal that the table takes when no cell is broken."""
        return Console(width=_UNBOUNDED).measure(self.to_rich()).maximum

    def within(self, width: int) -> Iterator["Grid"]:
        """Yield this table, or where it is wider its rows as columns, in as many tables as it takes."""
        if self.width <= width:
            yield self
            return
        rows = self.rows
        while rows:
            count = next((n for n in range(len(rows), 1, -1) if self._turned(rows[:n]).width <= width), 1)
            yield self._turned(rows[:count])
            rows = rows[count:]

    def _turned(self, rows: Sequence[Sequence[str]]) -> "Grid":
        header, *lines = ([name.replace("\n", " "), *cells] for name, *cells in zip(self.header, *rows, strict=True))
        return Grid(title=self.title, header=header, rows=lines, labels=1)

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
