"""What a cache will take is what it then takes."""

import pytest

from orthrus.decode.footprint import footprint
from orthrus.decode.options import Options
from orthrus.model.snapshots import MOST
from tests.decode.drive import BLOCK, decode, dual, engine_of
from tests.families import HYBRID

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
