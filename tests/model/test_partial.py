"""Views whose twin stands in some layers only."""

import pytest
import torch

from orthrus.errors import ConfigError
from orthrus.model.attach import attach, config_of, detach, duals
from orthrus.model.config import OrthrusConfig
from orthrus.model.dual import View
from orthrus.model.fingerprint import twin_tensors
from tests.families import tiny


def test_layers_without_a_twin_run_draft_rows_through_the_frozen_attention() -> None:
    model = attach(tiny("llama"), OrthrusConfig(block_size=4, layers="last:1"))
    assert [dual.diffusion is not None for dual in duals(model)] == [False, True]
    assert config_of(model).layers == (1,)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        plain = model(ids).logits
        assert torch.equal(model(ids, view=View(name="diffusion")).logits, plain)
        for parameter in duals(model)[1].diffusion.parameters():
            parameter.add_(0.1)
        assert torch.equal(model(ids).logits, plain)
        assert not torch.equal(model(ids, view=View(name="diffusion")).logits, plain)


def test_twins_of_attention_alone_leave_recurrent_layers_to_the_backbone() -> None:
    model = attach(tiny("qwen3_5_text"), OrthrusConfig(layers="attention"))
    assert [dual.diffusion is not None for dual in duals(model)] == [False, False, False, True]
    assert config_of(model).layers == (3,)
    assert config_of(attach(tiny("llama"), OrthrusConfig(layers="attention"))).layers is None


def test_a_partial_view_trains_and_stores_its_own_layers_alone_and_comes_off_again() -> None:
    model = tiny("llama")
    names = set(model.state_dict())
    attach(model, OrthrusConfig(block_size=4, layers=(0,)))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(twin_tensors(model))
    assert all(".layers.0." in name for name in trained)
    assert set(detach(model).state_dict()) == names


def test_all_layers_are_the_default_however_they_are_named() -> None:
    assert config_of(attach(tiny("llama"), OrthrusConfig(layers="last:2"))).layers is None
    assert OrthrusConfig(layers=(1,)).to_dict()["layers"] == (1,)
    assert "layers" not in OrthrusConfig().to_dict()


@pytest.mark.parametrize("layers", ["first:1", "last:0", (0, 0), (True,), "last:3", (2,)])
def test_layers_that_are_not_the_models_are_refused(layers: object) -> None:
    with pytest.raises(ConfigError, match="layers must be"):
        attach(tiny("llama"), OrthrusConfig(layers=layers))
