"""The twin: one attention module seen two ways, a frozen original and a trainable copy.

Everything a pass says travels in one keyword, `view=`, through the model's own `**kwargs`.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from orthrus.kernels.masks import LayerMasks, Mask, rows_of
from orthrus.model.joined import Joined

ViewName = Literal["ar", "diffusion"]


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """Say which half of every attention module a pass runs through, and under which masks.

    Attributes:
        masks: masks of the whole pass, one per window size; None leaves the model's own mask in place.
        path: for layers with a recurrent state, `[b, i, j]`: whether row j is part of row i's text; None for a chain.
        both_ways: whether rows of a block read, in such layers, those behind them as well.
    """

    name: ViewName
    masks: LayerMasks | None = None
    path: Tensor | None = None
    both_ways: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedView:
    """Say that one pass carries AR rows first and draft rows after them (`Passes.fused`).

    Attributes:
        rows: number of AR rows at the head of the query axis; the rest go through the twin.
        path: for layers with a recurrent state, which AR rows each AR row's text consists of; None for a chain.
        block_path: which rows of the pass, AR rows first, each draft row's text consists of.
        both_ways: whether draft rows read, in such layers, those behind them in their block as well.
    """

    rows: int
    masks: LayerMasks
    path: Tensor | None = None
    block_path: Tensor | None = None
    both_ways: bool = False


class Dual(nn.Module):
    """Hold one module of the backbone, frozen, and its diffusion twin (`orthrus.model.twin.twin_of`).

    The twin starts as a deep copy, so before any training both views compute the same function of their inputs (paper,
    section 3.2). Without a twin (`diffusion` is None), draft rows run through the original too.
    """

    def __init__(self, module: nn.Module, twin: nn.Module | None) -> None:
        super().__init__()
        self.ar = module.requires_grad_(False)
        self.diffusion = twin
        # To whoever saves or loads a state, the backbone's weights have the names that they have without a view.
        self.register_state_dict_post_hook(_name_as_backbone)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_name_as_here)  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        # Decoder layers read flags such as `is_sliding` from their attention; those are the original's to answer.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("ar"), name)

    def module_of(self, view: ViewName) -> nn.Module:
        return self.ar if view == "ar" or self.diffusion is None else self.diffusion


class DualAttention(Dual):
    """Wrap one attention module with its diffusion twin.

    Called without `view=`, it is the original module, bit for bit. Draft rows have masks of their own.
    """

    def __init__(self, attention: nn.Module, twin: nn.Module | None, *, window: int | None) -> None:
        super().__init__(attention, twin)
        self.window = window
        self.joined: Joined | None = None
        """Both halves as one module, where their layers allow it (`orthrus.model.attach.require_reach` sees to it)."""

    def forward(
        self, hidden_states: Tensor, *args: Any, view: View | FusedView | ViewName = "ar", **kwargs: Any
    ) -> Any:
        """Run the original, the twin, or both, with the arguments the model passes to its attention."""
        if isinstance(view, str):
            view = View(name=view)
        if isinstance(view, FusedView):
            return self._fused(hidden_states, *args, view=view, **kwargs)
        if view.masks is not None:
            kwargs["attention_mask"] = view.masks.of(self.window)
        return self.module_of(view.name)(hidden_states, *args, **kwargs)

    def _fused(self, hidden_states: Tensor, *args: Any, view: FusedView, **kwargs: Any) -> Any:
        """Run the AR rows through the original and the others through the twin, in one call where both are joined."""
        mask = view.masks.of(self.window)
        if self.diffusion is None:
            return self.ar(hidden_states, *args, **kwargs | {"attention_mask": mask})
        if self.joined is not None and self.joined.fits(self.ar, self.diffusion):
            return self.joined(hidden_states, *args, rows=view.rows, **kwargs | {"attention_mask": mask})
        return self._in_turn(hidden_states, *args, rows=view.rows, mask=mask, **kwargs)

    def _in_turn(self, hidden_states: Tensor, *args: Any, rows: int, mask: Mask, **kwargs: Any) -> Any:
        """Run AR rows through the original first, so that the twin's rows see the keys they have just written."""
        outputs = []
        for half, part in ((self.ar, slice(None, rows)), (self.module_of("diffusion"), slice(rows, None))):
            given = {name: _rows_of(value, part, hidden_states.shape[1]) for name, value in kwargs.items()}
            given["attention_mask"] = rows_of(mask, part)
            given["past_key_values"] = kwargs["past_key_values"].part(part)
            positional = [_rows_of(value, part, hidden_states.shape[1]) for value in args]
            outputs.append(half(hidden_states[:, part].contiguous(), *positional, **given))  # GPT-2 takes views of them
        first, second = outputs
        return (torch.cat([first[0], second[0]], dim=1), *first[1:])

    def __getstate__(self) -> dict[str, Any]:
        """Leave what is joined out of copies, whose layers are others."""
        return {**self.__dict__, "joined": None}


def _name_as_backbone(dual: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    inner = f"{prefix}ar."
    for name in [name for name in state if name.startswith(inner)]:
        state[prefix + name.removeprefix(inner)] = state.pop(name)


def _name_as_here(dual: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    halves = (f"{prefix}ar.", f"{prefix}diffusion.")
    for name in [name for name in state if name.startswith(prefix) and not name.startswith(halves)]:
        state[f"{prefix}ar.{name.removeprefix(prefix)}"] = state.pop(name)


def _rows_of(value: Any, part: slice, queries: int) -> Any:
    """Cut the query axis (the second) of whatever per-position tensors a model hands to its attention."""
    if isinstance(value, tuple):
        return tuple(_rows_of(item, part, queries) for item in value)
    if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == queries:
        return value[:, part]
    return value
