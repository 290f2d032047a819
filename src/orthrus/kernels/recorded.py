"""Calls recorded as TorchScript graphs, which run the same operations without Python.

Weights in oneDNN's own layout cannot be constants of a graph: they are handed in, in the place of what holds them.
FBGEMM's are no tensors: each is a constant of a small graph that a recording calls (`bound`).
This rests on private parts of torch; where a version lacks them nothing is recorded.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, nn

_TIDY: Final = ("inline", "cse", "constant_pooling", "dce")
_NEEDED: Final = ("_create_graph_by_tracing", "_create_function_from_graph", *(f"_jit_pass_{name}" for name in _TIDY))

_jit: Any = torch.jit  # not typed

Holder = tuple[Any, str]
"""An object, and the name of its attribute that holds a weight in oneDNN's layout."""


def can_record() -> bool:
    return all(hasattr(torch._C, name) for name in _NEEDED)


def is_recording() -> bool:
    return bool(_jit.is_tracing())


def record(
    call: Callable[..., Tensor], inputs: tuple[Any, ...], rewrite: Callable[[Any], object] = bool
) -> Callable[..., Tensor]:
    """Record a call of tensors and lists of tensors; sizes of inputs are read anew at every run.

    All other tensors are held by the recording, which follows what is written into them. `rewrite` is given the graph.

    Raises RuntimeError: the call has an operation that cannot be recorded.
    """
    parts: Any = torch._C
    trace = torch.inference_mode(torch.is_inference_mode_enabled())(parts._create_graph_by_tracing)
    with ThreadPoolExecutor(1) as thread:  # with few callers: torch notes them all with each operation, one by one
        graph, _ = thread.submit(trace, call, inputs, lambda _: "", True, False).result()
    for name in _TIDY:
        getattr(parts, f"_jit_pass_{name}")(graph)
    rewrite(graph)
    function: Callable[..., Tensor] = parts._create_function_from_graph("recorded", graph)

    def run(*given: Any) -> Tensor:
        with _jit.optimized_execution(False):  # which takes longer to prepare, and runs no faster
            return function(*given)

    return run


def operator(namespace: str, name: str) -> Callable[..., Any] | None:
    """Return an operator of oneDNN or FBGEMM; None where a build of torch comes without it."""
    found = getattr(getattr(torch.ops, namespace), name, None)
    return None if found is None else found.default


@cache
def recordable(source: str) -> Callable[..., Tensor]:
    """Return the function `product` of a TorchScript source, for operators whose arguments are not recorded."""
    function: Callable[..., Tensor] = _jit.CompilationUnit(source).product
    return function


def bound(source: str, weight: object) -> Callable[..., Tensor]:
    """Return the function `product(input, weight)` of a TorchScript source, with a weight that is no tensor in it."""
    graph = _jit.CompilationUnit(source).product.graph.copy()
    _, given = graph.inputs()
    graph.setInsertPoint(next(iter(graph.nodes())))
    given.replaceAllUsesWith(graph.insertConstant(weight))
    graph.eraseInput(1)
    parts: Any = torch._C
    function: Callable[..., Tensor] = parts._create_function_from_graph("product", graph)
    return function


def holders_of(model: nn.Module) -> list[Holder]:
    """Return what holds weights in oneDNN's layout in a model, in the order of its layers."""
    owners = [owner for module in model.modules() for owner in (module, module.__dict__.get("_shared"))]
    found = {
        id(owner): (owner, name)
        for owner in owners
        for name, value in getattr(owner, "__dict__", {}).items()
        if isinstance(value, Tensor) and value.is_mkldnn
    }
    return list(found.values())


@contextmanager
def holding(holders: Sequence[Holder], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Let others stand in for these weights meanwhile."""
    kept = [getattr(owner, name) for owner, name in holders]
    for (owner, name), tensor in zip(holders, tensors, strict=True):
        setattr(owner, name, tensor)
    try:
        yield
    finally:
        for (owner, name), tensor in zip(holders, kept, strict=True):
            setattr(owner, name, tensor)
