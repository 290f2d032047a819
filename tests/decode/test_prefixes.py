"""Keys that a prompt can begin with are those that comparing token after token finds."""

import random

from hypothesis import given
from hypothesis import strategies as st

from orthrus.decode.options import Options
from orthrus.decode.prefixes import BLOCK, Prefixes
from tests import reference
from tests.decode.drive import dual, engine_of
from tests.families import tiny

ROWS = 4


def in_common(one: list[int], other: list[int]) -> int:
    """The slow way: token after token."""
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


def check(index: Prefixes, texts: list[list[int]], wanted: list[int], prefer: int) -> None:
    common = [in_common(text, wanted) for text in texts]
    row, length = index.longest(wanted, prefer=prefer)
    assert length == common[row] == max(common)
    assert row == (prefer if common[prefer] == length else common.index(length))


@given(st.integers(0, 10_000))
def test_any_history_finds_what_comparing_every_token_finds(seed: int) -> None:
    """Texts from a few stems grow, are cut and swapped; lengths around the ends of blocks on purpose."""
    chance = random.Random(seed)
    stems = [[chance.randrange(2) for _ in range(5 * BLOCK)] for _ in range(3)]
    index, texts = Prefixes(ROWS, 6 * BLOCK), [list[int]() for _ in range(ROWS)]
    for _ in range(40):
        one, other, length = chance.randrange(ROWS), chance.randrange(ROWS), chance.randrange(4 * BLOCK)
        match chance.randrange(4):
            case 0 | 1:
                more = chance.choice(stems)[len(texts[one]) : length] + [7] * chance.randrange(2)
                index.extend(one, more)
                texts[one] += more
            case 2:
                index.cut(one, length)
                del texts[one][length:]
            case 3 if one != other:
                index.swap(one, other)
                texts[one], texts[other] = texts[other], texts[one]
        assert index.lengths == [len(text) for text in texts]
        check(index, texts, chance.choice(stems)[: chance.randrange(5 * BLOCK)], chance.randrange(ROWS))
        check(index, texts, list(chance.choice(texts)), chance.randrange(ROWS))


def test_what_is_cut_is_not_found() -> None:
    """An index whose texts are forgotten holds nothing."""
    index = Prefixes(2, 99)
    index.extend(0, range(3 * BLOCK))
    index.extend(1, range(2 * BLOCK + 1))
    index.cut(0, 0)
    assert index.longest(list(range(99)), prefer=0) == (1, 2 * BLOCK + 1)
    index.cut(1, 0)
    assert index.longest(list(range(99)), prefer=0) == (0, 0)


def test_texts_that_have_ended_are_kept_until_their_rows_are_needed() -> None:
    """Four conversations in five rows, one turn after another: nothing is read twice."""
    engine, plain = engine_of(dual(), rows=5, capacity=160), tiny("qwen3")
    read: list[int] = []
    real = engine.passes.prefill

    def spy(rows: slice, pending: list[list[int]], **how: object) -> object:
        read.append(sum(map(len, pending)))
        return real(rows, pending, **how)  # type: ignore[arg-type]

    engine.passes.prefill = spy  # type: ignore[method-assign,assignment]
    chats = [[3 + (7 * i + 5 * j) % 90 for j in range(30)] for i in range(4)]
    for turn in range(3):
        asked = [engine.add(chat, Options(max_new_tokens=4 + i)) for i, chat in enumerate(chats)]
        done = {progress.row.id: progress.row for progress in engine.run()}
        for chat, id in zip(chats, asked, strict=True):
            assert done[id].token_ids == reference.greedy_text(plain, chat, len(done[id].token_ids))
            chat += [*done[id].token_ids, 50 + turn]
        assert sum(read) == 4 * 29 if turn == 0 else sum(read) <= 4 * 2
        read.clear()
