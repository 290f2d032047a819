"""How far long work is, on standard error: a bar on a terminal, plain lines elsewhere."""

from time import monotonic
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Counts the steps of some work; a context manager.

    `total` is None until `expect` says; `done` were made before; `lines` so many plain lines over the whole, where
    standard error is no terminal; the bar goes when the work ends if `transient`.
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        *,
        done: int = 0,
        lines: int = 20,
        quiet: bool = False,
        transient: bool = False,
    ) -> None:
        self._console = Console(stderr=True, highlight=False, quiet=quiet)
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(),
            console=self._console, disable=quiet or not self._console.is_terminal, transient=transient,
            speed_estimate_period=600,
        )  # fmt: skip
        self._task = self._bar.add_task(label, total=total, completed=done)
        self._label, self._total, self._lines = label, total or 0, lines
        self._done = self._before = done
        self._began = monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def expect(self, total: int) -> None:
        self._total = total
        self._bar.update(self._task, total=total)

    def advance(self, count: int = 1, text: str = "") -> None:
        """Count steps; the text stands beside the bar."""
        before, self._done = self._done, self._done + count
        self._bar.update(self._task, advance=count, description=f"{self._label} {text}".strip())
        if not self._console.is_terminal and self._part(self._done) > self._part(before):
            self.tell(text)

    def _part(self, done: int) -> int:
        return done * self._lines // max(self._total, 1)

    def tell(self, text: str) -> None:
        """Say how things stand: beside the bar, or in a line with the time that is left."""
        if self._console.is_terminal:
            self._bar.update(self._task, description=f"{self._label} {text}".strip())
            return
        minutes = (monotonic() - self._began) / 60
        left = minutes / max(self._done - self._before, 1) * (self._total - self._done)
        parts = (f"{self._label} {self._done}/{self._total}".strip(), text, f"{minutes:.1f} min, {left:.1f} min left")
        self.print("  ".join(filter(None, parts)))

    def print(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)
