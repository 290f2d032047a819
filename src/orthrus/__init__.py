"""Orthrus: lossless parallel token generation through a second view of a model's own attention.

Importing this package loads no torch; every public name is fetched when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orthrus.checkpoints.files import save as save
    from orthrus.checkpoints.load import load as load
    from orthrus.decode.api import generate as generate
    from orthrus.decode.api import stream as stream
    from orthrus.integrations.hf import hf_generate as hf_generate
    from orthrus.model.attach import attach as attach
    from orthrus.model.attach import detach as detach
    from orthrus.model.config import OrthrusConfig as OrthrusConfig

__version__ = "0.1.0"

_HOMES = {
    "OrthrusConfig": "orthrus.model.config",
    "attach": "orthrus.model.attach",
    "detach": "orthrus.model.attach",
    "generate": "orthrus.decode.api",
    "hf_generate": "orthrus.integrations.hf",
    "load": "orthrus.checkpoints.load",
    "save": "orthrus.checkpoints.files",
    "stream": "orthrus.decode.api",
}

__all__ = ["OrthrusConfig", "attach", "detach", "generate", "hf_generate", "load", "save", "stream"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'orthrus' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
