"""A mask of the view's own: one embedding `[C]` that is trained, beside the backbone's table, never written into it.

Masks then have the number after the vocabulary's last, so that a text may hold any token.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from orthrus.model.attachment import config_of

NAME = "mask_row"
"""The attribute that holds a model's mask row, and so the start of its tensor's name."""


class MaskRow(nn.Module):
    """The embedding of masks, `[C]`, as the first layer reads it; to begin with that of a token."""

    def __init__(self, embedding_C: Tensor) -> None:
        super().__init__()
        self.row_C = nn.Parameter(embedding_C.detach().clone())

    def forward(self, embedding: nn.Embedding, token: Tensor) -> Tensor:
        """Embed tokens, and the number after the vocabulary's last by this row: `[..., C]`."""
        last = embedding.weight.shape[0] - 1
        embedded: Tensor = embedding(token.clamp_max(last))
        return torch.where((token > last)[..., None], self.row_C.to(embedded.dtype), embedded)


def untrained(model: PreTrainedModel, token: int) -> MaskRow:
    """Make a mask row that is the embedding of a token."""
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        return MaskRow(embedding(torch.tensor(token, device=embedding.weight.device)))


def install(model: PreTrainedModel, row: MaskRow | None) -> None:
    """Give a model this mask row in place of the one it has, if any; None leaves it without."""
    if mask_row_of(model) is not None:
        delattr(model, NAME)
    if row is not None:
        setattr(model, NAME, row)


def mask_row_of(model: nn.Module) -> MaskRow | None:
    row = getattr(model, NAME, None)
    return row if isinstance(row, MaskRow) else None


def mask_of(model: PreTrainedModel) -> int:
    """Return the number that stands for a mask in what a pass reads: a token's, or the one after the last."""
    if mask_row_of(model) is None:
        return config_of(model).mask
    return int(model.get_input_embeddings().weight.shape[0])


def inputs_of(model: PreTrainedModel, token: Tensor) -> dict[str, Any]:
    """Return the argument by which a model is told tokens and masks: numbers, or embeddings where masks have a row."""
    row = mask_row_of(model)
    if row is None:
        return {"input_ids": token}
    return {"inputs_embeds": row(model.get_input_embeddings(), token)}
