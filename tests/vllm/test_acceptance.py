"""Drafts are as good in vLLM as in this package's own engine."""

from pathlib import Path
from typing import Any

import pytest

from tests.vllm.drive import BASE, DRAFTS, agreement, drafting, prompts, serve, texts

pytestmark = pytest.mark.vllm

TOKENS = 48


@pytest.mark.timeout(7200)
def test_acceptance_per_position_is_the_own_engine_s(checkpoint: Path, record_property: Any) -> None:
    """Within 1 % (absolute) at each of 15 positions, over 100 prompts; texts are equal token for token."""
    import orthrus

    asked = prompts(checkpoint)
    sampling = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True}
    (call,) = serve(checkpoint, {**BASE, **drafting(checkpoint)}, [{"prompts": asked, "sampling": sampling}])
    model, _ = orthrus.load(str(checkpoint), dtype="float32")
    own, cycles, accepted_at = own_engine(model, asked, [tokens[0] for tokens in texts(call)])
    served = [count / call["drafts"] for count in call["accepted_at"]]
    expected = [count / cycles for count in accepted_at]
    record_property("drafts", {"vllm": call["drafts"], "own": cycles})
    record_property("accepted at position", {"vllm": call["accepted_at"], "own": accepted_at})
    record_property("largest difference", max(abs(a - b) for a, b in zip(served, expected, strict=True)))
    record_property("texts", agreement(texts(call), own))
    assert texts(call) == own
    assert served == pytest.approx(expected, abs=0.01)


def own_engine(model: Any, asked: list[list[int]], first: list[int]) -> tuple[list[list[int]], int, list[int]]:
    """Decode in this package's engine, always with whole blocks: texts, cycles, drafts accepted at each position.

    vLLM's prefill emits a token, this engine's does not; so that cycles begin at the same places, that token is given.
    And vLLM counts the cycle that ends a text whole: so cycles are counted up to the one that reaches the length, and
    the text itself goes on.
    """
    from orthrus.decode.engine import Engine
    from orthrus.decode.options import Options
    from orthrus.policy import steps

    options = Options(max_new_tokens=TOKENS + DRAFTS)
    engine = Engine(model, rows=16, capacity=320, plan=steps.parse("full"))
    given = [[*prompt, token] for prompt, token in zip(asked, first, strict=True)]
    starts = {engine.add(ids, options, index=index): ids[-1:] for index, ids in enumerate(given)}
    answers: dict[int, list[int]] = {}
    cycles, accepted_at = 0, [0] * DRAFTS
    while engine.busy:
        for row, gained, accepted in ((one.row, one.token_ids, one.accepted) for one in engine.step()):
            answers[row.id] = row.token_ids
            if 1 + len(row.token_ids) - len(gained) < TOKENS:
                cycles += 1
                accepted_at = [count + (place < accepted) for place, count in enumerate(accepted_at)]
    return [(start + answers[id])[:TOKENS] for id, start in starts.items()], cycles, accepted_at
