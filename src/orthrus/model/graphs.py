"""Decoding passes through torch.compile: on CPUs as one graph a kind of pass, on CUDA layer by layer and replayed.

On CUDA all layers share a few small graphs, and what a pass launches is recorded as a CUDA graph, one for each shape of
pass and not for each length of text.
"""

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from orthrus.errors import UnsupportedModel
from orthrus.kernels import attention
from orthrus.kernels.merged import merge
from orthrus.model.attach import duals, is_hybrid, layers_of
from orthrus.model.attachment import attachment_of, is_attached
from orthrus.model.cache import CachePart, ScratchCache
from orthrus.model.dual import DualAttention

SPAN = 256
"""Cache slots in reach are rounded up to a multiple of this, so that lengths do not make a graph each."""

_EIGHTHS = 3  # bits: caches that are lent again are rounded up to an eighth of a power of two
_KEPT = 1  # caches nobody borrows, per model
_ALIGNED = 256  # bytes

_RECOMPILES = 64  # views, widths of one and more, one row and more, which rows are projected

Forward = Callable[..., Any]
Backend = str | Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Recording:
    """A call to run again without Python: what runs it, where it reads its inputs and where it leaves its results."""

    replay: Callable[[], None]
    inputs: list[Tensor]
    results: list[Tensor]


