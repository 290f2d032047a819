"""The scratch-tail cache behaves like lists of numbers: random operations against `tests.reference.ListCache`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from orthrus.errors import CacheFull
from orthrus.model.cache import ScratchCache
from tests.reference import ListCache

CAPACITY = 12
LAYERS = 2
HEADS, DIM = 2, 3


def states(number_BQ: Tensor, sign: float) -> Tensor:
    """Spread one number per position over heads and dimensions, `[B, H, Q, D]`, each entry its own multiple."""
    factor_HD = torch.arange(1, HEADS * DIM + 1, dtype=torch.float64).view(HEADS, DIM)
    return sign * number_BQ[:, None, :, None].double() * factor_HD[None, :, None, :]


class CacheMachine(RuleBasedStateMachine):
    """Drive both caches through the same passes, commits and moves."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = 0

    @initialize(rows=st.integers(1, 4))
    def start(self, rows: int) -> None:
        self.rows = rows
        self.cache = ScratchCache(rows=rows, capacity=CAPACITY)
        self.spec = ListCache(rows)
        self.written = False

    @rule(data=st.data(), width=st.integers(1, 4))
    def pass_and_commit(self, data: st.DataObject, width: int) -> None:
        """Write a block past each row's length, as every pass does, then keep some of it."""
        first = data.draw(st.integers(0, self.rows - 1))
        rows = slice(first, data.draw(st.integers(first + 1, self.rows)))
        lengths = self.cache.lengths[rows]
        end = max(lengths) + width
        slot_BQ = torch.tensor(lengths)[:, None] + torch.arange(width)
        if end > CAPACITY:
            before = [buffer.clone() for buffer in (*self.cache.keys, *self.cache.values)]
            with pytest.raises(CacheFull, match=f"needs {end} cache positions, the cache has {CAPACITY}"):
                self.cache.begin(rows, slot_BQ, end=end)
            after = [*self.cache.keys, *self.cache.values]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            return
        number_BQ = self.counter + 1 + torch.arange(len(lengths) * width).view(-1, width)
        self.counter += number_BQ.numel()
        level = len(set(lengths)) == 1 and data.draw(st.booleans())
        self.cache.begin(rows, slot_BQ, end=end, start=lengths[0] if level else None)
        for layer in range(LAYERS):
            key, value = self.cache.update(states(number_BQ, 1 + layer), states(number_BQ, -1 - layer), layer)
            assert key.shape == value.shape == (len(lengths), HEADS, end, DIM)
        for i, row in enumerate(range(first, rows.stop)):
            for j in range(width):
                self.spec.write(row, lengths[i] + j, float(number_BQ[i, j]))
        counts = [data.draw(st.integers(0, width)) for _ in lengths]
        self.cache.commit(rows, counts)
        for row, count in zip(range(first, rows.stop), counts, strict=True):
            self.spec.commit(row, count)
        self.written = True

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        row = data.draw(st.integers(0, self.rows - 1))
        length = data.draw(st.integers(0, self.cache.lengths[row]))
        self.cache.set_length(row, length)
        self.spec.truncate(row, length)

    @precondition(lambda self: self.rows > 1)
    @rule(data=st.data())
    def swap_rows(self, data: st.DataObject) -> None:
        source = data.draw(st.integers(0, self.rows - 1))
        target = data.draw(st.integers(0, self.rows - 1).filter(lambda r: r != source))
        self.cache.swap_rows(source, target)
        self.spec.swap_rows(source, target)

    @invariant()
    def valid_positions_agree(self) -> None:
        if not hasattr(self, "cache"):
            return
        assert self.cache.lengths == [len(row) for row in self.spec.valid] == self.cache.length_R.tolist()
        assert self.cache.get_seq_length() == max(self.cache.lengths)
        for layer in range(len(self.cache.keys)):
            for row, numbers in enumerate(self.spec.valid):
                expected = states(torch.tensor([numbers]), 1 + layer)[0].transpose(0, 1)
                assert torch.equal(self.cache.keys[layer][row, : len(numbers)], expected)
                assert torch.equal(self.cache.values[layer][row, : len(numbers)], -expected)


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=40, stateful_step_count=15)


def filled(rows: int, length: int, width: int) -> tuple[ScratchCache, Tensor]:
    """A cache whose rows hold `length` valid positions and `width` scratch ones, numbered row by row."""
    cache = ScratchCache(rows=rows, capacity=length + width)
    number = torch.arange(rows * (length + width)).view(rows, -1)
    cache.begin(slice(0, rows), torch.arange(length + width).expand(rows, -1), end=length + width)
    cache.update(states(number, 1), states(number, -1), 0)
    cache.commit(slice(0, rows), [length] * rows)
    return cache, number


@given(rows=st.integers(1, 3), width=st.integers(1, 6), data=st.data())
def test_move_slots_reads_all_before_it_writes(rows: int, width: int, data: st.DataObject) -> None:
    """A tree's accepted path is gathered into the slots after the length, overlaps and all."""
    cache, number = filled(rows, 2, width)
    count = data.draw(st.integers(1, width))
    source = [sorted(data.draw(st.permutations(range(2, 2 + width)))[:count]) for _ in range(rows)]
    spec = ListCache(rows)
    for row in range(rows):
        for slot in range(2 + width):
            spec.write(row, slot, float(number[row, slot]))
        spec.commit(row, 2)
        spec.scratch[row] = {s: float(number[row, s]) for s in range(2, 2 + width)}
        spec.move_slots(row, source[row], range(2, 2 + count))
        spec.commit(row, count)
    cache.move_slots(slice(0, rows), torch.tensor(source), torch.arange(2, 2 + count).expand(rows, -1))
    cache.commit(slice(0, rows), [count] * rows)
    for row in range(rows):
        expected = states(torch.tensor([spec.valid[row]]), 1)[0].transpose(0, 1)
        assert torch.equal(cache.keys[0][row, : 2 + count], expected)
        assert torch.equal(cache.values[0][row, : 2 + count], -expected)


def test_update_returns_views_of_the_rows_in_reach() -> None:
    """Nothing is copied for attention: what comes back shares the buffers' memory and stops at `end`."""
    cache = ScratchCache(rows=3, capacity=8)
    cache.begin(slice(1, 3), torch.tensor([[0, 1], [3, 4]]), end=5)
    number = torch.tensor([[1, 2], [3, 4]])
    key, value = cache.update(states(number, 1), states(number, -1), 0)
    assert key.shape == (2, HEADS, 5, DIM)
    assert key.data_ptr() == cache.keys[0][1].data_ptr()
    assert value.data_ptr() == cache.values[0][1].data_ptr()
    assert torch.equal(key[1, :, 3:5], states(number[1:], 1)[0])
    assert not cache.keys[0][0].any()


def test_buffers_follow_each_layer() -> None:
    """Heads, dimensions and dtype may differ by layer and between keys and values; bytes are counted."""
    cache = ScratchCache(rows=1, capacity=4)
    cache.begin(slice(0, 1), torch.tensor([[0]]), end=1)
    cache.update(torch.ones(1, 2, 1, 3), torch.ones(1, 2, 1, 5), 0)
    cache.update(torch.ones(1, 4, 1, 8, dtype=torch.bfloat16), torch.ones(1, 4, 1, 8, dtype=torch.bfloat16), 1)
    assert cache.keys[0].shape == (1, 4, 2, 3)
    assert cache.values[0].shape == (1, 4, 2, 5)
    assert cache.keys[1].dtype == torch.bfloat16
    assert cache.nbytes == 4 * (2 * 3 + 2 * 5) * 4 + 4 * 2 * (4 * 8) * 2
