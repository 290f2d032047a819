"""Decoding passes on CPUs without Python: each kind is recorded as a graph, for texts of any number and length.

A recording runs the same operations over the same shapes, so its results have the same bits; that is checked once,
over inputs of other sizes. (In bfloat16 a recording of more than 128 rows over many keys attends to them in one block,
eager passes in several, which may round otherwise: `kernels.products`.) A recording takes as long to make as it saves
over many passes, so a kind must have been met about as often before.
"""

import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules import module as calls
from transformers import PreTrainedModel

from orthrus.kernels.attention import uses_own
from orthrus.kernels.packed import watch_weights
from orthrus.kernels.recorded import can_record, holders_of, holding, record
from orthrus.kernels.rewritten import rewrite
from orthrus.kernels.watched import PLAIN, state_of, watch
from orthrus.model.attachment import attachment_of
from orthrus.model.call import Call
from orthrus.model.markov import markov_of

USES: Final = 64
"""Passes of a kind that are made eagerly before it is recorded: about as many as its recording has to save."""

_MOST: Final = 12  # recordings, which take about a megabyte a layer
_STALE: Final = 1000  # passes without a use, after which a recording makes room for another
_KNOWN: Final = ("torch", "transformers", "orthrus")  # whose layers do in each pass what they did in the one before
_EVERYWHERE: Final[tuple[dict[int, Any], ...]] = (calls._global_forward_hooks, calls._global_forward_pre_hooks)
_one_at_a_time = threading.Lock()  # tensors stand in for a model's own while a pass is recorded


@dataclasses.dataclass(slots=True)
class Kind:
    """Passes that differ in tokens and sizes alone.

    Attributes:
        uses: how many were made eagerly, up to `USES`.
        graph: the recording; None before there is one, and where there can be none.
        more: lists of weights that are handed to it: one or, as it takes no empty ones, none.
    """

    uses: int = 0
    graph: Callable[..., Tensor] | None = None
    more: tuple[list[Tensor], ...] = ()
    used: int = 0

    def drop(self, *, uses: int) -> None:
        self.uses, self.graph, self.more = uses, None, ()


