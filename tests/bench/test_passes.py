"""Passes are timed one by one, in turns, and leave the cache as it was."""

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.bench import passes as module
from orthrus.bench.passes import Pass, costs, kinds
from orthrus.decode.passes import Passes
from orthrus.errors import ConfigError
from tests.bench.conftest import Ticks

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def test_the_plain_step_comes_first_and_drafts_need_two_positions() -> None:
    assert kinds([4, 1, 2, 4]) == [
        Pass("ar", 1),
        Pass("draft", 2),
        Pass("verify", 2),
        Pass("draft", 4),
        Pass("verify", 4),
    ]


def test_every_pass_has_its_repeats_at_every_context_and_batch(loaded: Loaded, ticks: Ticks) -> None:
    counted: list[None] = []
    found = list(
        costs(
            loaded[0],
            widths=(1, 4),
            contexts=(5, 9),
            batches=(1, 2),
            repeats=3,
            clock=ticks,
            on_pass=lambda: counted.append(None),
        )
    )
    places = [(cost.batch, cost.context, cost.what.kind, cost.what.width) for cost in found]
    each = [("ar", 1), ("draft", 4), ("verify", 4)]
    assert places == [(b, c, *kind) for b in (1, 2) for c in (5, 9) for kind in each]
    assert {tuple(cost.repeats_seconds) for cost in found} == {(1.0, 1.0, 1.0)}
    assert found[0].to_dict()["seconds"] == 1.0
    assert len(counted) == 36


def test_passes_take_turns_over_a_cache_of_the_right_length(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time round is the warm-up; each time round begins one further on."""
    order: list[str] = []

    def note(passes: Passes, rows: slice, token_BQ: object, what: Pass) -> None:
        assert passes.cache.lengths == [7, 7]
        order.append(what.kind[0])

    monkeypatch.setattr(module, "_run", note)
    list(costs(loaded[0], widths=(2,), contexts=(7,), batches=(2,), repeats=2))
    assert "".join(order) == "adv" + "dva" + "vad"


@pytest.mark.parametrize(
    "given",
    [
        {"widths": (0,)},
        {"contexts": ()},
        {"batches": (0,)},
        {"repeats": 0},
        {"contexts": (500,), "widths": (64,)},
    ],
)
def test_numbers_that_cannot_be_are_refused(loaded: Loaded, given: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="must"):
        list(costs(loaded[0], **given))
