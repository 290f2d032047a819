"""What a diffusion view adds to a model beside its modules: one object, so that taking the view off takes it all."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from torch import nn
from transformers import PreTrainedModel

from orthrus.errors import ConfigError
from orthrus.model.config import OrthrusConfig

_ATTRIBUTE: Final = "_orthrus"


@dataclass(slots=True)
class Attachment:
    """Hold a view's configuration, what the backbone was before it, and what was learned about the model since.

    A copy of the model, deep or pickled, keeps the first five fields and learns the rest for itself.

    Attributes:
        attention: the attention function that the backbone had.
        remembers: whether findings about the model may be read from and written to disk (`orthrus.memory`).
        drafter: who drafts in place of the view (`orthrus.decode.drafters.Drafter`); None for the view.
        idle: caches that no engine uses, for the next one (`orthrus.model.graphs`).
        reached: whether `view=` is known to reach every attention module.
        memos: findings about the model as it stands, by kind and by the state that they hold for.
        lock: held by the thread that runs passes; hooks, and what joined modules keep during one, are one thread's.
    """

    config: OrthrusConfig
    attention: str
    trainable: frozenset[str]
    remembers: bool = True
    drafter: Any = None
    compiled: Callable[..., Any] | None = None
    idle: list[Any] = field(default_factory=list)
    reached: bool = False
    memos: dict[str, dict[object, Any]] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.RLock)

    def memo(self, kind: str) -> dict[object, Any]:
        """Return the findings of one kind, to read and to add to."""
        return self.memos.setdefault(kind, {})

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy what describes the view and nothing that belongs to one model object."""
        return (Attachment, (self.config, self.attention, self.trainable, self.remembers, self.drafter))


def is_attached(model: nn.Module) -> bool:
    return _ATTRIBUTE in model.__dict__


def attachment_of(model: nn.Module) -> Attachment:
    """Return what belongs to a model's view; raises ConfigError when the model has no view."""
    attachment = model.__dict__.get(_ATTRIBUTE)
    if not isinstance(attachment, Attachment):
        raise ConfigError(
            "this needs a model with a diffusion view, found a plain one: orthrus.attach(model) makes an untrained "
            "view, orthrus.load(name) loads a trained one"
        )
    return attachment


def config_of(model: nn.Module) -> OrthrusConfig:
    """Return the view's configuration; raises ConfigError when the model has no view."""
    return attachment_of(model).config


def put(model: PreTrainedModel, attachment: Attachment) -> None:
    setattr(model, _ATTRIBUTE, attachment)


def take(model: PreTrainedModel) -> Attachment:
    """Remove a model's attachment and return it; raises ConfigError when the model has no view."""
    attachment = attachment_of(model)
    delattr(model, _ATTRIBUTE)
    return attachment
