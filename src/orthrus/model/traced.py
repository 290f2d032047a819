"""Decoding passes on CPUs without Python: each kind is recorded as a graph, for texts of any length.

A pass of a small model is some thousand small operations, and calling them from Python takes longer than most of them
do. A recording runs the same operations over the same shapes, so its results have the same bits; that is checked once,
over inputs of other sizes. (In bfloat16 a recording of more than 128 rows over many keys attends to them in one block,
eager passes in several, which may round otherwise: `kernels.products`.) A recording takes as long to make as it saves
over many passes, so a kind must have been met about as often before.
"""

import copy
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

from orthrus.kernels.masks import LayerMasks
from orthrus.kernels.packed import watch_weights
from orthrus.kernels.products import pays
from orthrus.kernels.recorded import can_record, holders_of, holding, record
from orthrus.kernels.watched import PLAIN, state_of, watch
from orthrus.model.attachment import attachment_of
from orthrus.model.cache import KeyStore, ScratchCache
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
        used: the number of the pass that ran it last.
    """

    uses: int = 0
    graph: Callable[..., Tensor] | None = None
    more: tuple[list[Tensor], ...] = ()
    used: int = 0

    def drop(self, *, uses: int) -> None:
        """Let go of the recording."""
        self.uses, self.graph, self.more = uses, None, ()


class Recorder:
    """Record a model's passes by kind, and run them again.

    Attributes:
        at_once: whether kinds are recorded when they are first met.
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
        self.at_once = False

    def fits(self) -> bool:
        """Tell whether the model has the layers that it had, and each its forward."""
        return self._layers.unchanged()

    def logits(self, arguments: dict[str, Any]) -> Tensor | None:
        """Run the recording of a pass; None where there is none, and the pass has to be made eagerly."""
        plain = torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")
        if not plain or self._model.training or any(self._hooks) or not self.fits():
            return None
        if (state := self._now()) != self._state:  # other weights, of which others may have been made
            self._state, self._kinds = state, {}
        self._passes += 1
        call = _Call(self._model, arguments)
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

    def _record(self, kind: Kind, call: "_Call") -> None:
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
                graph = record(run, (*call.inputs, *more))
                alike = torch.equal(graph(*others, *more), call.run(*others))
        except Exception:  # eager passes raised none: it cannot be recorded, or took a size for fixed
            return
        if alike:
            kind.graph, kind.more = graph, more


