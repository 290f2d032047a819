"""Recordings in which one operation in C++ stands for several, with the same bits: norms, rotations, attention.

Other forms stay as they are. Whether results are the same is for whoever records to check. Rests on private parts of
torch, like `orthrus.kernels.recorded`.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple, TypeAlias

import torch

from orthrus.kernels.compiled import between

_ALL: Final = 2**63 - 1  # where a slice ends that takes all
_NUMBERS: Final[dict[torch.dtype | None, int]] = {torch.float32: 6, torch.bfloat16: 15}  # of types, as graphs name them

_LEAST: Final = 8  # numbers of a row that torch adds up as the operator does

Graph: TypeAlias = Any  # not typed, and neither are
Node: TypeAlias = Any
Value: TypeAlias = Any


def rewrite(graph: Graph) -> bool:
    """Rewrite a recorded graph in place; tells whether operations in C++ stand in it then."""
    if (names := between()) is None:
        return False
    for node in graph.nodes():
        if (same := _as_it_was(node)) is not None:
            node.output().replaceAllUsesWith(same)
    changed = False
    for node in list(graph.nodes()):
        for find, name in zip((_norm, _rotation), names, strict=True):
            if (inputs := find(node)) is not None:
                _replace(graph, node, name, inputs)
                changed = True
    for node in list(graph.nodes()):
        if (found := _attention(node)) is not None:
            _replace(graph, node, node.kind().replace("orthrus::attention", "attended"), found[0])
            for write in found[1]:
                write.destroy()
    torch._C._jit_pass_dce(graph)
    return changed


def _replace(graph: Graph, node: Node, name: str, inputs: Iterable[Value | float]) -> None:
    """Let an operation of our own stand for a node."""
    graph.setInsertPoint(node)
    values = [graph.insertConstant(x) if isinstance(x, float) else x for x in inputs]
    one = graph.insertNode(graph.create(f"orthrus::{name}", values, 1))
    one.output().setType(node.output().type())
    node.output().replaceAllUsesWith(one.output())


def _as_it_was(node: Node) -> Value | None:
    """Return the value that a node gives as it was: cast to its own type, sliced whole, or an integer."""
    inputs = list(node.inputs())
    constants = [x.toIValue() for x in inputs[1:]]
    if node.kind() == "aten::to" and len(inputs) == 5:
        return inputs[0] if constants == [_NUMBERS.get(_dtype(inputs[0])), False, False, None] else None
    if node.kind() == "aten::slice" and constants[1:] == [0, _ALL, 1]:
        return inputs[0]
    if node.kind() == "aten::Int" and inputs[0].node().kind() == "prim::NumToTensor":
        return inputs[0].node().input()
    return None


def _norm(node: Node) -> tuple[Value, Value, float] | None:
    """Return rows, weights and epsilon of the norm that a node ends: `weight * (x * rsqrt(mean + epsilon))`."""
    for weight, normal in _factors(node):
        dtype = _dtype(node.output())
        narrow = dtype == torch.bfloat16  # then rows are widened first, and rounded before the weight
        if narrow and not _is(normal.node(), "aten::to"):
            continue
        for wide, root in _factors(normal.node().inputsAt(0).node() if narrow else normal.node()):
            if narrow and not _is(wide.node(), "aten::to"):
                continue
            rows = wide.node().inputsAt(0) if narrow else wide
            epsilon = _epsilon(root.node(), wide)
            alike = _dtype(rows) == _dtype(weight) == dtype and _dtype(wide) == torch.float32
            if epsilon is not None and alike and weight.type().dim() == 1 and rows.type().sizes()[-1] >= _LEAST:
                return rows, weight, epsilon
    return None


def _epsilon(root: Node, wide: Value) -> float | None:
    """Return what is added to rows' mean square before its root is taken; None where a node gives another thing."""
    total = root.inputsAt(0).node() if _is(root, "aten::rsqrt") else root
    mean = total.inputsAt(0).node() if _is(total, "aten::add") else root
    square = mean.inputsAt(0).node() if _is(mean, "aten::mean") else root
    if not _is(square, "aten::pow") or not _same(square.inputsAt(0), wide) or square.inputsAt(1).toIValue() != 2:
        return None
    over = [x.toIValue() for x in mean.inputsAt(1).node().inputs()]
    known = over in ([-1], [wide.type().dim() - 1]) and mean.inputsAt(2).toIValue() is True
    epsilon, times = (total.inputsAt(i).toIValue() for i in (1, 2))
    return float(epsilon) if known and epsilon is not None and times == 1 else None


