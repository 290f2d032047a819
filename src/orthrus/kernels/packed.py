"""Linear layers for decoding on CPUs: a second copy of the weights, as the kernels at hand read them best.

A plain linear layer's weights are rearranged by the kernel in every pass; oneDNN takes weights laid out once. Many CPUs
cannot multiply in 16 bits: FBGEMM reads weights in float16 there and multiplies in float32, which float32 copies
replace where it is missing. `tune` measures where the weights themselves are read faster: for one row, or few, by an
operator of our own where it is compiled (`orthrus.kernels.compiled`).
"""

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Literal, NamedTuple, TypeVar

import psutil
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from orthrus.kernels import fbgemm
from orthrus.kernels.attention import FEW
from orthrus.kernels.compiled import instructions, linear_few
from orthrus.kernels.native import multiplies
from orthrus.kernels.recorded import is_recording, operator, recordable
from orthrus.kernels.shared import Shared
from orthrus.kernels.watched import PLAIN, may_change_unseen, state_of, unwatch, watch

_Layer = TypeVar("_Layer", bound=nn.Linear)

_ROWS = 16  # what the layout is made for; any number of rows can be multiplied

_AMPLE = 1 << 19  # elements; below AVX-512 a packed product of fewer costs more to call than it saves

_TYPES = (torch.float32, torch.bfloat16, torch.float16)

_SAMPLE = 1 << 26  # elements timed by `tune`: more than caches hold, where a model has as many
_TRIES = 5
_PATIENCE = 0.2  # seconds after which no more tries begin
_CLEARLY = 0.9  # of the copy's time, that the weights themselves must stay below


class Copy(NamedTuple):
    """How the second copy of a weight is kept: in which precision, and laid out for whose kernels."""

    dtype: torch.dtype
    layout: Literal["torch", "oneDNN", "FBGEMM"]


class AsIs(NamedTuple):
    """Which products are made with the weights as they are, in spite of a copy: those of one row, of several rows.

    Those of one row by an operator of our own (`own`), where it is compiled, and by tiles (AMX) those of up to
    `attention.FEW` rows of one text (`few`). More rows, and more texts, have recordings of their own
    (`orthrus.model.call`), which multiply by the copies.
    """

    one: bool = False
    several: bool = False
    own: bool = False
    few: bool = False


_OF_ITS_OWN = ("_shared", "_index", "_own")  # attributes of a packed layer that its copies make anew
_OWN_TYPES = (torch.float32, torch.bfloat16)  # of our own operator, which multiplies so many inputs at once:
_WIDTH = 16

_tuned: dict[tuple[object, ...], AsIs] = {}


