"""Copies from the row's own text: the index against a search by hand, and texts that stay the backbone's own."""

import random
from collections import Counter
from functools import cache

import pytest

from orthrus.decode.engine import Engine
from orthrus.decode.options import Options, Sampling
from orthrus.policy import steps
from orthrus.policy.acceptance import RowOutcome
from orthrus.policy.lookup import LONG, NGRAM, Lookup
from orthrus.policy.steps import Step
from tests import reference
from tests.decode.drive import BLOCK, decode, dual, scripted
from tests.families import tiny

MODEL, PLAIN = dual(num_hidden_layers=1), tiny("qwen3", num_hidden_layers=1)
PROMPTS = [[5, 6, 7, 8] * 4, [3, 4] * 8, [3], [5, 6, 7, 20, 21, 5, 6, 7]]


def searched(text: list[int], count: int) -> tuple[int, int, list[int]]:
    """Look for the latest earlier place of the last tokens, and go on from there, round and round.

    Returns how many tokens there are the same, `LONG` at most, where the copy begins, and the copy; none, and the last
    token, for no place.
    """
    for end in range(len(text) - 1, NGRAM - 1, -1):
        if text[end - NGRAM : end] == text[-NGRAM:]:
            common = max(n for n in range(NGRAM, min(LONG, end) + 1) if text[end - n : end] == text[-n:])
            tail = text[end:]
            return common, end, [tail[i % len(tail)] for i in range(count)]
    return 0, len(text) - 1, [text[-1]] * count


def test_drafts_are_what_a_search_through_the_text_finds() -> None:
    """Whatever pieces the text comes in; texts over two letters, so that most have something to copy."""
    rng = random.Random(0)
    copied: Counter[int] = Counter()
    for _ in range(400):
        text = [rng.randrange(2) for _ in range(rng.randint(1, 40))]
        lookup, start = Lookup(), 0
        while start < len(text):
            size = rng.randint(1, 7)
            lookup.extend(text[start : start + size])
            start += size
        matched, _, expected = searched(text, 11)
        assert len(lookup) == len(text)
        assert lookup.matched == matched
        assert lookup.match == (None if not matched else "long" if matched == LONG else "short")
        assert lookup.drafts(11) == expected
        copied[matched] += 1
    assert set(copied) == {0, *range(NGRAM, LONG + 1)}
    assert min(copied.values()) > 5
    assert 200 < sum(copied.values()) - copied[0] < 400


def test_what_a_copy_would_have_had_right_is_counted_up_to_its_first_mistake() -> None:
    """After 1 2 3 4 5 … 1 2 3 comes a copy of 4 5 …: right, wrong at once, right after a mistake, or shorter."""
    lookup = Lookup([1, 2, 3, 4, 5, 9, 1, 2, 3])
    for written, right in (([4, 5, 9, 1], 4), ([4, 6, 9], 1), ([5, 4], 0), ([7, 5, 9], 0), ([4], 1)):
        assert lookup.agreement(written) == right
    assert len(lookup) == 9


def test_an_engine_tells_its_policy_what_copies_would_have_been_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows that could have copied: by plain steps, each the copy's next token or not; of others nothing."""
    engine = Engine(MODEL, rows=2, capacity=80, plan=steps.parse("auto"))
    monkeypatch.setattr(engine.policy, "choose", lambda *_: Step())
    told, matches = Counter[int | None](), Counter[str | None]()

    def learn(step: Step, outcomes: list[RowOutcome], seconds: float) -> None:
        for row, outcome in zip(engine.live, outcomes, strict=True):
            told[outcome.copy_kept] += 1
            matches[row.state.match] += 1
            matched, _, copy = searched(row.prompt_ids + row.token_ids, 1)
            assert row.state.match == ("long" if matched == LONG else "short" if matched else None)
            written = plain_texts(1.0)[PROMPTS.index(row.prompt_ids)][len(row.token_ids)]
            assert outcome == RowOutcome(copy_kept=None if not matched else int(copy == [written]))

    monkeypatch.setattr(engine.policy, "learn", learn)
    decode(engine, PROMPTS, Options(max_new_tokens=24))
    assert told[None] > 0
    assert told[0] + told[1] > 0
    assert set(matches) == {None, "short", "long"}


@cache
def plain_texts(penalty: float) -> list[list[int]]:
    return [reference.greedy_text(PLAIN, prompt, 24, Sampling(repetition_penalty=penalty)) for prompt in PROMPTS]


@pytest.mark.parametrize("name", ["lookup", "lookup:2"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_texts_are_those_of_the_plain_loop(name: str, rows: int, penalty: float) -> None:
    """One pass a cycle, and whatever is copied, what is kept is what plain decoding writes."""
    sampling = Sampling(repetition_penalty=penalty)
    engine = Engine(MODEL, rows=rows, capacity=96, plan=steps.parse(name))
    done = decode(engine, PROMPTS, Options(max_new_tokens=24, sampling=sampling))
    assert [row.token_ids for row in done] == plain_texts(penalty)
    assert all(row.stats.forwards == row.stats.cycles + 1 for row in done)  # one more for the prefill
    assert penalty != 1.0 or sum(row.stats.accepted for row in done) > 0


def test_a_seed_gives_the_text_of_plain_sampling() -> None:
    """Copies know nothing of the noise; what plain sampling draws with it decides which of them stay."""
    options = Options(max_new_tokens=24, sampling=Sampling(do_sample=True, temperature=0.4), seed=11)
    texts = [
        [row.token_ids for row in decode(Engine(MODEL, rows=2, capacity=96, plan=steps.parse(name)), PROMPTS, options)]
        for name in ("ar", "lookup")
    ]
    assert texts[0] == texts[1]


def test_copies_are_as_long_as_blocks_at_most_under_a_fixed_plan_and_where_shapes_are_fixed() -> None:
    """Verify passes keep the shapes they were prepared for."""
    with pytest.raises(steps.ConfigError, match=f"at most {BLOCK}"):
        Engine(MODEL, rows=1, capacity=96, plan=steps.parse(f"lookup:{BLOCK}"))
    engine = Engine(MODEL, rows=1, capacity=96, plan=steps.parse("auto"), exact="token")
    assert max(step.drafts for step in engine.policy.steps) == BLOCK - 1


@pytest.mark.parametrize("rows", [1, 3])
def test_a_choice_copies_more_than_a_block(rows: int) -> None:
    """Copies take no draft pass, so a view of short blocks does not bound them; texts stay the plain loop's."""
    engine = Engine(MODEL, rows=rows, capacity=96, plan=steps.parse("auto"))
    scripted(engine, lambda states: Step(15, lookup=True))
    done = decode(engine, PROMPTS, Options(max_new_tokens=24))
    assert [row.token_ids for row in done] == plain_texts(1.0)
    assert {row.stats.drafted / row.stats.cycles for row in done} == {15}
