"""Drafts are as good in vLLM as in this package's own engine."""

from pathlib import Path

import pytest

from tests.vllm.drive import BASE, DRAFTS, drafting, prompts, serve, texts

pytestmark = pytest.mark.vllm

TOKENS = 48


@pytest.mark.timeout(7200)
def test_acceptance_per_position_is_the_own_engine_s(checkpoint: Path) -> None:
    """Within 1 % (absolute) at each of 15 positions, over 100 prompts; texts are equal token for token."""
    import orthrus

    asked = prompts(checkpoint)
    sampling = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True}
    (call,) = serve(checkpoint, {**BASE, **drafting(checkpoint)}, [{"prompts": asked, "sampling": sampling}])
    model, _ = orthrus.load(str(checkpoint), dtype="float32")
    proposed, accepted, own = [0] * DRAFTS, [0] * DRAFTS, []
    for row in own_rows(model, asked):
        own.append(row.token_ids)
        for place in range(DRAFTS):
            proposed[place] += row.stats.proposed_per_position[place]
            accepted[place] += row.stats.accepted_at_position[place]
    assert texts(call) == own
    served = [count / call["drafts"] for count in call["accepted_at"]]
    expected = [a / p for a, p in zip(accepted, proposed, strict=True)]
    print("vLLM", [round(x, 4) for x in served], "own", [round(x, 4) for x in expected])
    assert served == pytest.approx(expected, abs=0.01)


def own_rows(model: object, asked: list[list[int]]) -> list:
    """Decode in this package's engine, always with 15 drafts, to the same length."""
    from orthrus.decode import plan
    from orthrus.decode.engine import Engine
    from orthrus.decode.options import Options

    options = Options(max_new_tokens=TOKENS)
    engine = Engine(model, rows=16, capacity=320, plan=plan.parse(f"fixed:{DRAFTS}"))
    for index, prompt in enumerate(asked):
        engine.add(prompt, options, index=index)
    rows = {}
    while engine.busy:
        for progress in engine.step():
            rows[progress.row.id] = progress.row
    return [rows[id] for id in sorted(rows)]