class PackedLinear(nn.Linear):
    """A linear layer that multiplies by a copy of its weights in inference mode, which decoding runs in.

    The copy is made at the first use, and again once the weights may have changed (`orthrus.kernels.watched`); where
    that cannot be told it is `nn.Linear`, and so it is where no copy would help (`copy_for`) and under autocast.
    Layers that read the same input have one copy of all their weights, and one product. Results are those of
    `nn.Linear` up to rounding, as between any two kernels.
    """

    _shared: "_Shared | None" = None
    _index = 0
    as_is = AsIs()
    _own: Callable[..., Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu"):
            if self._shared is None:
                self._shared, self._index = _Shared([self]), 0
            several, weight = input.numel() != input.shape[-1], self.weight
            few = not several or (self.as_is.few and input.dim() == 3 and len(input) == 1 and input.shape[1] <= FEW)
            if self._own is not None and few and weight.is_cpu and input.dtype == weight.dtype in _OWN_TYPES:
                return self._own(input, weight, self.bias)
            if not self.as_is[several] and self._shared.takes(input, several=several, again=self._index > 0):
                return self._shared.output(self._index, input)
        return linear(input, self._parameters["weight"], self._parameters["bias"])  # type: ignore[arg-type]

    def __getstate__(self) -> dict[str, object]:
        """Leave the copied weights out of copies of the layer, which make their own."""
        return {name: value for name, value in self.__dict__.items() if name not in _OF_ITS_OWN}


class _Shared(Shared[PackedLinear]):
    """The copied weights of layers that read the same input."""

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        super().__init__(layers)
        self.copy: Tensor | fbgemm.Weights | None = None
        self._state: list[tuple[int, ...]] = []

    def takes(self, input: Tensor, *, several: bool, again: bool) -> bool:
        """Tell whether the copy serves an input; it is brought up to date unless that was done for this one."""
        if not (again and self._input is input):
            self._refresh()
        copy, weight = self.copy, self.layers[0].weight
        if copy is None or input.dtype != weight.dtype or input.dim() < 2:  # FBGEMM takes no vectors
            return False
        # Where a copy is wider, the time of one row is that of reading weights: the fewer bytes win.
        return several or copy.itemsize <= weight.itemsize

    def product(self, input: Tensor) -> Tensor:
        """Return the outputs of all layers, one after another."""
        assert self.copy is not None
        biases = [layer.bias.to(self.copy.dtype) for layer in self.layers if layer.bias is not None]
        bias = torch.cat(biases) if len(biases) > 1 else biases[0] if biases else None
        return _multiply(input.to(self.copy.dtype), self.copy, bias).to(input.dtype)

    def forget(self) -> None:
        self.copy, self._state = None, []

    def _refresh(self) -> None:
        weights = [layer.weight for layer in self.layers]
        if [state_of(weight) for weight in weights] == self._state:
            return
        for weight in weights:
            watch(weight)
        unseen = any(map(may_change_unseen, weights))
        self.copy = None if unseen else _copied(weights)
        self._state = [] if unseen else [state_of(weight) for weight in weights]


_product, _reorder = operator("mkldnn", "_linear_pointwise"), operator("mkldnn", "_reorder_linear_weight")

_RECORDED = """
def product(input, weight, bias: Optional[Tensor]):
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
"""


def copy_for(weight: Tensor, *, half: bool = True) -> Copy | None:
    """Return the copy of a weight that makes products faster here; None where the weight itself is as good.

    Its precision is the weight's own where the CPU multiplies in that, else float16 by FBGEMM (`half`: where it holds
    the weight), or float32. CPUs with AVX-512 get all weights laid out for oneDNN, others the large ones.
    """
    if type(weight) not in PLAIN or weight.device.type != "cpu" or weight.dtype not in _TYPES:
        return None
    native = multiplies(weight.dtype)
    if half and not native and fbgemm.can_half():
        return Copy(torch.float16, "FBGEMM")
    can_pack = _product is not None and _reorder is not None and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if can_pack and (torch.backends.cpu.get_cpu_capability() == "AVX512" or weight.numel() >= _AMPLE):
        return Copy(weight.dtype if native else torch.float32, "oneDNN")
    return None if native else Copy(torch.float32, "torch")


def _copied(weights: Sequence[Tensor]) -> Tensor | fbgemm.Weights | None:
    whole = torch.cat([weight.detach() for weight in weights]) if len(weights) > 1 else weights[0].detach()
    kind = copy_for(whole)
    if kind is not None and kind.layout == "FBGEMM":
        if (halves := fbgemm.in_half(whole)) is not None:
            return halves
        kind = copy_for(whole, half=False)
    if kind is None:
        return None
    dense = whole.to(kind.dtype).contiguous()
    if kind.layout != "oneDNN" or _reorder is None:
        return dense
    packed: Tensor = _reorder(dense, _ROWS)
    return packed


def _multiply(input: Tensor, copy: Tensor | fbgemm.Weights, bias: Tensor | None) -> Tensor:
    if isinstance(copy, fbgemm.Weights):
        wide = copy(input)
        return wide if bias is None else wide.add_(bias)
    if not copy.is_mkldnn or _product is None:
        return linear(input, copy, bias)
    if is_recording():
        return recordable(_RECORDED)(input, copy, bias)
    out: Tensor = _product(input, copy, bias, "none", [], "")
    return out


def pack(model: nn.Module, groups: Sequence[Sequence[nn.Linear]] = ()) -> None:
    """Let a model's linear layers multiply by copies of their weights from now on, in place, where that is faster.

    Layers of a group read the same input, one after another in this order.
    """
    for module in _of_class(model, nn.Linear):
        if type(module.weight) in PLAIN:  # a quantised weight has kernels of its own
            module.__class__ = PackedLinear
    for group in groups:
        layers = [layer for layer in group if isinstance(layer, PackedLinear)]
        if len(layers) == len(group):
            shared = _Shared(layers)
            for index, layer in enumerate(layers):
                layer._shared, layer._index = shared, index


def watch_weights(model: nn.Module) -> None:
    """Watch the weights of packed layers before they are copied, so that `state_of` does not change when they are."""
    for layer in _of_class(model, PackedLinear):
        watch(layer.weight)


def tune(model: nn.Module, *, clock: Callable[[], float] = perf_counter) -> None:
    """Let packed layers multiply by the weights as they are wherever that is clearly faster here, as measured.

    One row and several are timed apart, over layer after layer, so that weights come from as far away as in a pass. If
    neither gains by the copies, they are dropped. Measured once a process for layers of these shapes, so that models
    loaded alike compute alike.
    """
    layers, size = [], 0
    for layer in _of_class(model, PackedLinear):
        if size < _SAMPLE and copy_for(layer.weight) is not None:
            layers.append(layer)
            size += layer.weight.numel()
    if not layers:
        return
    key = (torch.get_num_threads(), *((tuple(layer.weight.shape), layer.weight.dtype) for layer in layers))
    own = linear_few(start=False)
    if key not in _tuned:
        alone = AsIs(one=True, several=True)
        one, several = (_faster_as_is(layers, rows, own, clock, alone) for rows in (1, _ROWS))
        tiled = one and own is not None and instructions() == "amx" and all(map(_fits_tiles, layers))
        few = tiled and _faster_as_is(layers, _ROWS, own, clock, AsIs(one=True, few=True))
        _tuned[key] = AsIs(one, several, one and own is not None, few)
    if own is None:
        linear_few()  # whose compiler would have disturbed what was timed
    for layer in _of_class(model, PackedLinear):
        layer.as_is = _tuned[key]._replace(few=_tuned[key].few and _fits_tiles(layer))
        layer._own = own if _tuned[key].own and _takes_own(layer) else None
        if _tuned[key].one and _tuned[key].several and layer._shared is not None:
            layer._shared.forget()
    if _tuned[key] == AsIs(one=True, several=True):
        unpack(model)


def _takes_own(layer: PackedLinear) -> bool:
    """Tell whether our own operator multiplies by a layer's weights."""
    alike = layer.bias is None or layer.bias.dtype == layer.weight.dtype
    fits = layer.in_features > 0 and layer.in_features % _WIDTH == 0
    return alike and fits and layer.weight.dtype in _OWN_TYPES


def _fits_tiles(layer: PackedLinear) -> bool:
    """Tell whether our own operator multiplies a layer's weights by tiles."""
    return layer.weight.dtype == torch.bfloat16 and layer.in_features % 32 == 0 == layer.out_features % 16


@torch.inference_mode()
def _faster_as_is(
    layers: Sequence[PackedLinear],
    rows: int,
    own: Callable[..., Tensor] | None,
    clock: Callable[[], float],
    tried: AsIs,
) -> bool:
    """Tell whether layers multiply so many rows clearly faster by their weights, as is tried, than by their copies."""
    zeros = {layer.in_features: layer.weight.new_zeros(1, rows, layer.in_features) for layer in layers}
    inputs = [zeros[layer.in_features] for layer in layers]
    seconds: dict[AsIs, list[float]] = {AsIs(): [], tried: []}
    began = clock()
    for attempt in range(1 + _TRIES):
        if attempt > 1 and clock() - began > _PATIENCE:
            break
        for as_is, times in seconds.items():
            for layer in layers:
                layer.as_is = as_is
                layer._own = own if as_is.one and _takes_own(layer) else None
            started = clock()
            for layer, input in zip(layers, inputs, strict=True):
                layer(input)
            if attempt:  # the first makes the copies
                times.append(clock() - started)
    copies, weights = map(min, seconds.values())
    return weights < _CLEARLY * copies


def unpack(model: nn.Module) -> None:
    """Make packed layers plain ones again, and free their copies."""
    for module in _of_class(model, PackedLinear):
        module.__class__ = nn.Linear  # type: ignore[assignment]
        unwatch(module.weight)
        for name in (*_OF_ITS_OWN, "as_is"):
            module.__dict__.pop(name, None)


def kernels_of(model: nn.Module) -> frozenset[AsIs]:
    """Return by which kernels a model's packed layers multiply; none where it is not packed.

    Copies of a layer, and layers of other widths, have no operator of our own.
    """
    found = {(layer.as_is, layer._own is not None) for layer in _of_class(model, PackedLinear)}
    return frozenset(as_is._replace(own=own, few=own and as_is.few) for as_is, own in found)


def pays(model: nn.Module) -> bool:
    """Tell whether packing helps here: some weights are better copied, and memory has room for that to spare."""
    weights = [module.weight for module in _of_class(model, nn.Linear)]
    copies = [(weight.numel(), kind) for weight in weights if (kind := copy_for(weight)) is not None]
    size = sum(numel * kind.dtype.itemsize for numel, kind in copies)
    free: int = psutil.virtual_memory().available
    return 0 < size < free / 2


def _of_class(model: nn.Module, kind: type[_Layer]) -> list[_Layer]:
    return [module for module in model.modules() if type(module) is kind]
