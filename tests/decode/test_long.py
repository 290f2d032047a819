"""Contexts up to 64k tokens, with the rotary scaling that a configuration asks for."""

import pytest
import torch
from transformers import PreTrainedModel

import orthrus
from orthrus.decode.engine import Engine
from orthrus.decode.options import Options
from orthrus.policy import steps
from tests.decode.drive import BLOCK, decode, dual
from tests.families import perturb, tiny

YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096, "rope_theta": 10_000.0}


def long_model(positions: int) -> PreTrainedModel:
    """One layer of one key/value head."""
    model = tiny(
        "qwen3",
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=positions,
        rope_parameters=YARN,
    )
    orthrus.attach(model, orthrus.OrthrusConfig(block_size=BLOCK), attn_implementation="orthrus")
    perturb(model)
    return model


@pytest.mark.parametrize("positions", [4_608, pytest.param(65_536, marks=pytest.mark.slow)])
def test_a_long_prompt_gets_the_text_of_plain_decoding(positions: int) -> None:
    """Drafts and verifications at the far end of the context change nothing, and the context's end ends the text."""
    model = long_model(positions)
    length = positions - 24
    prompt = torch.randint(90, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    engines = {
        name: Engine(model, rows=1, capacity=positions + 16, plan=steps.parse(name), prefill_chunk=1024)
        for name in ("ar", "full", "tree:6")
    }
    plain, *drafted = (decode(engine, [prompt], Options(max_new_tokens=100))[0] for engine in engines.values())
    assert len(plain.token_ids) == 24
    assert plain.finish_reason == "length"
    assert all(row.token_ids == plain.token_ids for row in drafted)


@pytest.mark.parametrize("length", [1_100, pytest.param(16_000, marks=pytest.mark.slow)])
def test_a_long_prompt_of_a_hybrid_gets_the_text_of_generate(length: int) -> None:
    """States have read all of it, keys of the attention layer are all there; a second turn reads its own words only."""
    shape = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": length + 128}
    prompt = torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    model, plain = dual("qwen3_5_text", **shape), tiny("qwen3_5_text", attn="sdpa", **shape)

    def generated(text: list[int]) -> list[int]:
        ids = torch.tensor([text])  # of which none is padding, whatever its number
        out = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        return out[0, len(text) :].tolist()

    for name in ("full", "tree:6"):
        engine = Engine(model, rows=1, capacity=length + 128, plan=steps.parse(name))
        row = decode(engine, [prompt], Options(max_new_tokens=20))[0]
        assert row.token_ids == generated(prompt)
        turn = [*prompt, *row.token_ids, 5, 6]
        again = decode(engine, [turn], Options(max_new_tokens=20))[0]
        assert again.token_ids == generated(turn)
        assert again.cached >= len(turn) - 4


def test_what_a_cycle_allocates_does_not_grow_with_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of the cache's length is made in a cycle but masks: keys and values are read where they lie."""
    model = long_model(4096)
    engine = Engine(model, rows=1, capacity=4096, plan=steps.parse("full"))
    decode(engine, [list(range(1, 60)) * 50], Options(max_new_tokens=1))
    addresses = [buffer.data_ptr() for buffer in engine.cache.keys + engine.cache.values]
    seen: list[tuple[int, ...]] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **more: object) -> torch.Tensor:
        seen.append(tuple(key.shape))
        assert key.data_ptr() in addresses
        assert value.data_ptr() in addresses
        return real(query, key, value, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("orthrus.kernels.attention.scaled_dot_product_attention", spy)
    decode(engine, [list(range(1, 60)) * 50 + [3]], Options(max_new_tokens=12))
    assert len(seen) > 4
    assert {shape[2] > 2900 for shape in seen} == {True}
