"""States beside keys behave like texts read from their start: random passes, ends, moves and copies of rows."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import Tensor

from orthrus.errors import DecodingError
from orthrus.model import delta
from orthrus.model.cache import ScratchCache
from orthrus.model.snapshots import MOST

CAPACITY, VOCABULARY = 200, 12
G, H, N, D, C, W = 1, 2, 3, 2, 2, 4

_random = torch.Generator().manual_seed(0)
TABLE = delta.inputs(
    torch.randn(1, VOCABULARY, G, N, generator=_random),
    torch.randn(1, VOCABULARY, G, N, generator=_random),
    torch.randn(1, VOCABULARY, H, D, generator=_random),
    -torch.rand(1, VOCABULARY, H, generator=_random) / 4,
    torch.rand(1, VOCABULARY, H, generator=_random),
)
CHANNELS = torch.randn(VOCABULARY, C, generator=_random)
WEIGHT = torch.randn(C, W, generator=_random)


def inputs_of(token_BT: Sequence[Sequence[int]]) -> delta.Inputs:
    return delta.Inputs(*(tensor[0][torch.tensor(token_BT)] for tensor in TABLE))


def expected(text: list[int]) -> tuple[Tensor, Tensor]:
    """What each token of a text reads, of the state and through the convolution, read from the start."""
    outs, _ = delta.in_order(inputs_of([text]), torch.zeros(1, H, N, D))
    windows = torch.nn.functional.pad(CHANNELS[torch.tensor(text)], (0, 0, W - 1, 0)).unfold(0, W, 1)
    return outs[0], (windows * WEIGHT).sum(2)


def closest_behind(lengths: set[int]) -> int:
    """The length that is closest behind another, or behind nothing read; the first of several."""
    return min(sorted(lengths), key=lambda length: length - max({0, *lengths} & {*range(length)}))


class StatesMachine(RuleBasedStateMachine):
    """Drive a cache of two layers, of which one keeps states, as an engine does."""

    @initialize(rows=st.integers(1, 4))
    def start(self, rows: int) -> None:
        self.cache = ScratchCache(rows=rows, capacity=CAPACITY)
        self.texts: list[list[int]] = [[] for _ in range(rows)]
        self.known: list[set[int]] = [{0} for _ in range(rows)]  # lengths whose state a row has
        self.copied: list[set[int]] = [set() for _ in range(rows)]  # and those of its snapshots

    def run(
        self, rows: slice, tokens: list[list[int]], *, kept: int, read: list[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        lengths = self.cache.lengths[rows]
        slots = torch.tensor(lengths)[:, None] + torch.arange(len(tokens[0]))
        self.cache.begin(rows, slots, end=max(lengths) + len(tokens[0]), kept=kept, read=read)
        layer = self.cache.recurrence(1)
        convolved = layer.convolve(CHANNELS[torch.tensor(tokens)], WEIGHT, None)
        return layer.rule(inputs_of(tokens), None), convolved

    def some(self, data: st.DataObject, width: int) -> tuple[slice, list[list[int]]]:
        first = data.draw(st.integers(0, len(self.texts) - 1))
        rows = slice(first, data.draw(st.integers(first + 1, len(self.texts))))
        token = st.lists(st.integers(0, VOCABULARY - 1), min_size=width, max_size=width)
        return rows, [data.draw(token) for _ in self.texts[rows]]

    def have_states(self, rows: slice) -> bool:
        """Whether passes over these rows can begin."""
        parts = zip(self.texts[rows], self.known[rows], self.copied[rows], strict=True)
        return all(len(text) in known | copied for text, known, copied in parts)

    def check(self, rows: slice, tokens: list[list[int]], found: tuple[Tensor, Tensor]) -> None:
        for row, own, out, convolved in zip(self.texts[rows], tokens, *found, strict=True):
            read, summed = expected(row + own)
            assert torch.allclose(out, read[len(row) :], atol=1e-5)
            assert torch.allclose(convolved, summed[len(row) :], atol=1e-5)

    @rule(data=st.data(), width=st.integers(1, 5))
    def verify(self, data: st.DataObject, width: int) -> None:
        """A pass over a few tokens, of which each row keeps some, or none."""
        rows, tokens = self.some(data, width)
        if not self.have_states(rows):
            with pytest.raises(DecodingError, match="needs the recurrent state of row"):
                self.run(rows, tokens, kept=width)
            return
        self.check(rows, tokens, self.run(rows, tokens, kept=width))
        counts = [data.draw(st.integers(0, width)) for _ in tokens]
        self.cache.commit(rows, counts)
        for row, own, count in zip(range(rows.start, rows.stop), tokens, counts, strict=True):
            self.known[row] = {*range(len(self.texts[row]), len(self.texts[row]) + count + 1)}
            self.texts[row] = self.texts[row] + own[:count]

    @rule(data=st.data(), width=st.sampled_from([1, 3, 70]), anchors=st.integers(0, 1))
    def read(self, data: st.DataObject, width: int, anchors: int) -> None:
        """A pass over prompts that differ in length; with an anchor behind them it may be kept later."""
        rows, tokens = self.some(data, width + anchors)
        fits = all(len(text) + width < CAPACITY - 6 for text in self.texts[rows])
        if not fits or not self.have_states(rows):
            return
        counts = [data.draw(st.integers(0, width)) for _ in tokens]
        asked = [data.draw(st.sets(st.integers(1, len(text) + width), max_size=2)) for text in self.texts[rows]]
        for row, lengths in enumerate(asked, start=rows.start):
            self.cache.states.ask(row, lengths)
        self.check(rows, tokens, self.run(rows, tokens, kept=anchors, read=counts))
        self.cache.commit(rows, counts)
        kept = [data.draw(st.integers(0, anchors)) for _ in tokens]
        self.cache.commit(rows, kept)
        for row, own, count, more in zip(range(rows.start, rows.stop), tokens, counts, kept, strict=True):
            length = len(self.texts[row]) + count
            for taken in sorted(asked[row - rows.start] - self.copied[row]):
                if len(self.texts[row]) < taken <= length:
                    self.copied[row].add(taken)
                    if len(self.copied[row]) > MOST:
                        self.copied[row].remove(closest_behind(self.copied[row]))
            self.known[row] = {length, length + more}
            self.texts[row] = self.texts[row] + own[: count + more]

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        """A text is cut; its row knows no state past the cut, and none before it but those that it had."""
        row = data.draw(st.integers(0, len(self.texts) - 1))
        snapshots = st.sampled_from(sorted(self.copied[row] | {0}))
        length = data.draw(snapshots | st.integers(0, len(self.texts[row])))
        reachable = {n for n in self.known[row] | self.copied[row] | {0} if n <= length}
        if self.cache.states.nbytes:
            assert self.cache.states.resumable(row, length) == max(reachable)
        self.cache.set_length(row, length)
        self.texts[row] = self.texts[row][:length]
        self.known[row] = {0} if length == 0 else {n for n in self.known[row] if n <= length}
        self.copied[row] = {n for n in self.copied[row] if n <= length}

    @precondition(lambda self: len(self.texts) > 1)
    @rule(data=st.data(), copied=st.booleans())
    def move(self, data: st.DataObject, copied: bool) -> None:
        """Two rows change places, or one takes over the text of the other."""
        one, other = data.draw(st.permutations(range(len(self.texts))))[:2]
        if copied:
            self.cache.copy_start(one, other, len(self.texts[one]))
            self.cache.set_length(other, len(self.texts[one]))
            self.texts[other], self.known[other] = list(self.texts[one]), set(self.known[one])
            self.copied[other] = set(self.copied[one])
            return
        self.cache.swap_rows(one, other)
        for things in (self.texts, self.known, self.copied):
            things[one], things[other] = things[other], things[one]  # type: ignore[index]


TestStates = StatesMachine.TestCase
TestStates.settings = settings(max_examples=20, stateful_step_count=12, deadline=None)


def test_a_pass_that_fails_leaves_states_as_they_were() -> None:
    """Whether it reads a prompt or verifies, in whatever layer it stops."""
    cache = ScratchCache(rows=1, capacity=64)
    rows = slice(0, 1)

    def run(tokens: list[int], *, layers: int, read: list[int] | None = None) -> list[Tensor]:
        slot_BQ, kept = cache.lengths[0] + torch.arange(len(tokens))[None], 0 if read else len(tokens)
        cache.begin(rows, slot_BQ, end=64, kept=kept, read=read)
        outs = []
        for layer in (cache.recurrence(i) for i in range(layers)):
            layer.convolve(CHANNELS[torch.tensor([tokens])], WEIGHT, None)
            outs.append(layer.rule(inputs_of([tokens]), None)[0, -1])
        return outs

    run([1, 2, 3], layers=2, read=[3])
    cache.commit(rows, [3])
    run([4, 5], layers=1, read=[2])  # the second layer is never reached
    run([6, 7], layers=1)
    assert cache.lengths == [3]
    for out in run([8], layers=2):
        assert torch.allclose(out, expected([1, 2, 3, 8])[0][-1], atol=1e-5)


def test_rows_go_on_from_snapshots_after_the_text_has_gone_another_way() -> None:
    """In the row itself, and in one that took it over; what is written there leaves the snapshot as it was."""
    cache, text = ScratchCache(rows=2, capacity=64), [1, 2, 3, 4, 5, 6, 7]

    def run(row: int, tokens: list[int], **how: object) -> None:
        slot_BQ = cache.lengths[row] + torch.arange(len(tokens))[None]
        cache.begin(slice(row, row + 1), slot_BQ, end=64, **how)  # type: ignore[arg-type]
        layer = cache.recurrence(0)
        summed = layer.convolve(CHANNELS[torch.tensor([tokens])], WEIGHT, None)[0, 0]
        read, before = layer.rule(inputs_of([tokens]), None)[0, 0], text[: cache.lengths[row]]
        for found, all_read in zip((read, summed), expected([*before, tokens[0]]), strict=True):
            assert torch.allclose(found, all_read[-1], atol=1e-5)

    cache.states.ask(0, {2, 5})
    run(0, text, kept=0, read=[7])
    cache.commit(slice(0, 1), [7])
    for length in (5, 2):
        cache.copy_start(0, 1, length)
        for row in (0, 1):
            cache.set_length(row, length)
            for token in (8, 9):
                run(row, [token])
            cache.set_length(row, length)
            run(row, [8, 9], kept=0, read=[2])
            cache.commit(slice(row, row + 1), [2])  # the state has gone another way
            cache.set_length(row, length)
