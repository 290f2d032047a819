"""Linear layers multiplied as one: the same results, the same weights, and nothing left behind in copies."""

import copy
from pathlib import Path

import pytest
import torch

import orthrus
from orthrus.bench.peers.hf import plain
from orthrus.checkpoints.files import load_adapter
from orthrus.kernels.merged import MergedLinear, merge, unmerge
from orthrus.model.attach import config_of, detach
from tests.decode.drive import dual
from tests.families import tiny


def logits(model: torch.nn.Module, view: str) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=torch.arange(12)[None], view=view).logits
        return out


@pytest.mark.parametrize(
    ("family", "per_layer"), [("qwen3", 8), ("qwen2", 8), ("gemma2", 8), ("phi3", 0), ("mixtral", 6)]
)
def test_merged_layers_give_what_they_gave(family: str, per_layer: int) -> None:
    """Both views, weights and gradients included; what an architecture has merged already is left as it is."""
    model = dual(family)
    before = {view: logits(model, view) for view in ("ar", "diffusion")}
    weights = {name: p.clone() for name, p in model.named_parameters()}
    merge(model)
    merged = [module for module in model.modules() if type(module) is MergedLinear]
    assert len(merged) == 2 * per_layer
    for view, expected in before.items():
        torch.testing.assert_close(logits(model, view), expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(layer._merged is not None and layer._merged._input is None for layer in merged)
    loss = model(input_ids=torch.arange(12)[None], view="diffusion").logits.sum()
    loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad and "proj" in name)


def test_weights_that_change_are_the_ones_multiplied_by() -> None:
    model = merge(dual())
    other = dual("qwen3", seed=3)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(logits(model, "ar"), logits(other, "ar"), rtol=1e-5, atol=1e-5)


def test_copies_and_unmerged_layers_are_plain() -> None:
    model = merge(dual())
    twin = copy.deepcopy(model)
    assert all(m._merged is None for m in twin.modules() if isinstance(m, MergedLinear))
    assert torch.equal(logits(twin, "ar"), logits(dual(), "ar"))
    unmerge(model)
    assert not any(isinstance(m, MergedLinear) for m in model.modules())
    assert torch.equal(logits(model, "ar"), logits(dual(), "ar"))


def test_a_merged_model_is_saved_and_detached_as_any_other(tmp_path: Path) -> None:
    """Views of one tensor are written as tensors of their own; nothing of the merger is left on the backbone."""
    model = merge(dual())
    orthrus.save(model, tmp_path / "view", format="adapter")
    model.save_pretrained(tmp_path / "whole")
    fresh = orthrus.attach(tiny("qwen3"), config_of(model), attn_implementation="orthrus")
    load_adapter(fresh, tmp_path / "view")
    assert torch.equal(logits(fresh, "diffusion"), logits(dual(), "diffusion"))
    backbone = detach(model)
    assert not any(isinstance(m, MergedLinear) for m in backbone.modules())
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(backbone(input_ids=ids).logits, tiny("qwen3", attn="orthrus")(input_ids=ids).logits)


def test_a_plain_backbone_for_comparison_leaves_its_original_merged() -> None:
    """It shares the weights: were they moved, what is loaded into the original later would go unnoticed."""
    model = merge(dual())
    plain(model)
    other = dual("qwen3", seed=3)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(logits(model, "ar"), logits(other, "ar"), rtol=1e-5, atol=1e-5)


def test_layers_called_with_other_inputs_do_not_get_each_others() -> None:
    """Called alone, in any order, with any input: a layer's own product."""
    model = merge(dual())
    first, second = [m for m in model.modules() if isinstance(m, MergedLinear)][:2]
    with torch.no_grad():
        a, b = torch.randn(2, 1, 3, first.in_features)
        for layer, x in ((second, a), (first, b), (second, b), (first, a)):
            torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
