"""Statistics agree with traces counted by hand and by `tests.reference.trace`."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orthrus.decode.output import Chunk, Completion, Stats
from tests import reference


def test_a_hand_counted_trace() -> None:
    """Three cycles of 3 drafts and a plain step; the last cycle is cut by the end of the text.

    cycle 1: 2 drafts kept, then the bonus        → 3 tokens, 2 passes
    cycle 2: none kept, the bonus                 → 1 token, 2 passes
    plain step                                    → 1 token, 1 pass
    cycle 3: all 3 drafts would do, but the text ends with the second: no bonus → 2 tokens, 2 passes
    """
    stats = Stats()
    stats.record(drafted=3, accepted=2, emitted=3, forwards=2)
    stats.record(drafted=3, accepted=0, emitted=1, forwards=2)
    stats.record(drafted=0, accepted=0, emitted=1, forwards=1)
    stats.record(drafted=3, accepted=2, emitted=2, forwards=2)
    assert stats.to_dict() == {
        "cycles": 3,
        "forwards": 1 + 2 * 3 + 1,
        "plain_steps": 1,
        "first_tokens": 0,
        "drafted": 9,
        "accepted": 4,
        "emitted": 7,
        "tokens_per_forward": 7 / 8,
        "acceptance_length": 4 / 3,
        "tokens_per_cycle": 4 / 3 + 1,
        "accepted_per_position": [2 / 3, 2 / 3, 0.0],
    }


def test_nothing_decoded_divides_nothing() -> None:
    """Ratios of an empty count are zero, and a sum of no completions has no prefill."""
    assert Stats().to_dict()["tokens_per_forward"] == 0.0
    assert Stats().to_dict()["tokens_per_cycle"] == 0.0
    assert Stats.total([]).forwards == 0
    assert Stats.total([]).to_dict()["tokens_per_forward"] == 0.0


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 5), st.integers(0, 2**20 - 1)), min_size=1, max_size=4))
def test_recorded_and_pooled_counts_equal_the_trace(texts: list[tuple[int, int, int]]) -> None:
    """Texts of any length, with drafts right by any pattern, block lengths differing: counts add up slot by slot."""
    parts, traces = [], []
    for length, drafts, pattern in texts:

        def right(place: int, pattern: int = pattern) -> bool:
            return bool(pattern >> place & 1)

        traces.append(reference.trace(length, drafts, right))
        parts.append(replay(length, drafts, right))
    total = Stats.total(parts)
    assert total.cycles == sum(t.cycles for t in traces)
    assert total.accepted == sum(t.accepted for t in traces)
    assert total.emitted == sum(t.emitted for t in traces) == sum(length for length, _, _ in texts)
    assert total.forwards == len(texts) + 2 * total.cycles
    longest = max(drafts for _, drafts, _ in texts)
    proposed = [sum(t.proposed_at[j] for t in traces if j < len(t.proposed_at)) for j in range(longest)]
    accepted = [sum(t.accepted_at[j] for t in traces if j < len(t.accepted_at)) for j in range(longest)]
    assert total.accepted_per_position == [a / p for a, p in zip(accepted, proposed, strict=True)]
    assert total.drafted == sum(proposed)


def replay(length: int, drafts: int, right: object) -> Stats:
    stats = Stats()
    while stats.emitted < length:
        agreed = 0
        while agreed < drafts and right(stats.emitted + agreed):  # type: ignore[operator]
            agreed += 1
        kept = min(agreed + 1, length - stats.emitted)
        stats.record(drafted=drafts, accepted=min(agreed, kept), emitted=kept, forwards=2)
    return stats


def test_summing_changes_no_part() -> None:
    """Totals own their lists."""
    part = Stats()
    part.record(drafted=2, accepted=1, emitted=2, forwards=2)
    before = part.to_dict()
    Stats.total([part, part])
    assert part.to_dict() == before


def test_completion_as_json() -> None:
    """Names as in every JSON this package writes."""
    completion = Completion(prompt="p", text="t", token_ids=[1], finish_reason="stop", stats=Stats())
    assert completion.to_dict() == {
        "prompt": "p", "text": "t", "token_ids": [1], "finish_reason": "stop", "stats": Stats().to_dict(),
    }  # fmt: skip


@pytest.mark.parametrize(("draft", "bonus"), [("ab", "c"), ("", "c"), ("ab", "")])
def test_chunk_text_is_drafts_then_bonus(draft: str, bonus: str) -> None:
    """In the order they were decided."""
    chunk = Chunk(draft_text=draft, bonus_text=bonus, token_ids=[], accepted=0, finish_reason=None, stats=Stats())
    assert chunk.text == draft + bonus
