"""What of the second runner's drafter can be run without it: how the block comes into the buffers of a graph."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.vllm

ROWS, K, PAGE = 3, 4, 4


@pytest.fixture
def speculator() -> Any:
    """A drafter of 3 drafts and 3 rows at most, with buffers full of what an earlier step left."""
    from orthrus.integrations.vllm.v2 import OrthrusSpeculator

    own = object.__new__(OrthrusSpeculator)
    own.device, own.num_query_per_req, own.num_speculative_steps = torch.device("cpu"), K, K - 1
    own.mask, own.max_model_len = 9, 32
    own.query_starts = torch.arange(ROWS + 1, dtype=torch.int32) * K
    own.block_tables = SimpleNamespace(
        num_blocks=SimpleNamespace(np=np.array([[1, 3, 2]], dtype=np.int32)),
        block_sizes=[PAGE],
        input_block_tables=[torch.tensor([[5, 2, 8], [1, 7, 77], [0, 0, 0]], dtype=torch.int32)],
        slot_mappings=torch.full((1, ROWS * K), 55),
    )
    own.input_buffers = SimpleNamespace(
        input_ids=torch.full((ROWS * K,), 55, dtype=torch.int32),
        positions=torch.full((ROWS * K,), 55),
        seq_lens=torch.full((ROWS,), 55, dtype=torch.int32),
        query_start_loc=torch.full((ROWS + 1,), 55, dtype=torch.int32),
    )
    return own


def batch() -> Any:
    """Two rows, kept by the runner at places 1 and 2, of which the second refused 2 of its tokens."""
    places = [1, 2]
    return SimpleNamespace(
        num_reqs=2,
        idx_mapping=torch.tensor(places),
        idx_mapping_np=np.array(places, dtype=np.int32),
        seq_lens=torch.tensor([6, 7], dtype=torch.int32),
    )


LAST = torch.tensor([[70], [71], [72]])
REJECTED = torch.tensor([0, 2], dtype=torch.int32)


def test_the_block_is_laid_and_the_rest_is_padding(speculator: Any) -> None:
    speculator._lay_block(batch(), REJECTED, LAST, False)
    buffers = speculator.input_buffers
    assert buffers.input_ids[: 2 * K].tolist() == [71, 9, 9, 9, 72, 9, 9, 9]
    assert buffers.positions[: 2 * K].tolist() == [6, 7, 8, 9, 5, 6, 7, 8]
    assert buffers.seq_lens.tolist() == [10, 8, 0]
    assert buffers.query_start_loc.tolist() == [0, 4, 8, 8]
    slots = [10, 11, 32, 33, 29, 30, 31, -1, -1, -1, -1, -1]
    assert speculator.block_tables.slot_mappings.tolist() == [slots]


def test_a_dummy_batch_writes_nothing(speculator: Any) -> None:
    speculator._lay_block(batch(), REJECTED, LAST, True)
    assert speculator.block_tables.slot_mappings.tolist() == [[-1] * ROWS * K]
    assert speculator.input_buffers.seq_lens.tolist() == [0, 0, 0]
