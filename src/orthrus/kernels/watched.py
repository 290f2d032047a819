"""Parameters whose numbers something else was made of (a packed copy), and whether they may have changed since.

Torch counts what is written to a parameter, but for writes through its `.data` and through other tensors or arrays over
the same memory. The first are noted here; where others share the memory, nothing can be known.
"""

from itertools import count
from typing import Final

import torch
from torch import Tensor, nn

_ALONE: Final = 2  # holders of a parameter's memory: the parameter, and the handle by which they are counted


_holders = getattr(torch._C, "_storage_Use_Count", None)  # private: a version of torch may come without it
_events = count(1)  # of all parameters: no number comes twice, whoever stops watching and begins again


class Watched(nn.Parameter):
    """A parameter that notes when its `.data` was last taken or replaced."""

    event = 0

    @property
    def data(self) -> Tensor:
        self.event = next(_events)
        return Tensor.data.__get__(self)  # type: ignore[attr-defined,no-any-return]

    @data.setter
    def data(self, value: Tensor) -> None:
        self.event = next(_events)
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]


PLAIN: Final = (Tensor, nn.Parameter, Watched)
"""Types of tensors that hold the numbers they stand for, and not those of a quantised form."""


def watch(parameter: Tensor) -> None:
    """Note what is done to a parameter's `.data` from now on, in place; it stays an `nn.Parameter` to everyone."""
    if type(parameter) is nn.Parameter:
        parameter.__class__ = Watched
        parameter.__dict__["event"] = next(_events)


def unwatch(parameter: Tensor) -> None:
    """Make a watched parameter a plain one again, in place."""
    if type(parameter) is Watched:
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]
        parameter.__dict__.pop("event", None)


def state_of(parameter: Tensor) -> tuple[int, ...]:
    """Return what is equal as long as a watched parameter holds the same numbers, as far as that can be told."""
    version = 0 if parameter.is_inference() else parameter._version
    return parameter.data_ptr(), version, getattr(parameter, "event", 0)


def may_change_unseen(parameter: Tensor) -> bool:
    """Tell whether a parameter can be written to without a trace: others share its memory, or writes are not counted.

    Arrays that are made of it later on (NumPy, DLPack) and written to are not seen either.
    """
    if parameter.is_inference() or type(parameter) is not Watched or _holders is None:
        return True
    return bool(_holders(parameter.untyped_storage()._cdata) > _ALONE)
