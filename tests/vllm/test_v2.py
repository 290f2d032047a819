"""What of the second runner's drafter can be run without it: how the block comes into the buffers of a graph."""

from contextlib import nullcontext
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


def test_corrected_slots_are_drawn_in_turn_from_logits_computed_once(
    speculator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stock sampler gets one slot of every row at a time, at its own position and column."""
    from orthrus.integrations.vllm import v2
    from orthrus.model.markov import Markov

    vocabulary, own = 12, speculator
    markov = Markov(vocabulary, 2, device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        markov.before_VR.normal_(generator=torch.Generator().manual_seed(0))
    own.num_speculative_steps, own.draft_tokens = K - 1, torch.zeros(ROWS, K - 1, dtype=torch.long)
    own.sampled = (torch.arange(ROWS)[:, None] * K + torch.arange(K - 1)).flatten()
    own.column = torch.arange(K - 1, dtype=torch.int32).repeat(ROWS)
    own.idx_mapping, own.temperature, own.seeds = torch.tensor([1, 2, 0]), torch.zeros(ROWS), torch.zeros(ROWS)
    own.draft_logits, own.vllm_config = torch.zeros(1), None
    anchor = LAST % vocabulary
    own._lay_block(batch(), REJECTED, anchor, False)
    computed: list[int] = []

    class View:
        def __init__(self) -> None:
            self.markov = markov

        def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(positions % vocabulary, vocabulary).float()

        def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
            computed.append(len(hidden))
            return hidden

    drawn: list[list[int]] = []

    def sample(states: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, *rest: Any) -> torch.Tensor:
        drawn.append([*positions.tolist(), *rows.tolist(), *rest[2].tolist()])
        return own.compute_draft_logits(states, 0).argmax(-1)

    own.model, own.sample_draft = View(), sample
    monkeypatch.setattr(v2, "set_forward_context", lambda *_, **__: nullcontext())
    own._draft_pass(2, 2 * K, None, None, None)
    assert computed == [2 * (K - 1)]
    assert drawn == [[6, 5, 1, 2, 0, 0], [7, 6, 1, 2, 1, 1], [8, 7, 1, 2, 2, 2]]
    before = anchor[[1, 2], 0]
    for slot, positions in enumerate(([6, 5], [7, 6], [8, 7])):
        hidden = torch.nn.functional.one_hot(torch.tensor(positions), vocabulary).float()
        before = (hidden + markov(before)).argmax(-1)
        assert own.draft_tokens[:2, slot].tolist() == before.tolist()
