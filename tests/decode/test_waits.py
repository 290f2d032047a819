"""A cycle waits for the device once, to fetch its verdict: counted by what would wait, since a CPU never does."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from orthrus.decode.engine import Engine
from orthrus.decode.options import Options, Sampling
from orthrus.policy import steps
from tests.decode.drive import BLOCK, dual

FETCHES = {"tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"}
"""Tensor methods that bring numbers to the host."""

MEASURES = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "argwhere", "masked_select", "_unique2"}
"""Operators whose result, or its size, the host has to know before it goes on."""


class Waits(TorchFunctionMode):
    """Note whatever would make the host wait for an accelerator, and copies to it that come behind its work.

    A copy from the host waits for what was launched before: nothing at the start of a cycle, a pass later on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.launched = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        more, name = kwargs or {}, getattr(func, "__name__", "")
        if name in FETCHES:
            self.seen.append(name)
        if name in ("tensor", "as_tensor") and "device" in more and self.launched:
            self.seen.append("a copy behind a pass")
        return func(*args, **more)


class Measures(TorchDispatchMode):
    """Note operators that would, from wherever they are called."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]
        )
        by_counts = name == "repeat_interleave" and isinstance(args[-1], Tensor)
        if name in MEASURES or by_mask or by_counts:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


GREEDY = Sampling()
PENALISED = Sampling(repetition_penalty=1.3)
DRAWN = Sampling(do_sample=True, temperature=0.9, top_k=20, top_p=0.9, min_p=0.01)
CROWDS = {"greedy": [GREEDY, GREEDY], "sampled": [DRAWN, DRAWN], "mixed": [GREEDY, DRAWN, PENALISED]}


@pytest.mark.parametrize("crowd", CROWDS)
@pytest.mark.parametrize("name", ["ar", "full", "tree:6", "onepass:2", "lookup", "auto"])
def test_a_cycle_waits_for_the_device_once(name: str, crowd: str) -> None:
    """One `tolist` a step once all rows have joined, and nothing else that waits, whatever the rows ask for."""
    model, chosen = dual("gemma3_text"), steps.parse(name)
    room = Engine.room(8, 40, chosen.scratch(BLOCK))
    engine = Engine(model, rows=3, capacity=room, plan=chosen)
    for place, sampling in enumerate(CROWDS[crowd]):
        engine.add([5 + place, 6, 7, 5, 6, 7, 5], Options(max_new_tokens=40, sampling=sampling))
    engine.step()
    waits = Waits()
    model.register_forward_hook(lambda *_: setattr(waits, "launched", True))
    for _ in range(4):
        waits.seen.clear()
        waits.launched = False
        with waits, Measures(waits.seen):
            engine.step()
        assert waits.seen == ["tolist"]
    assert len(engine.live) == len(CROWDS[crowd])
