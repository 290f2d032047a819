"""Packed rows of one step as tensors. Shapes: B rows, T positions."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from orthrus.data.packing import PackedRows
from orthrus.train.step import Rows


class Batch(NamedTuple):
    """Which document each position belongs to, positions in documents, tokens, and whether an answer holds them."""

    document_BT: Tensor
    position_BT: Tensor
    token_BT: Tensor
    answer_BT: Tensor


def batch(packed: PackedRows, index: Rows, device: torch.device) -> Batch:
    """Copy the rows of these indices to a device: integers as int64, answers as booleans."""
    arrays = (packed.document, packed.position, packed.token_ids, packed.answer)
    tensors = [torch.from_numpy(np.array(array[index])).to(device) for array in arrays]
    return Batch(*(tensor if tensor.dtype == torch.bool else tensor.long() for tensor in tensors))
