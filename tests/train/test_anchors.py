"""Anchors and their slots against plain loops over documents."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orthrus.train import anchors


def generator(seed: int) -> torch.Generator:
    """Return a fresh generator."""
    return torch.Generator().manual_seed(seed)


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """One packed row: documents of random lengths, each with random answer spans, then padding."""
    document, answer = [], []
    for index in range(draw(st.integers(1, 3))):
        flags = draw(st.lists(st.booleans(), min_size=1, max_size=8))
        document += [index] * len(flags)
        answer += flags
    padding = draw(st.integers(0, 3))
    document += [-1] * padding
    answer += [False] * padding
    return torch.tensor([document]), torch.tensor([answer])


@given(rows())
@settings(max_examples=100, deadline=None)
def test_a_block_starts_where_the_next_token_is_an_answers(row: tuple[Tensor, Tensor]) -> None:
    """The last prompt token counts, the last token of a document does not."""
    document, answer = row
    T = document.shape[1]
    expected = [
        t + 1 < T and bool(answer[0, t + 1]) and document[0, t] == document[0, t + 1] and int(document[0, t]) >= 0
        for t in range(T)
    ]
    assert anchors.starts(document, answer)[0].tolist() == [bool(e) for e in expected]


@given(rows(), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_slots_predict_the_tokens_after_their_anchor(row: tuple[Tensor, Tensor], slots: int) -> None:
    """Slot j's target is j + 1 places on, and counts while every token up to it is of the same answer."""
    document, answer = row
    T = document.shape[1]
    anchor = torch.arange(T)[None]
    target, scored = anchors.targets(document, answer, anchor, slots=slots)
    for a in range(T):
        alive = True
        for j in range(slots):
            t = a + 1 + j
            alive = alive and t < T and bool(answer[0, t]) and int(document[0, t]) == int(document[0, a])
            assert bool(scored[0, a, j]) == alive
            if alive:
                assert int(target[0, a, j]) == t


def test_anchors_are_distinct_and_rows_draw_alone() -> None:
    """A row's anchors ascend, the same whatever batch it is in; surplus blocks are marked invalid and score nothing."""
    document = torch.zeros(2, 20, dtype=torch.long)
    answer = torch.zeros(2, 20, dtype=torch.bool)
    answer[0, 5:12] = True
    answer[1, 3:20] = True
    ask = {"blocks": 10, "block_length": 4, "blind_share": 0.5}
    both = anchors.sample(document, answer, generators=[generator(1), generator(2)], **ask)
    alone = anchors.sample(document[1:], answer[1:], generators=[generator(2)], **ask)
    assert both.valid_BN.sum(1).tolist() == [7, 10]
    assert both.anchor_BN[0][both.valid_BN[0]].tolist() == list(range(4, 11))
    assert both.anchor_BN[1].tolist() == sorted(both.anchor_BN[1].tolist())
    assert len(set(both.anchor_BN[1].tolist())) == 10
    assert not both.scored_BNJ[~both.valid_BN].any()
    for in_batch, by_itself in zip(both, alone, strict=True):
        assert torch.equal(in_batch[1:], by_itself)


def test_the_blind_share_is_what_was_asked_for() -> None:
    """None, all, and a quarter within 6 standard deviations (chance of a false alarm below 1e-8)."""
    document, answer = torch.zeros(1, 4096, dtype=torch.long), torch.ones(1, 4096, dtype=torch.bool)

    def share(asked: float) -> float:
        drawn = anchors.sample(
            document, answer, blocks=4000, block_length=2, blind_share=asked, generators=[generator(0)]
        )
        return float(drawn.blind_BN.float().mean())

    assert share(0.0) == 0.0
    assert share(1.0) == 1.0
    assert abs(share(0.25) - 0.25) < 6 * (0.25 * 0.75 / 4000) ** 0.5


def test_some_blocks_are_shown_their_first_tokens_and_score_the_rest() -> None:
    """Half of those that know their anchor, any number of tokens but the last; what else is drawn stays as it was."""
    document, answer = torch.zeros(1, 4096, dtype=torch.long), torch.ones(1, 4096, dtype=torch.bool)
    ask = {"blocks": 4000, "block_length": 6, "blind_share": 0.25}
    plain = anchors.sample(document, answer, generators=[generator(0)], **ask)
    assert not plain.shown_BN.any()
    drawn = anchors.sample(document, answer, shown_share=0.5, generators=[generator(0)], **ask)
    assert torch.equal(drawn.blind_BN, plain.blind_BN)
    assert not (drawn.shown_BN[drawn.blind_BN]).any()
    known = int((~drawn.blind_BN).sum())
    shown = int((drawn.shown_BN > 0).sum())
    assert abs(shown - known / 2) < 6 * (known / 4) ** 0.5  # false alarm: below 1e-8
    assert sorted(drawn.shown_BN.unique().tolist()) == [0, 1, 2, 3, 4]
    for count, scored, every in zip(drawn.shown_BN[0], drawn.scored_BNJ[0], plain.scored_BNJ[0], strict=True):
        assert not scored[:count].any()
        assert torch.equal(scored[count:], every[count:])
    assert torch.equal(drawn.anchor_BN, plain.anchor_BN)
    assert torch.equal(drawn.scored_BNJ[drawn.shown_BN == 0], plain.scored_BNJ[drawn.shown_BN == 0])
