"""What a run says while it goes: a JSON line per report in `log.jsonl`, trackers, and a progress bar or plain lines."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from orthrus.data.records import append, read_records, rewrite
from orthrus.errors import ConfigError
from orthrus.progress import Progress

Tracker: TypeAlias = Any
"""One of accelerate's `GeneralTracker`s, which come without types."""


@contextmanager
def trackers(names: Sequence[str], output: Path, config: Mapping[str, Any], *, main: bool) -> Iterator[list[Tracker]]:
    """Open trackers for a run, and close them behind it; processes other than the main one have none.

    TensorBoard's files go to `output/tensorboard`; the others name the run after the folder.

    Raises ConfigError: a tracker's package is not installed.
    """
    opened = [_open(name, output) for name in names] if main else []
    plain = {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in config.items()}
    for tracker in opened:
        tracker.start()
        tracker.store_init_configuration(plain)
    try:
        yield opened
    finally:
        for tracker in opened:
            tracker.finish()


def _open(name: str, output: Path) -> Tracker:
    from accelerate import tracking  # lazily: it looks for every tracker there is

    if name not in {str(installed.value) for installed in tracking.get_available_trackers()}:
        raise ConfigError(f"run.trackers: {name} needs the package {name}, found none: pip install {name}, or drop it")
    if name == "tensorboard":
        return tracking.TensorBoardTracker("tensorboard", output)
    return tracking.LOGGER_TYPE_TO_CLASS[name](output.name)


class Journal(Progress):
    """Collects sums and counts over steps, and writes their means; a context manager.

    A log that goes past `start` is cut back first, for those steps will be done again. A `silent` one writes nothing.
    """

    def __init__(
        self, path: Path, *, steps: int, start: int, silent: bool = False, trackers: Sequence[Tracker] = ()
    ) -> None:
        if not silent and path.exists():
            rewrite(path, [line for line in read_records(path) if line["step"] <= start] if start else [])
        super().__init__("step", steps, done=start, lines=0, quiet=silent)
        self._silent = silent
        self._trackers = trackers
        self._path = path
        self._sums: dict[str, tuple[float, float]] = {}

    def write_start(self, step: int, about: Mapping[str, object]) -> None:
        self._write({"event": "start", "step": step, **about})

    def add(self, sums: Mapping[str, tuple[float, float]]) -> None:
        """Add the (sum, count) pairs of one step."""
        for name, (total, count) in sums.items():
            before = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (before[0] + total, before[1] + count)
        self.advance()

    def write_step(self, step: int) -> None:
        """Write the means since the last time."""
        means = {name: total / count for name, (total, count) in self._sums.items() if count}
        self._sums.clear()
        self._write({"event": "step", "step": step, **means})
        self._track(step, means)
        self.tell(f"loss {means.get('loss', float('nan')):.4f}")

    def write_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._write({"event": "evaluation", "step": step, **metrics})
        self._track(step, metrics)
        text = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.print(f"step {step}: {text}")

    def _track(self, step: int, figures: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(dict(figures), step=step)

    def _write(self, line: Mapping[str, object]) -> None:
        if not self._silent:
            append(self._path, [dict(line)])


def evaluation_at(path: Path, step: int) -> dict[str, float] | None:
    """Return the figures that a log has of the evaluation after `step`, None where it has none."""
    lines = read_records(path) if path.exists() else []
    evaluations = [line for line in lines if (line["event"], line["step"]) == ("evaluation", step)]
    if not evaluations:
        return None
    return {name: value for name, value in evaluations[-1].items() if name not in ("event", "step")}
