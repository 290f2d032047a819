"""Contenders take turns, each lap is timed by itself, and differences are found where they are."""

from collections.abc import Sequence

import pytest

from orthrus.bench.race import Answer, Contender, Decoder, first_difference, race

A, B, C = (Contender(name) for name in "abc")


def test_every_round_turns_the_order() -> None:
    called: list[str] = []
    race(
        {c: _noted(c, called) for c in (A, B, C)},
        [[1]],
        max_new_tokens=4,
        rounds=3,
        turn=1,
        clock=lambda: 0.0,
        on_lap=lambda: None,
    )
    assert "".join(called) == "bca" + "cab" + "abc"


def test_a_lap_takes_what_the_clock_says() -> None:
    """The clock moves on by the contender's own time while it decodes, and by one between laps."""
    now = [0.0]

    def taking(seconds: float) -> Decoder:
        def decode(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Answer]:
            now[0] += seconds
            return [_answer([max_new_tokens]) for _ in prompts]

        return decode

    def pause() -> None:
        now[0] += 1.0

    laps = race(
        {A: taking(2.0), B: taking(5.0)},
        [[1], [2]],
        max_new_tokens=7,
        rounds=2,
        turn=0,
        clock=lambda: now[0],
        on_lap=pause,
    )
    assert laps[A].seconds == [2.0, 2.0]
    assert laps[B].seconds == [5.0, 5.0]
    assert laps[A].tokens(1) == [[7], [7]]


@pytest.mark.parametrize(
    ("left", "right", "place"),
    [
        ([1, 2], [1, 2], None),
        ([1, 2], [1, 3], 1),
        ([1], [1, 2], 1),
        ([1, 2], [1], 1),
        ([], [], None),
        ([], [5], 0),
    ],
)
def test_the_first_difference_may_be_an_end(left: list[int], right: list[int], place: int | None) -> None:
    assert first_difference(left, right) == place


def _noted(contender: Contender, called: list[str]) -> Decoder:
    def decode(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Answer]:
        called.append(contender.mode)
        return [_answer([1]) for _ in prompts]

    return decode


def _answer(tokens: list[int]) -> Answer:
    return Answer(token_ids=tokens, stats={})