@dataclass(slots=True)
class Recordings:
    """What was recorded over one cache's buffers: made by key, None where a call cannot be; with shared memory.

    `results` are the bytes that recordings leave their results in.
    """

    made: dict[object, Recording | None] = field(default_factory=dict)
    workspace: Any = None
    results: Tensor | None = None

    def places(self, results: list[Tensor]) -> list[Tensor]:
        """Return tensors like the results, in the memory that all recordings leave theirs in."""
        sizes = [-(-result.nbytes // _ALIGNED) * _ALIGNED for result in results]
        if self.results is None or self.results.numel() < sum(sizes):
            device = results[0].device if results else None
            self.results = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        parts = torch.split(self.results[: sum(sizes)], sizes)
        return [part[: r.nbytes].view(r.dtype).view(r.shape) for part, r in zip(parts, results, strict=True)]


def recordings_of(cache: ScratchCache) -> Recordings:
    if cache.recordings is None:
        cache.recordings = Recordings()
    recordings: Recordings = cache.recordings
    return recordings


def compile_passes(model: PreTrainedModel, *, backend: Backend = "inductor") -> None:
    """Compile a model's decoding passes from now on, at their first use; on CUDA each shape becomes a CUDA graph.

    Prefill stays eager. Logits are those of eager passes up to rounding, as between any two kernels.

    Raises UnsupportedModel: some layers keep a recurrent state, whose upkeep between passes is not compiled.
    """
    if is_hybrid(model):
        raise UnsupportedModel(
            f"compiled passes need attention in every layer, found layers with a recurrent state in "
            f"{type(model).__name__}: use compile=False"
        )
    if model.device.type == "cuda":
        forward = by_layer(merge(model), backend=backend)
    else:
        forward = torch.compile(model.forward, dynamic=True, backend=backend)
    attachment_of(model).compiled = forward


def is_compiled(model: PreTrainedModel) -> bool:
    """Tell whether decoding passes are compiled; those of a copy are not."""
    return is_attached(model) and attachment_of(model).compiled is not None


def lend(model: PreTrainedModel, *, rows: int, capacity: int, borrower: object) -> ScratchCache:
    """Return a cache for as long as its borrower lives. Its first pass raises CacheFull where memory has no room.

    Where passes are recorded, one whose borrower is gone is lent again, and with it all that was recorded over it.
    """
    device, keyed = model.device, sum(isinstance(dual, DualAttention) for dual in duals(model))
    if not (is_compiled(model) and attention.can_split(device)):
        return ScratchCache(rows=rows, capacity=capacity, device=device, layers=keyed)
    idle: list[ScratchCache] = attachment_of(model).idle
    layers = len(layers_of(model))  # one with a drafter's keys as well is no other's
    fitting = [c for c in idle if c.rows == rows and c.capacity >= capacity and c.device == device]
    fitting = [c for c in fitting if len(c.stores) <= layers]
    if fitting:
        cache = min(fitting, key=lambda c: (c.capacity, -len(recordings_of(c).made)))
        idle.remove(cache)
        cache.set_lengths_of(slice(0, rows), [0] * rows)
    else:
        step = max(SPAN, 1 << max(0, capacity.bit_length() - _EIGHTHS - 1))
        idle.clear()  # a device's memory may not hold both
        cache = ScratchCache(rows=rows, capacity=-(-capacity // step) * step, device=device, layers=keyed)
    weakref.finalize(borrower, _take_back, idle, cache).atexit = False
    return cache


def _take_back(idle: list[ScratchCache], cache: ScratchCache) -> None:
    idle.append(cache)
    del idle[:-_KEPT]


def run(model: PreTrainedModel, arguments: dict[str, Any]) -> Tensor:
    """Call a compiled model; returns logits."""
    forward = attachment_of(model).compiled
    assert forward is not None
    with torch._dynamo.config.patch(recompile_limit=_RECOMPILES):
        logits: Tensor = forward(**arguments).logits
        return logits


def by_layer(model: PreTrainedModel, *, backend: Backend = "inductor") -> Forward:
    """Return a model's forward with compiled decoder layers, which share their graphs whatever their number.

    Graphs end where keys are written, so that nothing in them tells one layer from another.
    """
    layers = layers_of(model)
    compiled = [torch.compile(layer.forward, dynamic=True, backend=backend) for layer in layers]

    def forward(**arguments: Any) -> Any:
        arguments["past_key_values"] = _Untraced(arguments["past_key_values"])
        try:
            for layer, call in zip(layers, compiled, strict=True):
                layer.__dict__["forward"] = call
            with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
                return nn.Module.__call__(model, **arguments)
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)

    return forward


class _Untraced:
    """A cache that is called and not traced."""

    def __init__(self, cache: ScratchCache | CachePart) -> None:
        self._cache = cache

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._cache.update(*args, **kwargs)

    def part(self, columns: slice) -> "_Untraced":
        assert isinstance(self._cache, ScratchCache)
        return _Untraced(self._cache.part(columns))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._cache.get_seq_length(layer_idx)


def replayed(
    cache: ScratchCache, key: object, given: Sequence[Tensor], call: Callable[[list[Tensor]], list[Tensor]]
) -> list[Tensor]:
    """Make a call over a cache's buffers, or run it again as it was recorded; results are the caller's to keep.

    Args:
        key: tells calls apart that do different things, beyond the shapes of what they are given.
        given: all other tensors that may differ from time to time.
        call: computes the results from tensors like the given ones, without waiting for the device.
    """
    made = recordings_of(cache).made
    full_key = (key, *((tensor.shape, tensor.dtype) for tensor in given))
    if full_key not in made:
        inputs = [tensor.clone() for tensor in given]
        made[full_key], results = record(inputs, lambda: call(inputs), cache)
        return results
    recording = made[full_key]
    if recording is None:
        return call(list(given))
    if given:
        torch._foreach_copy_(recording.inputs, list(given))
    recording.replay()
    return [tensor.clone() for tensor in recording.results]


def record(
    inputs: list[Tensor], call: Callable[[], list[Tensor]], cache: ScratchCache
) -> tuple[Recording | None, list[Tensor]]:
    """Make a call, and record it as a CUDA graph; None where it waits for the device, which no graph can.

    Recordings over one cache share their memory and the place where they leave their results.
    """
    shared = recordings_of(cache)
    with torch.cuda.device(cache.device):
        first = call()  # compiles and allocates what must not be while recording, which computes nothing
        kept = shared.places(first)
        shared.workspace = shared.workspace or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=shared.workspace):
                for target, result in zip(kept, call(), strict=True):
                    target.copy_(result)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            warnings.warn(f"passes of this model cannot be recorded ({reason}): launched one by one", stacklevel=2)
            return None, first
    return Recording(graph.replay, inputs, kept), first
