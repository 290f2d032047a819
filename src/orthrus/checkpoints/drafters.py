"""Other people's drafters by name: `KIND:SOURCE`, where the source is a directory or a Hub id.

Each kind is a module of `orthrus.peers`, whose `load` takes the source and the model to draft for.
"""

from importlib import import_module
from typing import Any, Final

from transformers import PreTrainedModel

from orthrus.errors import ConfigError

KINDS: Final[dict[str, str]] = {
    "dflash": "orthrus.peers.dflash_drafter",
    "draft": "orthrus.peers.draft",
    "eagle3": "orthrus.peers.eagle3",
}
"""Modules by kind."""


def load_drafter(name: str, model: PreTrainedModel) -> Any:
    """Load a drafter for a dual-view model, onto its device and in its dtype.

    Raises ConfigError for an unknown kind or another shape than the model's; CheckpointError for damaged files or none.
    """
    kind, source = parse(name)
    return import_module(KINDS[kind]).load(source, model)


def parse(name: str) -> tuple[str, str]:
    """Cut a drafter's name in kind and source; raises ConfigError where it is none."""
    kind, _, source = name.partition(":")
    if kind not in KINDS or not source:
        raise ConfigError(f"a drafter is KIND:SOURCE, of the kinds {', '.join(KINDS)}, found {name!r}")
    return kind, source
