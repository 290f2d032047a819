"""What tasks share that train a drafter beside a frozen backbone, on the rows and answers of a view's training."""

from typing import Generic, TypeVar

import torch
from torch import nn

from orthrus.checkpoints.load import DTYPES
from orthrus.train.peer_sections import DFlashRecipe, Eagle3Recipe
from orthrus.train.prepare import Prepared, prepare
from orthrus.train.ranks import Ranks
from orthrus.train.start import frozen_backbone

_Drafter = TypeVar("_Drafter", bound=nn.Module)


class DrafterTask(Generic[_Drafter]):
    """The backbone, its tokenizer and the rows of a recipe; a subclass makes the drafter, its `model`.

    Args:
        recipe: a drafter's recipe.
        data: packed rows; None makes what is missing of them.
    """

    model: _Drafter

    def __init__(self, recipe: DFlashRecipe | Eagle3Recipe, data: Prepared | None) -> None:
        if recipe.run.threads is not None:
            torch.set_num_threads(recipe.run.threads)
        self._backbone, self._tokenizer = frozen_backbone(recipe, dtype=DTYPES[recipe.run.dtype])
        self._data = data or prepare(recipe, self._tokenizer, self._backbone, ranks=Ranks(recipe.run.device))
        self.row_count = len(self._data.rows)
        torch.manual_seed(recipe.run.seed)

    def trainable(self) -> dict[str, nn.Parameter]:
        """All of the drafter's parameters."""
        return dict(self.model.named_parameters())
