"""What a cache will take is what it then takes."""

import pytest
from transformers import PreTrainedTokenizerFast

import orthrus
from orthrus.decode.footprint import footprint
from orthrus.decode.options import Options
from orthrus.errors import CacheFull
from orthrus.model import room
from orthrus.model.snapshots import MOST
from orthrus.policy.steps import parse
from tests import reference
from tests.decode.drive import BLOCK, decode, dual, engine_of
from tests.families import HYBRID, tiny

ROWS = 2


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", *HYBRID])
def test_the_bytes_of_a_cache_are_those_foreseen(family: str) -> None:
    """Those of keys, states and terms to the byte; of snapshots there may be fewer."""
    model = dual(family)
    engine = engine_of(model, block=BLOCK, rows=ROWS, capacity=120)
    expected = footprint(model, terms=BLOCK - 1)
    decode(engine, [[*range(20, 60)], [*range(30, 60)], [*range(20, 50)]], Options(max_new_tokens=30))
    missing = ROWS * expected.row(engine.cache.capacity) - engine.cache.nbytes
    snapshot = sum(tensor.nbytes for tensor in engine.cache.states.of(0))
    assert (expected.states > 0) == (snapshot > 0) == (family in HYBRID)
    assert missing == 0 if not snapshot else missing % snapshot == 0 and 0 <= missing < ROWS * MOST * snapshot


def test_rows_fit_into_as_much_memory_as_they_take() -> None:
    for family in ("qwen3", "olmo_hybrid"):
        bytes_of = footprint(dual(family), terms=BLOCK)
        free = 3 * bytes_of.row(50)
        assert bytes_of.capacity(free, rows=3) == 50
        assert bytes_of.capacity(free - 1, rows=3) == 49
        assert bytes_of.capacity(bytes_of.states // 2, rows=1) == 0


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_keys_that_do_not_fit_into_memory_are_refused_before_they_are_written(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the bytes; an engine with just enough writes its texts, and asks once."""
    model, prompt = dual(family), [*range(20, 40)]
    needed = ROWS * 60 * footprint(model, terms=BLOCK).position
    asked, free = [0], [needed - 1]

    def found(_: object) -> int:
        asked[0] += 1
        return free[0]

    monkeypatch.setattr(room, "free_memory", found)
    engine = engine_of(model, rows=ROWS, capacity=60)
    engine.add(prompt, Options(max_new_tokens=20))
    with pytest.raises(CacheFull, match=f"{ROWS} rows of 60 positions takes .* GB, found .* GB free on cpu: take"):
        engine.step()
    assert engine.cache.empty
    free[0], asked[0] = needed, 0
    rows = [progress.row for progress in engine.run()]
    assert rows[-1].token_ids == reference.greedy_text(tiny(family), prompt, 20)
    assert asked == [1]


@pytest.mark.parametrize("family", HYBRID)
def test_states_that_do_not_fit_into_memory_are_refused_with_the_keys(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Snapshots counted, before an engine has a cache; one with just enough is made."""
    model, free = dual(family), [0]
    needed = ROWS * footprint(model, terms=parse("full").scratch(BLOCK)).row(60)
    monkeypatch.setattr(room, "free_memory", lambda _: free[0])
    for free[0] in (0, needed - 1):
        with pytest.raises(CacheFull, match=f"a cache of {ROWS} rows of 60 positions takes .* GB, found"):
            engine_of(model, block=BLOCK, rows=ROWS, capacity=60)
    free[0] = needed
    engine = engine_of(model, block=BLOCK, rows=ROWS, capacity=60)
    decode(engine, [[*range(20, 40)]] * ROWS, Options(max_new_tokens=20))
    assert engine.cache.nbytes <= needed


def test_so_are_those_of_generate(characters: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_memory", lambda _: 1000)
    with pytest.raises(CacheFull, match="free on cpu"):
        orthrus.generate(dual(), characters, [[5, 6, 7]], max_new_tokens=8)
