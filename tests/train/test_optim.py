"""Who gets which optimizer, and the learning rate as a function of the step."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from orthrus.errors import ConfigError
from orthrus.train.muon import Muon
from orthrus.train.optim import build_optimizers, hidden_matrices, learning_rate_factor, set_learning_rate
from orthrus.train.sections import OptimizerSection, ScheduleSection


def tiny_model(*, tied: bool) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        tie_word_embeddings=tied,
    )
    return Qwen3ForCausalLM(config)


@pytest.mark.parametrize("tied", [True, False])
def test_muon_gets_the_projections_and_adamw_the_rest(tied: bool) -> None:
    model = tiny_model(tied=tied)
    trainable = dict(model.named_parameters())
    muon = hidden_matrices(model, trainable)
    assert {name.split(".")[-2] for name in muon} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    section = OptimizerSection(name="muon+adamw", lr=0.1, muon_lr=0.2, weight_decay=0.3)
    optimizers = build_optimizers(model, trainable, section)
    assert [type(optimizer) for optimizer in optimizers] == [Muon, torch.optim.AdamW]
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, trainable.values()))
    decayed = {p.ndim for o in optimizers for g in o.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {2}


def test_only_what_is_trainable_is_optimized() -> None:
    model = tiny_model(tied=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    section = OptimizerSection(name="adamw", lr=0.1)
    [optimizer] = build_optimizers(model, {name: model.get_parameter(name)}, section)
    assert [p is model.get_parameter(name) for g in optimizer.param_groups for p in g["params"]] == [True]
    with pytest.raises(ConfigError, match="at least one trainable parameter"):
        build_optimizers(model, {}, section)


def test_rates_follow_the_factor_from_each_groups_own_rate() -> None:
    model = tiny_model(tied=True)
    section = OptimizerSection(name="muon+adamw", lr=0.1, muon_lr=0.2)
    optimizers = build_optimizers(model, dict(model.named_parameters()), section)
    for factor in (0.5, 1.0):
        set_learning_rate(optimizers, factor)
        muon, adamw = ([group["lr"] for group in optimizer.param_groups] for optimizer in optimizers)
        assert {*muon} == {0.2 * factor}
        assert adamw == [0.1 * factor, 0.1 * factor]


@pytest.mark.parametrize(
    ("kind", "halfway"), [("constant", 1.0), ("linear", 0.1 + 0.9 * 0.5), ("cosine", 0.1 + 0.9 * 0.5)]
)
def test_schedule_warms_up_and_ends_at_the_final_fraction(kind: str, halfway: float) -> None:
    schedule = ScheduleSection.model_validate({"steps": 110, "warmup_steps": 10, "kind": kind, "final_fraction": 0.1})
    factors = [learning_rate_factor(step, schedule) for step in range(111)]
    assert factors[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert factors[10] == 1.0
    assert factors[60] == pytest.approx(halfway)
    assert factors[110] == pytest.approx(1.0 if kind == "constant" else 0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)
