"""What tasks share that train on a frozen backbone's answers: loading, rows, loss, evaluation."""

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from orthrus.checkpoints.load import DTYPES, device_of
from orthrus.data.packing import PackedRows
from orthrus.decode.api import engine_for
from orthrus.decode.drafters import Drafter
from orthrus.decode.options import Options
from orthrus.decode.output import Stats
from orthrus.model.markov import Markov
from orthrus.policy.steps import parse
from orthrus.train import scoring
from orthrus.train.prepare import Prepared, prepare
from orthrus.train.ranks import Ranks
from orthrus.train.sections import AnsweredRecipe, Vocabulary
from orthrus.train.start import frozen_backbone, in_one_dtype
from orthrus.train.step import Loss, Rows

EVALUATION_ROWS = 16
"""Rows of each source whose loss is taken, at most."""

_Recipe = TypeVar("_Recipe", bound=AnsweredRecipe)


class AnsweredTask(ABC, Generic[_Recipe]):
    """The loop's task for a recipe of answers; a subclass makes `model` and says what its loss is.

    Without `data`, what is missing of the packed rows is made (`orthrus.train.prepare`).
    """

    model: nn.Module

    def __init__(self, recipe: _Recipe, *, data: Prepared | None = None) -> None:
        self._recipe = recipe
        self._ranks = Ranks(recipe.run.device)  # before the device is touched: it gives each process its own
        self._device = device_of(recipe.run.device)
        if recipe.run.threads is not None:
            torch.set_num_threads(recipe.run.threads)
        self._backbone, self._tokenizer = self._loaded()
        self._data = data or prepare(recipe, self._tokenizer, self._backbone, ranks=self._ranks)
        self.row_count = len(self._data.rows)
        torch.manual_seed(recipe.run.seed)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The model's parameters that are not frozen; a head that is the embedding counts once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def loss(self, rows: Rows, step: int) -> Loss:
        """The weighted loss of what is drawn for these rows at a step."""
        return self._loss(self._data.rows, rows, step)

    def evaluate(self, step: int) -> dict[str, float]:
        """Losses, and what real decoding gives, of held-out rows and prompts, as `heldout/SOURCE/NAME`."""
        figures: dict[str, float] = {}
        for source, rows in self._data.heldout.items():
            losses = self._loss(rows, np.arange(min(len(rows), EVALUATION_ROWS)), -1).means()
            decoded = self._decoded(self._data.heldout_prompts[source][: self._recipe.responses.eval_prompts])
            figures |= {f"heldout/{source}/{name}": value for name, value in (losses | decoded).items()}
        return figures

    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        """Load the backbone, which also writes the answers, and its tokenizer."""
        return frozen_backbone(self._recipe, dtype=DTYPES[self._recipe.run.dtype])

    def _softmax(self, vocabulary: Vocabulary, markov: Markov | None = None) -> None:
        """Settle the tokens of the softmax, once the model is there."""
        self._answer_tokens = scoring.softmax_tokens(vocabulary, self._data.rows, self._device, markov=markov)

    def _tokens(self, step: int) -> Tensor | None:
        """Return the tokens of the softmax at a step; held-out answers hold others too."""
        return self._answer_tokens if step >= 0 else None

    @abstractmethod
    def _loss(self, packed: PackedRows, index: Rows, step: int) -> Loss:
        """The loss of packed rows at a step, or, at step -1, of held-out ones."""

    @abstractmethod
    def _decoded(self, prompts: list[list[int]]) -> dict[str, float]:
        """Decode prompts with the model; returns figures by name."""

    def _drafted(
        self, prompts: list[list[int]], drafter: Drafter | None = None, *, plan: str = "full", prefix: str = ""
    ) -> dict[str, float]:
        """Decode prompts as `decoded_by` does; returns tokens per cycle and per forward pass, by name."""
        stats = decoded_by(self._backbone, prompts, self._recipe.responses.eval_tokens, drafter, plan=plan)
        return {f"{prefix}{name}": getattr(stats, name) for name in ("tokens_per_cycle", "tokens_per_forward")}


def decoded_by(
    model: PreTrainedModel,
    prompts: list[list[int]],
    most: int,
    drafter: Drafter | None = None,
    *,
    plan: str = "full",
) -> Stats:
    """Decode prompts under a plan, by the view unless another drafter is given; returns pooled statistics."""
    options = Options.of(model.generation_config, max_new_tokens=most)
    with torch.autocast(model.device.type, enabled=False), in_one_dtype(model):
        engine = engine_for(model, prompts, options, parse(plan), rows=8, drafter=drafter)
        return Stats.total(row.stats for row in engine.finish(prompts, options))
