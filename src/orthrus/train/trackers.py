"""Experiment trackers by name: the figures of the log, sent on to TensorBoard, Weights & Biases or trackio.

A thin layer over accelerate's trackers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from orthrus.errors import ConfigError

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
