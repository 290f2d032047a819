"""Steps timed before the first text: what policies then know, and that texts and recordings are as they were."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from orthrus.decode import prepared
from orthrus.decode.engine import Engine
from orthrus.decode.options import Options
from orthrus.decode.passes import Passes, Proposal
from orthrus.model.attachment import attachment_of
from orthrus.model.markov import markov_of
from orthrus.policy import steps
from orthrus.policy.cost import Prices, features
from orthrus.policy.steps import Step
from tests import reference
from tests.decode.drive import BLOCK, decode, dual
from tests.families import tiny

ROWS = 4
LONGEST = BLOCK - 1


class Metered(Passes):
    """Passes that take a second, and a tenth for each position of each row; the first of a shape ten times as long."""

    now = 0.0

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.met = set[tuple[int, ...]]()

    def verify(self, rows: slice, token_BQ: Tensor, **more: Any) -> Tensor:
        Metered.now += (1 + 0.1 * token_BQ.numel()) * (1 if token_BQ.shape in self.met else 10)
        self.met.add(tuple(token_BQ.shape))
        return super().verify(rows, token_BQ, **more)

    def draft(self, rows: slice, anchor_B: Tensor, drafts: int, **more: Any) -> Proposal:
        made = super().draft(rows, anchor_B, drafts, **more)
        Metered.now += (1 + 0.1 * len(anchor_B) * (drafts + 1)) * (drafts > 0)
        return made


def known(engine: Engine) -> dict[int, Prices]:
    return engine.policy.experience.prices


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_text"])
def test_prices_are_known_before_the_first_text(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one row and of all, within a fifth of what passes take; a new process has none."""
    model = dual(family)
    plan = steps.parse("auto")
    assert not known(Engine(model, rows=ROWS, capacity=96, plan=plan))
    prepared.record_passes(model, rows=ROWS)
    monkeypatch.setattr(prepared, "Passes", Metered)
    prepared.learn_prices(model, rows=ROWS, plan=plan, clock=lambda: Metered.now)
    engine = Engine(model, rows=ROWS, capacity=96, plan=plan)
    assert set(known(engine)) == {1, ROWS}
    for rows, prices in known(engine).items():
        for drafts in range(2, BLOCK):
            (price,) = prices.of(features(Step(drafts), drew=True, block=BLOCK)[None])
            assert price == pytest.approx((2 + 0.2 * rows * drafts) / (1 + 0.1 * rows), rel=0.2)
    written = [row.token_ids for row in decode(engine, [[5, 6, 7], [8, 9]], Options(max_new_tokens=12))]
    assert written == [reference.greedy_text(tiny(family), prompt, 12) for prompt in ([5, 6, 7], [8, 9])]


@pytest.mark.parametrize("plan", ["full", "ar", "lookup"])
def test_plans_of_one_step_need_no_prices(plan: str) -> None:
    model, only = dual(num_hidden_layers=1), steps.parse(plan)
    prepared.record_passes(model, rows=ROWS)
    prepared.learn_prices(model, rows=ROWS, plan=only)
    assert not known(Engine(model, rows=ROWS, capacity=96, plan=only))


def test_what_another_drafter_takes_is_not_timed() -> None:
    model, auto = dual(num_hidden_layers=1), steps.parse("auto")
    prepared.record_passes(model, rows=ROWS)
    attachment_of(model).drafter = SimpleNamespace(taps=(), proposals=3, markov=markov_of(model), name="another")
    prepared.learn_prices(model, rows=ROWS, plan=auto)
    assert not known(Engine(model, rows=ROWS, capacity=96, plan=auto))
