"""Where a text ends: cut by cut, the stopper equals the obvious rule over the whole text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from orthrus.decode.options import Options
from orthrus.decode.stop import Stopper
from orthrus.errors import ConfigError


def ending(
    tokens: list[int], eos: set[int], stops: list[str], limit: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], str | None]:
    """The rule: the shortest beginning that ends in an end token, contains a stop string, or is long enough."""
    for count in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:count], skip_special_tokens=False)
        if tokens[count - 1] in eos or any(stop in text for stop in stops):
            return tokens[:count], "stop"
        if count == limit:
            return tokens[:count], "length"
    return tokens, None


@given(
    tokens=st.lists(st.integers(2, 6), max_size=20),
    eos=st.sets(st.integers(3, 6), max_size=1),
    stops=st.lists(st.text('!"#$', min_size=1, max_size=3) | st.sampled_from(["<eos>", "!<eos>"]), max_size=2),
    limit=st.integers(1, 22),
    sizes=st.lists(st.integers(1, 5), min_size=20, max_size=20),
)
def test_cutting_cycle_by_cycle_equals_the_rule(
    characters: PreTrainedTokenizerBase,
    tokens: list[int],
    eos: set[int],
    stops: list[str],
    limit: int,
    sizes: list[int],
) -> None:
    """Stop strings that straddle cycles or hold special tokens, ends and lengths inside blocks, in any combination."""
    options = Options(max_new_tokens=limit, eos_token_id=tuple(eos), stop_strings=tuple(stops))
    stopper = Stopper(options, characters, limit=limit)
    kept: list[int] = []
    rest, reason = list(tokens), None
    for size in sizes:
        if rest and reason is None:
            piece, reason = stopper.cut(rest[:size])
            kept += piece
            rest = rest[size:]
    assert (kept, reason) == ending(tokens, eos, stops, limit, characters)


def test_stop_strings_see_characters_split_over_tokens(bytelevel: PreTrainedTokenizerBase) -> None:
    """A stop string of two-byte characters appears with the last byte, in whichever cycle that comes."""
    tokens = bytelevel("aé→b")["input_ids"]
    stopper = Stopper(Options(stop_strings=("é→",)), bytelevel, limit=99)
    assert stopper.cut(tokens[:2]) == (tokens[:2], None)
    assert stopper.cut(tokens[2:]) == (tokens[2:6], "stop")


@given(
    tokens=st.lists(st.integers(0, 270) | st.sampled_from([3 + byte for byte in b"\n\xc3\xa9\xe2"]), max_size=20),
    stops=st.lists(st.text("ab é\n\ufffd", min_size=1, max_size=3), max_size=2),
    sizes=st.lists(st.integers(1, 5), min_size=20, max_size=20),
)
def test_stop_strings_appear_in_bytes_too(
    bytefallback: PreTrainedTokenizerBase, tokens: list[int], stops: list[str], sizes: list[int]
) -> None:
    """Where every character may be spelled in bytes, and bytes may be invalid: as soon as the text so far holds one."""
    stopper = Stopper(Options(stop_strings=tuple(stops)), bytefallback, limit=99)
    kept: list[int] = []
    rest, reason = list(tokens), None
    for size in sizes:
        if rest and reason is None:
            piece, reason = stopper.cut(rest[:size])
            kept += piece
            rest = rest[size:]
    assert (kept, reason) == ending(tokens, set(), stops, 99, bytefallback)


def test_stop_strings_need_a_tokenizer() -> None:
    """Said when the completion is asked for, not when the text would have ended."""
    with pytest.raises(ConfigError, match="stop_strings need a tokenizer, found None"):
        Stopper(Options(stop_strings=("x",)), None, limit=3)