def _rotation(node: Node) -> tuple[Value, Value, Value] | None:
    """Return rows, cosines and sines of the rotation that a node ends: `x * cos + cat(-second, first) * sin`."""
    if not _is(node, "aten::add") or node.inputsAt(2).toIValue() != 1:
        return None
    for rows, cos in _factors(node.inputsAt(0).node()):
        for turned, sin in _factors(node.inputsAt(1).node()):
            shape = rows.type().sizes()
            if _halves(turned.node(), rows) and len(shape or ()) == 4 and all(_angles(x, shape) for x in (cos, sin)):
                return rows, cos, sin
    return None


def _halves(node: Node, rows: Value) -> bool:
    """Tell whether a node puts the second half of rows, negated, before the first."""
    if not _is(node, "aten::cat") or node.inputsAt(1).toIValue() not in (-1, 3):
        return False
    second, first = node.inputsAt(0).node().inputs()
    if not _is(second.node(), "aten::neg"):
        return False
    halves = [x.node() for x in (second.node().inputsAt(0), first)]
    cut = all(_is(half, "aten::slice") and _same(half.inputsAt(0), rows) for half in halves)
    size = rows.type().sizes()
    return cut and all(half.output().type().sizes() == [*size[:3], size[3] // 2] for half in halves)


def _angles(value: Value, rows: list[int]) -> bool:
    """Tell whether a value has the shape of angles for rows `[B, H, Q, C]`."""
    size = value.type().sizes()
    return len(size or ()) == 4 and size[1] == 1 and size[2:] == rows[2:]


class _Kept(NamedTuple):
    """What a pass writes into a buffer `[R, S, N, D]`, from which row and slot on, and how many slots are read."""

    new: Value
    buffer: Value
    first: Value
    start: Value
    span: Value
    write: Node


def _attention(node: Node) -> tuple[list[Value], list[Node]] | None:
    """Return the inputs of an operation that also writes what is attended to, and the nodes that write it so far."""
    if not node.kind().startswith("orthrus::attention_"):
        return None
    query, key, value, mask, scale = node.inputs()
    keys, values = _kept(key), _kept(value)
    if keys is None or values is None or not all(map(_same, keys[2:5], values[2:5])):
        return None
    where = [keys.first, keys.start, keys.span]
    return [query, keys.new, values.new, keys.buffer, values.buffer, mask, scale, *where], [keys.write, values.write]


def _kept(value: Value) -> _Kept | None:
    """Return how keys or values are written and read, where nothing else in the graph looks at their buffer."""
    read = _cut(_turned(value))
    if read is None or read[2].toIValue() != 0:
        return None
    buffer, first, _, span = read
    users = [use.user for use in buffer.uses()]
    for dim in (0, 1):
        if not all(_is(user, "aten::slice") and user.inputsAt(1).toIValue() == dim for user in users):
            return None
        users = [use.user for user in users for use in user.output().uses()]
    writes = [user for user in users if _is(user, "aten::copy_")]
    written = _cut(writes[0].inputsAt(0)) if len(users) == 2 and len(writes) == 1 else None
    new = None if written is None else _turned(writes[0].inputsAt(1))
    if written is None or new is None or not _same(written[1], first):
        return None
    return _Kept(new=new, buffer=buffer, first=first, start=written[2], span=span, write=writes[0])


def _turned(value: Value) -> Value | None:
    """Return `[B, N, Q, D]` of its transpose `[B, Q, N, D]`, and the other way round; None for other values."""
    node = value.node()
    turns = _is(node, "aten::transpose") and sorted(node.inputsAt(i).toIValue() for i in (1, 2)) == [1, 2]
    return node.inputsAt(0) if turns else None


def _cut(value: Value | None) -> tuple[Value, Value, Value, Value] | None:
    """Return a buffer, the first of its rows that are cut out, and the first of their slots and the end of these."""
    if value is None or not _is(slots := value.node(), "aten::slice"):
        return None
    rows = slots.inputsAt(0).node()
    if not _is(rows, "aten::slice"):
        return None
    steps = [node.inputsAt(i).toIValue() for node, i in ((slots, 1), (slots, 4), (rows, 1), (rows, 4))]
    if steps != [1, 1, 0, 1]:
        return None
    return rows.inputsAt(0), rows.inputsAt(2), slots.inputsAt(2), slots.inputsAt(3)


def _factors(node: Node) -> Iterator[tuple[Value, Value]]:
    """Return the two factors of a product of tensors in either order; nothing of other nodes."""
    if _is(node, "aten::mul"):
        one, other = node.inputs()
        if all(x.type().kind() == "TensorType" for x in (one, other)):
            yield one, other
            yield other, one


def _is(node: Node, kind: str) -> bool:
    found: str = node.kind()
    return found == kind


def _same(one: Value, other: Value) -> bool:
    return bool(one.debugName() == other.debugName())


def _dtype(value: Value) -> torch.dtype | None:
    kind = value.type()
    return kind.dtype() if kind.kind() == "TensorType" else None
