"""A gated-delta-rule layer seen two ways: the frozen one, and a twin for draft rows where there is one.

The layer's own forward runs, but for two functions that it calls by name: the short convolution and the rule
(`orthrus.model.delta`). A layer that does not look as expected is refused by name.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import FunctionType
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from orthrus.errors import UnsupportedModel
from orthrus.model import delta
from orthrus.model.dual import Dual, FusedView, View, ViewName

CONVOLUTION: Final = "causal_conv1d_fn"
RULE: Final = "torch_chunk_gated_delta_rule"
"""Functions of transformers that a layer's forward calls by these names."""


class Recurrence(Protocol):
    """What one layer computes with in one pass; a stand-in for a cache returns it from `recurrence(layer_idx)`."""

    def convolve(self, input_BTC: Tensor, weight_CW: Tensor, path_BTM: Tensor | None) -> Tensor:
        """Return the short convolution of some rows' inputs; in fused passes AR rows come first, then the blocks."""
        ...

    def rule(self, inputs: delta.Inputs, path_BTM: Tensor | None, *, both_ways: bool = False) -> Tensor:
        """Return what some rows read of the state, `[B, T, H, D]`, and of those behind them where blocks do both."""
        ...


class DualMixer(Dual):
    """Wrap one gated-delta-rule layer, and its diffusion twin if it has one.

    Called without `view=`, or without a cache that keeps recurrent states, it is the original module, bit for bit.
    """

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        view: View | FusedView | ViewName = "ar",
        **kwargs: Any,
    ) -> Tensor:
        """Run the original, the twin, or both, with the arguments the model passes to its mixer."""
        if not hasattr(cache_params, "recurrence"):
            if not isinstance(view, str):
                raise UnsupportedModel(
                    f"{type(self.ar).__name__} needs a cache that keeps recurrent states in a pass of a view, found "
                    f"{type(cache_params).__name__}"
                )
            kwargs |= {"cache_params": cache_params, "attention_mask": attention_mask}
            plain: Tensor = self.module_of(view)(hidden_states, **kwargs)
            return plain
        for half in (self.ar, self.diffusion):
            if half is not None and not mixes(half):
                raise _replaced(half)
        if isinstance(view, str):
            view = View(name=view)
        recurrence: Recurrence = cache_params.recurrence(self.layer_idx)
        if isinstance(view, View):
            one = Part(path_BTM=view.path, both_ways=view.both_ways)
            return mix(self.module_of(view.name), hidden_states, recurrence, [one])
        first = Part(slice(None, view.rows), view.path)
        second = Part(slice(view.rows, None), view.block_path, view.both_ways)
        if self.diffusion is None:
            return mix(self.ar, hidden_states, recurrence, [first, second])
        halves = ((self.ar, first), (self.diffusion, second))
        outs = [mix(half, hidden_states[:, p.rows], recurrence, [p._replace(rows=slice(None))]) for half, p in halves]
        return torch.cat(outs, dim=1)


def mixes(module: nn.Module) -> bool:
    """Tell whether a module is a layer whose recurrence can be taken over."""
    plain = isinstance(getattr(module, "layer_idx", None), int) and "forward" not in module.__dict__
    return plain and _calling_both(type(module).forward) is not None


class Part(NamedTuple):
    """Rows of a pass that share a relation of who sees whom: `path_BTM` as `delta.solve` takes it.

    `both_ways` says whether they read those behind them as well.
    """

    rows: slice = slice(None)
    path_BTM: Tensor | None = None
    both_ways: bool = False


def mix(module: nn.Module, hidden_BTC: Tensor, recurrence: Recurrence, parts: Sequence[Part] = (Part(),)) -> Tensor:
    """Run a layer's own forward over some rows of a pass, these `parts` of them at a time; computes in float32.

    Raises UnsupportedModel: the layer's forward has been replaced since the view was attached.
    """
    forward = _calling_both(type(module).forward)
    if forward is None:
        raise _replaced(module)

    def convolve(
        hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
    ) -> Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            input_BTC = hidden_states.transpose(1, 2).to(weight.dtype)
            out_BTC = _joined([recurrence.convolve(input_BTC[:, p.rows], weight, p.path_BTM) for p in parts])
        out_BTC = out_BTC if bias is None else out_BTC + bias
        out_BTC = out_BTC if activation is None else ACT2FN[activation](out_BTC)
        return out_BTC.transpose(1, 2).to(hidden_states.dtype)

    def rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        use_qk_l2norm_in_kernel: bool = False,
        **_: Any,
    ) -> tuple[Tensor, None]:
        with torch.autocast(query.device.type, enabled=False):
            inputs = delta.inputs(query, key, value, g, beta, normalise=use_qk_l2norm_in_kernel)
            outs = [recurrence.rule(inputs.part(p.rows), p.path_BTM, both_ways=p.both_ways) for p in parts]
            return _joined(outs).to(query.dtype), None

    relinked = _relinked(forward, {CONVOLUTION: convolve, RULE: rule})
    out_BTC: Tensor = relinked(module, hidden_BTC, cache_params=_Stateless(), attention_mask=None)
    return out_BTC


def _replaced(module: nn.Module) -> UnsupportedModel:
    return UnsupportedModel(
        f"{type(module).__name__} must run transformers' own forward, found another set after the view was attached, "
        f"which does not call {CONVOLUTION} and {RULE}: take it off, or decode without a view"
    )


@lru_cache
def _calling_both(forward: Callable[..., Any]) -> FunctionType | None:
    """Return a forward without what transformers wraps it in; None where it does not look as expected."""
    inner = inspect.unwrap(forward)
    if not isinstance(inner, FunctionType):
        return None
    called = {CONVOLUTION, RULE} <= {*inner.__code__.co_names} & inner.__globals__.keys()
    return inner if called and "cache_params" in inspect.signature(inner).parameters else None


def _relinked(function: FunctionType, others: dict[str, Callable[..., Any]]) -> FunctionType:
    """Return a function that differs from another one only in what some global names stand for."""
    names = {**function.__globals__, **others}
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Put the rows of several parts together, without a copy where there is one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


class _Stateless:
    """A cache, to a layer's forward, that holds nothing: what is kept, the recurrence keeps."""

    def get_conv_state(self, *_: Any, **__: Any) -> None:
        return None

    def get_recurrent_state(self, *_: Any, **__: Any) -> None:
        return None

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        return False

    def update_conv_state(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    def update_recurrent_state(self, *_: Any, **__: Any) -> None:
        return None
