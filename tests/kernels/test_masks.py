"""Every mask equals its triple-loop specification in `tests.reference`, for shapes and positions drawn at random."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orthrus.kernels import masks
from tests import reference

small = st.integers(1, 4)


def boolean(grid: reference.Grid) -> Tensor:
    return torch.tensor(grid, dtype=torch.bool)


@given(rows=small, queries=small, span=st.integers(1, 9), data=st.data())
def test_up_to(rows: int, queries: int, span: int, data: st.DataObject) -> None:
    """Slots up to and including the limit, whatever the limit (before the first slot, or past the last)."""
    limit = data.draw(matrix(rows, queries, st.integers(-1, span + 2)))
    assert torch.equal(masks.up_to(torch.tensor(limit), span=span), boolean(reference.up_to(limit, span)))


@given(rows=small, nodes=st.integers(1, 6), data=st.data())
def test_tree(rows: int, nodes: int, data: st.DataObject) -> None:
    """The prefix and the path to a root; siblings, other trees and what lies past them all stay unseen."""
    length = data.draw(st.lists(st.integers(0, 5), min_size=rows, max_size=rows))
    above = [st.none(), *(st.none() | st.integers(0, node - 1) for node in range(1, nodes))]
    parent = [[data.draw(choice) for choice in above] for _ in range(rows)]
    span = max(length) + nodes + data.draw(st.integers(0, 2))
    ancestors = torch.zeros(rows, nodes, nodes, dtype=torch.bool)
    for row, parents in enumerate(parent):
        for node, up in enumerate(parents):
            ancestors[row, node, node] = True
            if up is not None:
                ancestors[row, node] |= ancestors[row, up]
    made = masks.tree(torch.tensor(length), ancestors, span=span)
    assert torch.equal(made, boolean(reference.tree(length, parent, span)))


@given(rows=small, verified=st.integers(1, 4), stops=small, block=small, causal=st.booleans(), data=st.data())
def test_ahead(rows: int, verified: int, stops: int, block: int, causal: bool, data: st.DataObject) -> None:
    """Text up to the stop, rejected drafts unseen, other blocks and what lies past unseen; the own block both ways,
    or up to the slot itself.
    """
    length = data.draw(st.lists(st.integers(0, 5), min_size=rows, max_size=rows))
    stop = data.draw(matrix(rows, stops, st.integers(0, verified - 1)))
    span = max(length) + verified + stops * block + data.draw(st.integers(0, 2))
    text = masks.up_to(torch.tensor(length)[:, None] + torch.tensor(stop), span=span)
    made = masks.ahead(text, torch.tensor(length), rows=verified, block=block, causal=causal)
    assert torch.equal(made, boolean(reference.ahead(length, stop, verified, block, span, causal)))


@given(rows=small, length=st.integers(1, 10), data=st.data())
def test_packed(rows: int, length: int, data: st.DataObject) -> None:
    """Causal inside a document; padding sees itself, so no softmax is empty."""
    document = data.draw(matrix(rows, length, st.integers(-1, 3)))
    made = masks.packed(torch.tensor(document))
    assert torch.equal(made, boolean(reference.packed(document)))
    assert made.any(-1).all()


@given(rows=small, length=st.integers(1, 10), blocks=small, block=small, causal=st.booleans(), data=st.data())
def test_training(rows: int, length: int, blocks: int, block: int, causal: bool, data: st.DataObject) -> None:
    """Keys of the own document strictly before the anchor, the own block both ways or up to the slot, nothing else."""
    document = data.draw(matrix(rows, length, st.integers(0, 2)))
    anchor = data.draw(matrix(rows, blocks, st.integers(0, length - 1)))
    valid = data.draw(matrix(rows, blocks, st.booleans()))
    made = masks.training(torch.tensor(document), torch.tensor(anchor), torch.tensor(valid), block=block, causal=causal)
    assert torch.equal(made, boolean(reference.training(document, anchor, valid, block, causal)))
    assert made.any(-1).all()


@given(rows=small, queries=small, span=st.integers(1, 9), data=st.data())
def test_windows_narrow_every_rule(rows: int, queries: int, span: int, data: st.DataObject) -> None:
    """Dense masks are 0 where the rule and the window allow, the dtype's lowest value elsewhere; one per window."""
    limit = data.draw(matrix(rows, queries, st.integers(0, span)))
    position = data.draw(matrix(rows, queries, st.integers(0, span)))
    windows = data.draw(st.sets(st.integers(1, span + 2), max_size=2))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    made = masks.layer_masks(
        masks.up_to(torch.tensor(limit), span=span),
        query_position_BQ=torch.tensor(position),
        key_position_BS=torch.arange(span)[None],
        windows=windows,
        dtype=dtype,
    )
    rule = reference.up_to(limit, span)
    keys = list(range(span))
    expected = {None: rule} | {w: reference.windowed(rule, position, keys, w) for w in windows}
    for window, grid in expected.items():
        mask = made.of(window)
        assert mask.shape == (rows, 1, queries, span)
        assert mask.dtype == dtype
        assert torch.equal(mask[:, 0] == 0, boolean(grid))
        assert bool((mask[:, 0][~boolean(grid)] == torch.finfo(dtype).min).all())


def test_a_draft_block_sees_prefix_and_itself() -> None:
    """The picture in words: lengths 2 and 0, blocks of 3, written out by hand."""
    slot = torch.tensor([[2, 3, 4], [0, 1, 2]])
    made = masks.up_to(slot[:, -1:].expand_as(slot), span=6)
    assert made.int().tolist() == [[[1, 1, 1, 1, 1, 0]] * 3, [[1, 1, 1, 0, 0, 0]] * 3]


def test_a_window_nobody_asked_for_has_no_mask() -> None:
    """A layer whose window was left out is a bug of the caller, not a silent full mask."""
    made = masks.LayerMasks(full=torch.zeros(1, 1, 1, 1))
    with pytest.raises(KeyError):
        made.of(8)


def matrix(rows: int, columns: int, of: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(st.lists(of, min_size=columns, max_size=columns), min_size=rows, max_size=rows)
