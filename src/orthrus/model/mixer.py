"""A gated-delta-rule layer seen two ways: the frozen one, and a twin for draft rows where there is one.

The layer's own forward runs, with its projections, norms and gates, but for two functions that it calls by name: the
short convolution and the rule (`orthrus.model.delta`). In passes over a cache of ours both follow who sees whom in the
pass. No architecture is written again; a layer that does not look as expected is refused by name.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any, Final, Protocol

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
        if isinstance(view, str):
            view = View(name=view)
        recurrence: Recurrence = cache_params.recurrence(self.layer_idx)
        if isinstance(view, View):
            return mix(self.module_of(view.name), hidden_states, recurrence, view.path, both_ways=view.both_ways)
        ar, blocks = hidden_states[:, : view.rows], hidden_states[:, view.rows :]
        first = mix(self.ar, ar, recurrence, view.path)
        twin = self.module_of("diffusion")
        second = mix(twin, blocks, recurrence, view.block_path, both_ways=view.both_ways)
        return torch.cat([first, second], dim=1)


def mixes(module: nn.Module) -> bool:
    """Tell whether a module is a layer whose recurrence can be taken over."""
    return isinstance(getattr(module, "layer_idx", None), int) and _forward_of(module) is not None


def mix(
    module: nn.Module,
    hidden_BTC: Tensor,
    recurrence: Recurrence,
    path_BTM: Tensor | None = None,
    *,
    both_ways: bool = False,
) -> Tensor:
    """Run a layer's own forward over some rows of a pass; what it computes with is computed in float32.

    Raises:
        UnsupportedModel: the layer's forward has been replaced since the view was attached.
    """
    forward = _forward_of(module)
    if forward is None:
        raise UnsupportedModel(
            f"{type(module).__name__} must run transformers' own forward, found another set after the view was "
            f"attached, which does not call {CONVOLUTION} and {RULE}: take it off, or decode without a view"
        )

    def convolve(
        hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
    ) -> Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            out_BTC = recurrence.convolve(hidden_states.transpose(1, 2).to(weight.dtype), weight, path_BTM)
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
            return recurrence.rule(inputs, path_BTM, both_ways=both_ways).to(query.dtype), None

    relinked = _relinked(forward, {CONVOLUTION: convolve, RULE: rule})
    out_BTC: Tensor = relinked(module, hidden_BTC, cache_params=_Stateless(), attention_mask=None)
    return out_BTC


def _forward_of(module: nn.Module) -> FunctionType | None:
    """Return a layer's forward; None where it is not its class's own, or does not call the two functions by name."""
    return None if "forward" in module.__dict__ else _calling_both(type(module).forward)


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
