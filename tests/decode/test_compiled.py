"""Compiled passes: the same graph whatever the lengths, and the same texts as eager ones."""

import pytest
import torch
from transformers import PreTrainedModel

from orthrus.decode import plan
from orthrus.decode.engine import Engine
from orthrus.decode.options import Options
from orthrus.model.compiled import compile_passes, is_compiled
from tests import reference
from tests.decode.drive import decode, dual
from tests.families import tiny

PROMPTS = [[5, 6, 7, 8] * 3, [9, 10, 11], [3]]


def compiled(family: str, backend: str) -> PreTrainedModel:
    torch._dynamo.reset()
    model = dual(family, num_hidden_layers=2)
    compile_passes(model, backend=backend)
    assert is_compiled(model)
    return model


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen3", "full"),
        *(pytest.param("gemma3_text", name, marks=pytest.mark.slow) for name in ("tree:6", "lookup")),
        *(pytest.param("qwen3", name, marks=pytest.mark.slow) for name in ("onepass:2", "onepass:2:6")),
    ],
)
def test_texts_are_those_of_the_plain_loop(family: str, name: str) -> None:
    """Traced by torch.compile and run as traced; what inductor makes of it is for `orthrus bench passes --compile`."""
    engine = Engine(compiled(family, "eager"), rows=2, capacity=96, plan=plan.parse(name))
    for prompt, row in zip(PROMPTS, decode(engine, PROMPTS, Options(max_new_tokens=12)), strict=True):
        assert row.token_ids == reference.greedy_text(tiny(family, num_hidden_layers=2), prompt, 12)


def test_a_graph_serves_every_length() -> None:
    """A text that grows by a cycle at a time is not compiled again for each."""
    torch._dynamo.reset()
    model = dual(num_hidden_layers=1)
    traced: list[int] = []

    def count(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        traced.append(len(traced))
        return graph.forward

    compile_passes(model, backend=count)
    engine = Engine(model, rows=1, capacity=600, plan=plan.parse("full"))
    decode(engine, [[5, 6, 7]], Options(max_new_tokens=20))
    before = len(traced)
    decode(engine, [[9, 6, 7, 8]], Options(max_new_tokens=400))
    assert len(traced) <= before + 2