class Recorder:
    """Record a model's passes by kind, and run them again.

    `at_once`: whether kinds are recorded when they are first met.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._layers = _Layers(model)
        self._hooks = [hooks for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks += _EVERYWHERE
        watch_weights(model)
        correction = markov_of(model)
        for factor in [] if correction is None else correction.parameters():
            watch(factor)  # as its first use does, which would look like other weights
        self._weights = [held for m in model.modules() for held in (m._parameters, m._buffers) if held]
        self._state = self._now()
        self._kinds: dict[object, Kind] = {}
        self._passes = 0
        self._steady = False
        self.at_once = False

    def fits(self) -> bool:
        """Tell whether the model has the layers that it had, and each its forward."""
        return self._layers.unchanged()

    def look(self) -> None:
        """See before a text whether layers and weights are as they were: it takes a tenth of a pass.

        Recordings of other weights are dropped. With other layers the text's passes are made eagerly.
        """
        self._steady = self.fits()
        if (state := self._now()) != self._state:
            self._state, self._kinds = state, {}

    def logits(self, arguments: dict[str, Any]) -> Tensor | None:
        """Run the recording of a pass; None where there is none, and the pass has to be made eagerly."""
        plain = torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")
        if not plain or self._model.training or not self._steady or any(self._hooks):
            return None
        self._passes += 1
        call = Call(self._model, arguments)
        if call.kept is None:
            return None
        kind = self._kinds.setdefault(call.key, Kind())
        if self.at_once:
            kind.uses = max(kind.uses, USES)
        if kind.uses < USES or (kind.uses == USES and not call.has_room):
            kind.uses += kind.uses < USES
            return None
        if kind.uses == USES:
            if not self._has_room():
                kind.uses = 0
                return None
            kind.uses += 1
            with _one_at_a_time:
                self._record(kind, call)
        if kind.graph is None:
            return None
        kind.used = self._passes
        try:
            return kind.graph(*call.inputs, *kind.more)
        except RuntimeError:  # of these sizes it cannot be run, or no pass can: the eager one tells
            kind.drop(uses=USES + 1)
            return None

    def _has_room(self) -> bool:
        """Tell whether one more recording may be kept; one that is no longer used makes room for it."""
        recorded = [kind for kind in self._kinds.values() if kind.graph is not None]
        if len(recorded) < _MOST:
            return True
        oldest = min(recorded, key=lambda kind: kind.used)
        if stale := self._passes - oldest.used > _STALE:
            oldest.drop(uses=0)
        return stale

    def _now(self) -> list[tuple[int, ...]]:
        return [state_of(weight) for held in self._weights for weight in held.values() if weight is not None]

    def _record(self, kind: Kind, call: Call) -> None:
        """Record a kind of pass with norms and rotations in C++, or as it is where these change a bit."""
        rewritten = False

        def change(graph: Any) -> None:
            nonlocal rewritten
            rewritten = uses_own(self._model, 1) and rewrite(graph)  # not of a library that came after the model

        if not self._is_recorded(kind, call, change) and rewritten:
            self._is_recorded(kind, call)

    def _is_recorded(self, kind: Kind, call: Call, change: Callable[[Any], object] = bool) -> bool:
        """Record a kind of pass, unless what is recorded gives other results over other sizes."""
        holders = holders_of(self._model)
        more = ([getattr(owner, name) for owner, name in holders],) if holders else ()

        def run(given: Any, masks: Any, buffers: Any, weights: Sequence[Tensor] = ()) -> Tensor:
            with holding(holders, weights):
                return call.run(given, masks, buffers)

        others = call.others()
        try:
            with _constant(self._model), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of sizes that Python reads: where they matter, results differ
                graph = record(run, (*call.inputs, *more), change)
                alike = torch.equal(graph(*others, *more), call.run(*others))
        except Exception:  # eager passes raised none: it cannot be recorded, or took a size for fixed
            return False
        if alike:
            kind.graph, kind.more = graph, more
        return alike


@contextmanager
def _constant(model: nn.Module) -> Iterator[None]:
    """Let no parameter ask for gradients meanwhile: a recording holds them as constants."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad = True


def recorder_for(model: PreTrainedModel) -> Recorder | None:
    """Return what records a model's passes; None where they are not recorded.

    They are on CPUs, for models whose layers keep their weights in memory as plain tensors, and without experts.
    """
    known: dict[object, Recorder] = attachment_of(model).memo("recorder")
    if not (can_record() and _is_recordable(model)):
        known.clear()  # with the weights that recordings hold
        return None
    recorder = known.get("")
    if recorder is None or not recorder.fits():
        recorder = known[""] = Recorder(model)
    recorder.look()
    return recorder


def _is_recordable(model: PreTrainedModel) -> bool:
    if model.device.type != "cpu" or not all(map(_is_steady, model.modules())):
        return False
    return all(type(parameter) in PLAIN for parameter in model.parameters())


def _is_steady(module: nn.Module) -> bool:
    """Tell whether a module makes the same calls in every pass."""
    kind = type(module)
    homes = {written.__module__.partition(".")[0] for written in (kind, kind.forward)}
    if not homes <= {*_KNOWN} or "forward" in module.__dict__:  # set on the module, as accelerate does
        return False
    return not any(part in kind.__name__.lower() for part in ("expert", "moe"))


class _Layers:
    """What a model's modules are and call, as far as it can be replaced."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._types = [type(module) for module in self._modules]
        self._forwards = {kind: kind.forward for kind in self._types}
        self._children = [(m._modules, [*m._modules.values()]) for m in self._modules if m._modules]
        self._attributes = [module.__dict__ for module in self._modules]

    def unchanged(self) -> bool:
        return (
            [type(module) for module in self._modules] == self._types
            and all(kind.forward is forward for kind, forward in self._forwards.items())
            and all([*children.values()] == before for children, before in self._children)
            and not any("forward" in attributes for attributes in self._attributes)
        )
