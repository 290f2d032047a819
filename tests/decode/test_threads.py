"""Engines of one model in several threads: what a pass keeps in the model's modules is its own."""

import threading

from orthrus.decode.options import Options
from orthrus.model.attach import duals
from tests import reference
from tests.decode.drive import dual, engine_of, finish
from tests.families import tiny

PROMPTS = [[5, 6, 7, 8, 9], [11, 12]]
TOKENS = 12


def test_steps_of_two_engines_take_turns() -> None:
    """In the middle of one's first draft pass the other's begins, over other rows: both texts are the plain loop's."""
    model = dual("qwen3")
    engines = [engine_of(model, rows=1) for _ in PROMPTS]
    for engine, prompt in zip(engines, PROMPTS, strict=True):
        engine.add(prompt, Options(max_new_tokens=TOKENS))
    texts: list[list[int]] = []
    other = threading.Thread(target=lambda: texts.append(finish(engines[1])[0].token_ids))

    def meanwhile(*_: object) -> None:
        if other.ident is None:
            other.start()
            other.join(timeout=0.1)  # it waits for its turn: nobody waits for it

    layer = duals(model)[0].ar
    hook = layer.get_submodule("q_proj").register_forward_hook(meanwhile)
    rows = finish(engines[0])
    other.join()
    hook.remove()
    texts.insert(0, rows[0].token_ids)
    assert texts == [reference.greedy_text(tiny("qwen3"), prompt, TOKENS) for prompt in PROMPTS]
