"""Drive an engine to the end, and drafters that stand in for the twin."""

import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import orthrus
from orthrus.decode.drafters import ViewDrafter
from orthrus.decode.engine import Engine
from orthrus.decode.options import Options
from orthrus.decode.passes import Passes
from orthrus.decode.rows import Row
from orthrus.model.attachment import attachment_of, config_of
from orthrus.policy import steps
from orthrus.policy.acceptance import RowState
from orthrus.policy.steps import Step
from tests.families import perturb, tiny

BLOCK = 8


def dual(family: str = "qwen3", *, attn: str | None = "orthrus", **overrides: object) -> PreTrainedModel:
    """A model whose view is an untrained one moved at random: sometimes right, mostly wrong."""
    config = orthrus.OrthrusConfig(block_size=BLOCK)
    model = orthrus.attach(tiny(family, **overrides), config, attn_implementation=attn)
    perturb(model)
    return model


def configure(model: PreTrainedModel, **fields: object) -> PreTrainedModel:
    """Let a model's view be taken for one that was trained otherwise."""
    attachment_of(model).config = dataclasses.replace(config_of(model), **fields)  # type: ignore[arg-type]
    return model


def engine_of(model: PreTrainedModel, *, rows: int = 3, capacity: int = 96, block: int = 4, **more: object) -> Engine:
    """An engine of `fixed:block`, or of plain decoding for a block of 1."""
    chosen = steps.parse("ar" if block == 1 else f"fixed:{block}")
    return Engine(model, rows=rows, capacity=capacity, plan=chosen, **more)  # type: ignore[arg-type]


def finish(engine: Engine) -> dict[int, Row]:
    """Step until nothing is left; returns every row that moved, by id."""
    return {progress.row.id: progress.row for progress in engine.run()}


def decode(engine: Engine, prompts: Sequence[Sequence[int]], options: Sequence[Options] | Options) -> list[Row]:
    """Complete prompts, each with its own options or all with the same; returns their rows in order."""
    return engine.finish(prompts, options)


def scripted(engine: Engine, choose: Callable[[Sequence[RowState]], Step]) -> None:
    """Let an engine take the steps that a function chooses; its policy learns nothing."""
    engine.policy.choose = choose  # type: ignore[method-assign,assignment]
    engine.policy.learn = lambda *_: None  # type: ignore[method-assign,assignment]


def held(engine: Engine) -> Iterator[object]:
    """Everything that an engine holds, each entry of each list, dictionary and the like, but for its model."""
    met: set[int] = set()
    queue: list[object] = [engine]
    while queue:
        thing = queue.pop()
        yield thing
        if id(thing) not in met and not isinstance(thing, torch.nn.Module | type | FunctionType | ModuleType):
            met.add(id(thing))
            queue += gc.get_referents(thing)


class Double(ViewDrafter):
    """Stands in for the view, knows each row's text and is right about its token at place i when `right(row, i)` is.

    `texts` maps prompts to what the backbone says after them; past its end, drafts are anything.
    """

    ahead = False

    def __init__(self, texts: Mapping[tuple[int, ...], list[int]], right: Callable[[Row, int], bool]) -> None:
        super().__init__()
        self.texts = texts
        self.right = right
        self.engine: Engine | None = None

    def propose(self, passes: Passes, rows: slice, anchor_B: Tensor, drafts: int, states: Sequence[Any]) -> Tensor:
        assert self.engine is not None
        assert anchor_B.tolist() == [row.anchor for row in self.engine.live[rows]]
        vocabulary = self.engine.vocabulary
        logits = torch.zeros(anchor_B.shape[0], drafts, vocabulary)
        for b, row in enumerate(self.engine.live[rows]):
            text = self.texts[tuple(row.prompt_ids)]
            for j in range(drafts):
                place = len(row.token_ids) + j
                token = text[place] if place < len(text) else 0
                logits[b, j, token if self.right(row, place) else (token + 1) % vocabulary] = 1.0
        return logits


def engine_with(double: Double, model: PreTrainedModel, **more: object) -> Engine:
    """An engine whose drafts come from a double."""
    double.engine = engine_of(model, drafter=double, **more)  # type: ignore[arg-type]
    return double.engine