class _Call:
    """A pass, as a function of what may differ between two of its kind.

    Attributes:
        key: tells kinds apart. One row and several take different kernels; other numbers of rows are sizes.
        inputs: for `run`.
        kept: terms of recurrent states that it leaves; None where their buffers have to grow first.
    """

    def __init__(self, model: PreTrainedModel, arguments: dict[str, Any]) -> None:
        self._model = model
        self._view, self._cache = arguments["view"], arguments["past_key_values"]
        self._name = "input_ids" if "input_ids" in arguments else "inputs_embeds"
        own = (self._name, "attention_mask", "position_ids", "past_key_values", "view")
        self._rest = {name: value for name, value in arguments.items() if name not in own}
        token_BT, keep, current = arguments[self._name], self._rest["logits_to_keep"], self._cache.current
        shown: LayerMasks = self._view.masks
        self._windows = sorted(shown.windowed)
        picked = [keep] if isinstance(keep, Tensor) else []
        self._paths = [name for name in ("path", "block_path") if getattr(self._view, name, None) is not None]
        self.kept: int | None = self._cache.states.kept
        # Recordings read sizes anew, and no numbers: these are passed as sizes, of nothing.
        reach = torch.empty(current.span, current.start or 0, 0)
        masks: list[Any] = [shown.of(window) for window in (None, *self._windows)]
        stores: list[KeyStore] = list(self._cache.stores.values())
        self.inputs: tuple[Any, ...] = (
            [token_BT, arguments["position_ids"], current.slot_BQ, reach]
            + [getattr(self._view, name) for name in self._paths]
            + picked,
            masks,
            [store.keys for store in stores] + [store.values for store in stores] + self._cache.states.buffers(),
        )
        self._grows = token_BT.shape[1] > 1 and "tile" not in self._rest
        B, T = token_BT.shape[:2]
        rows = getattr(self._view, "rows", 0)
        self._all_kept = self.kept == T
        self.key = (
            (type(self._view), rows, self._name),
            (T - rows == 1, T == 1) if self._grows else T,
            pays(stores[0].keys, T, current.span),
            tuple(self._windows),
            tuple((mask.shape[0], mask.shape[2] == 1) for mask in masks),
            tuple(len(index) == 1 for index in picked),
            (*self._paths, None if self._all_kept else self.kept),
            tuple((name, value) for name, value in self._rest.items() if not isinstance(value, Tensor)),
            (B, current.first, current.last, current.start is None),
            (tuple(self._cache.stores), stores[0].keys.dtype, len(stores[0].keys)),
            model.config._attn_implementation,
        )

    @property
    def has_room(self) -> bool:
        """Whether the cache takes the pass over `others`, too, and attention computes it in the same way."""
        rows, span, more = self._cache.current.slot_BQ.shape[1], self._cache.current.span, 1 + self._grows
        keys = self.inputs[2][0]
        alike = pays(keys, rows, span) == pays(keys, rows + self._grows, span + more)
        return bool(alike and span + more <= self._cache.capacity)

    def others(self) -> tuple[Any, ...]:
        """Return inputs of other sizes: other tokens, a slot further on and a row more, which see all before them."""
        (token_BT, position_BT, slot_BT, reach, *more), masks, buffers = self.inputs
        paths, picked = more[: len(self._paths)], more[len(self._paths) :]
        grows, (span, start, _) = int(self._grows), reach.shape
        token_BT = (
            (token_BT + 1) % self._model.get_input_embeddings().weight.shape[0]
            if self._name == "input_ids"
            else token_BT.flip(1)
        )
        tokens = [torch.cat([x, x[:, -1:] + 1], 1) if grows else x for x in (position_BT, slot_BT + 1)]
        token_BT = torch.cat([token_BT, token_BT[:, :1]], 1) if grows else token_BT
        if grows:
            picked = [torch.cat([index, index.new_tensor([token_BT.shape[1] - 1])]) for index in picked]
            paths = [_one_more(_one_more(path, 2), 1, value=True) for path in paths]
            terms = {id(buffer) for buffer in self._cache.states.term_buffers()}
            buffers = [_one_more(buffer, 1) if id(buffer) in terms else buffer for buffer in buffers]
        start += self._cache.current.start is not None
        wider = [torch.nn.functional.pad(mask, (1 + grows, 0, 0, grows)) for mask in masks]
        return ([token_BT, *tokens, torch.empty(span + 1 + grows, start, 0), *paths, *picked], wider, buffers)

    def run(self, given: list[Tensor], masks: list[Tensor], buffers: list[Tensor]) -> Tensor:
        """Make the pass."""
        token_BT, position_BT, slot_BT, reach, *more = given
        paths, picked = more[: len(self._paths)], more[len(self._paths) :]
        cache: ScratchCache = copy.copy(self._cache)
        cache.stores = {layer: copy.copy(store) for layer, store in cache.stores.items()}
        count = len(cache.stores)
        for store, keys, values in zip(cache.stores.values(), buffers, buffers[count:], strict=False):
            store.keys, store.values = keys, values
        assert self.kept is not None
        kept = token_BT.shape[1] if self._all_kept else self.kept
        cache.states = cache.states.over(buffers[2 * count :], kept)
        start = None if cache.current.start is None else reach.shape[1]
        cache.current = dataclasses.replace(cache.current, slot_BQ=slot_BT, span=reach.shape[0], start=start)
        shown = LayerMasks(full=masks[0], windowed=dict(zip(self._windows, masks[1:], strict=True)))
        logits: Tensor = self._model(
            attention_mask=masks[0],
            position_ids=position_BT,
            past_key_values=cache,
            view=dataclasses.replace(self._view, masks=shown, **dict(zip(self._paths, paths, strict=True))),
            **self._rest | {self._name: token_BT} | ({"logits_to_keep": picked[0]} if picked else {}),
        ).logits
        return logits


def _one_more(tensor: Tensor, dim: int, *, value: bool = False) -> Tensor:
    """Return a tensor with one more entry along a dimension, all of this value."""
    shape = (*tensor.shape[:dim], 1, *tensor.shape[dim + 1 :])
    return torch.cat([tensor, tensor.new_full(shape, value)], dim=dim)


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

    They are on CPUs, for models whose layers all are torch's, transformers' or this package's and keep their weights in
    memory as plain tensors. Not for those with experts, where Python goes by what a router says.
    """
    known: dict[object, Recorder] = attachment_of(model).memo("recorder")
    if not (can_record() and _is_recordable(model)):
        known.clear()  # with the weights that recordings hold
        return None
    recorder = known.get("")
    if recorder is None or not recorder.fits():
        recorder = known[""] = Recorder(model)
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
    """What a model's modules are and call, as far as it can be replaced: looked at in every pass."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._types = [type(module) for module in self._modules]
        self._forwards = {kind: kind.forward for kind in self._types}
        self._children = [(m._modules, [*m._modules.values()]) for m in self._modules if m._modules]
        self._attributes = [module.__dict__ for module in self._modules]

    def unchanged(self) -> bool:
        """Tell whether all is as it was."""
        return (
            [type(module) for module in self._modules] == self._types
            and all(kind.forward is forward for kind, forward in self._forwards.items())
            and all([*children.values()] == before for children, before in self._children)
            and not any("forward" in attributes for attributes in self._attributes)
        )
