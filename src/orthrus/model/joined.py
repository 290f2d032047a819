"""One call of an attention module over rows of both views, whose layers multiply each row by its own view's weights.

What has no weights (rotary embeddings, the cache, attention itself) is then run once for all rows.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from orthrus.model.twin import OF_HOOKS


class Split:
    """Where the twin's rows begin in the pass at hand, and the two parts of the last input."""

    def __init__(self) -> None:
        self.rows = 0
        self._input: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()

    def parts(self, input: Tensor, axis: int) -> tuple[Tensor, ...]:
        """Cut an input in two; layers that read the same one get the same tensors, so that their products can merge."""
        if self._input is not input:
            before = (slice(None),) * axis
            first, second = (*before, slice(None, self.rows)), (*before, slice(self.rows, None))
            self._input = input
            self._parts = (input[first].contiguous(), input[second].contiguous())  # GPT-2 takes views of them
        return self._parts

    def forget(self) -> None:
        self._input, self._parts = None, ()


class ByRows(nn.Module):
    """A layer of one name in original and twin: the first rows go through the original's, the others the twin's.

    Both are looked up by name at every call, since layers may be replaced (by adapters, by rounded ones).
    """

    def __init__(self, ar: nn.Module, twin: nn.Module, name: str, axis: int, split: Split) -> None:
        super().__init__()
        self._halves = (ar._modules, twin._modules)  # not registered: they belong to the original and to the twin
        self._name, self._axis, self._split = name, axis, split

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output, rows in their order."""
        parts, name = self._split.parts(input, self._axis), self._name
        outputs = [half[name](part) for half, part in zip(self._halves, parts, strict=True)]  # type: ignore[misc]
        return torch.cat(outputs, dim=self._axis)


class Joined:
    """An attention module and its twin as one, for passes that carry rows of both."""

    def __init__(self, ar: nn.Module, twin: nn.Module, axes: Mapping[str, int]) -> None:
        self._halves = (ar, twin)
        self._split = Split()
        self._module = _without_weights(ar)
        for name, axis in axes.items():
            self._module._modules[name] = ByRows(ar, twin, name, axis, self._split)

    def fits(self, ar: nn.Module, twin: nn.Module) -> bool:
        """Tell whether these are the modules joined, with their class's forward, or what accelerate made of it."""
        if (ar, twin) != self._halves:
            return False
        return not any("forward" in half.__dict__ and "_hf_hook" not in half.__dict__ for half in self._halves)

    def __call__(self, hidden_states: Tensor, *args: Any, rows: int, **kwargs: Any) -> Any:
        """Run the attention module's forward, its first `rows` rows as the original and the others as the twin."""
        self._split.rows = rows
        try:
            return self._module(hidden_states, *args, **kwargs)
        finally:
            self._split.forget()


def _without_weights(module: nn.Module) -> nn.Module:
    """Copy a module but for the layers in it that hold tensors."""
    both = copy.copy(module)
    for name in OF_HOOKS:
        both.__dict__.pop(name, None)
    both.training = False  # passes over rows of both views only decode
    both._modules = {name: _without_weights(child) for name, child in module.named_children() if not _holds(child)}
    return both


def _holds(module: nn.Module, *, recurse: bool = True) -> bool:
    return any(True for held in (module.parameters, module.buffers) for _ in held(recurse=recurse))


def weighted(attention: nn.Module) -> list[str] | None:
    """Return the names of an attention module's layers that hold tensors, adapters whole; None where itself does."""
    if _holds(attention, recurse=False):
        return None
    return [name for name, child in attention.named_children() if _holds(child)]


class Shapes:
    """Observe what shapes the layers of attention modules are called with: one tensor each, which gives another."""

    def __init__(self, attentions: list[nn.Module]) -> None:
        self._paths = [weighted(attention) for attention in attentions]
        self._attentions = attentions
        self._seen: list[list[dict[str, torch.Size]]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        seen: list[dict[str, torch.Size]] = [{} for _ in self._attentions]

        def note(index: int, path: str, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            plain = len(args) == 1 and not kwargs and isinstance(output, Tensor)
            seen[index][path] = args[0].shape if plain else torch.Size()

        with ExitStack() as hooks:
            for index, (attention, paths) in enumerate(zip(self._attentions, self._paths, strict=True)):
                for path in paths or ():
                    noting = partial(note, index, path)
                    hooks.enter_context(attention.get_submodule(path).register_forward_hook(noting, with_kwargs=True))
            yield
        self._seen.append(seen)

    def axes(self) -> list[dict[str, int] | None]:
        """Return for each module on which axis of its layers' inputs rows lie, from passes over other numbers of them.

        None where that is not plain for every layer that holds weights.
        """
        return [
            None if paths is None else _axes(paths, [seen[index] for seen in self._seen])
            for index, paths in enumerate(self._paths)
        ]


def _axes(paths: list[str], seen: list[dict[str, torch.Size]]) -> dict[str, int] | None:
    axes: dict[str, int] = {}
    for path in paths:
        if any(path not in shapes for shapes in seen):
            return None
        sizes = [set(size) for size in zip(*(shapes[path] for shapes in seen), strict=False)]
        differing = [axis for axis, size in enumerate(sizes) if len(size) > 1]
        if len(differing) != 1 or differing[0] == 0:  # on the first axis rows would lie among those of other texts
            return None
        axes[path] = differing[0]
    return axes
