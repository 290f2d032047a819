"""What hybrid backbones are decoded with: served with the right texts, or refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import orthrus
from orthrus.decode.engine import Engine
from orthrus.decode.options import Options
from orthrus.errors import UnsupportedModel
from orthrus.kernels.int8 import is_exact
from orthrus.model import delta
from orthrus.model.attach import attach, duals
from orthrus.model.config import OrthrusConfig
from orthrus.model.graphs import compile_passes
from orthrus.peers.draft import DraftModel
from orthrus.policy import steps
from tests import reference
from tests.decode.drive import BLOCK, decode, dual
from tests.families import tiny

FAMILY = "qwen3_5_text"
PROMPTS = [[5, 6, 7], [30, 31, 32, 33]]


def texts(model: PreTrainedModel, plan: str, **more: Any) -> list[list[int]]:
    engine = Engine(model, rows=2, capacity=96, plan=steps.parse(plan), **more)
    return [row.token_ids for row in decode(engine, PROMPTS, Options(max_new_tokens=12))]


def plain(family: str = FAMILY) -> list[list[int]]:
    return [reference.greedy_text(tiny(family), prompt, 12) for prompt in PROMPTS]


@pytest.fixture
def folders(tmp_path: Path, characters: PreTrainedTokenizerFast) -> tuple[Path, Path]:
    """A view and its backbone."""
    for part in (tiny(FAMILY), characters):
        part.save_pretrained(tmp_path / "backbone")
    orthrus.save(dual(FAMILY), tmp_path / "view")
    return tmp_path / "view", tmp_path / "backbone"


@pytest.mark.skipif(not is_exact(), reason="needs VNNI instructions and oneDNN, or FBGEMM")
def test_int8_layers_are_served(folders: tuple[Path, Path]) -> None:
    """Those inside recurrent layers as well; rows have the same bits at every width, so all plans write one text."""
    view, backbone = folders
    model, _ = orthrus.load(view, backbone=backbone, device="cpu", dtype="int8")
    kinds = {type(module).__name__ for dual in duals(model)[:3] for module in dual.ar.modules()}
    assert "Int8Linear" in kinds
    written = texts(model, "ar")
    assert all(texts(model, plan) == written for plan in ("full", "tree:6", "onepass:2"))


@pytest.mark.parametrize("family", [FAMILY, "olmo_hybrid"])
def test_a_small_model_drafts_for_hybrids(family: str) -> None:
    """Its passes over the same cache leave the backbone's states as they are."""
    model = attach(tiny(family), OrthrusConfig(layers=()), attn_implementation="orthrus")
    drafter = DraftModel(model, tiny("qwen3", seed=5, vocab_size=90), proposals=5)
    for plan in ("full", "tree:6"):
        assert texts(model, plan, drafter=drafter) == plain(family)


def test_a_hybrid_does_not_draft_for_others() -> None:
    model = attach(tiny("qwen3"), OrthrusConfig(layers=()), attn_implementation="orthrus")
    with pytest.raises(UnsupportedModel, match="found Qwen3_5ForCausalLM, whose layers keep recurrent states"):
        DraftModel(model, tiny(FAMILY))


def test_compiled_passes_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="compiled passes need attention in every layer"):
        compile_passes(dual(FAMILY))


def test_offloaded_layers_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """By whoever offloads them."""
    view, backbone = folders
    with pytest.raises(UnsupportedModel, match="gated delta rule that are offloaded"):
        orthrus.load(view, backbone=backbone, device="cpu", offload_folder=tmp_path / "copies")
    model = tiny(FAMILY)
    cpu_offload(model.model.layers, execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModel, match="gated delta rule that are offloaded"):
        attach(model, OrthrusConfig(block_size=BLOCK))


@pytest.mark.parametrize("of_class", [False, True])
def test_another_kernel_in_a_layer_s_place_is_refused(of_class: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `kernels` sets one, on a layer or on its class; before a view is attached, or while an engine decodes."""

    def replace(mixer: torch.nn.Module) -> None:
        owner = type(mixer) if of_class else mixer
        monkeypatch.setattr(owner, "forward", lambda *args, **kwargs: None, raising=False)

    model = dual(FAMILY)
    engine = Engine(model, rows=1, capacity=96, plan=steps.parse("full"))
    engine.add(PROMPTS[0], Options(max_new_tokens=12))
    engine.step()
    replace(duals(model)[1].ar)
    with pytest.raises(UnsupportedModel, match="must run transformers' own forward, found another"):
        engine.step()
    other = tiny(FAMILY)
    replace(other.model.layers[1].linear_attn)
    with pytest.raises(UnsupportedModel, match="or replaced by hub kernels"):
        attach(other, OrthrusConfig(block_size=BLOCK))


@pytest.mark.parametrize("name", ["in_order", "fold_in_order"])
def test_a_kernel_that_does_not_go_token_by_token_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass solved at once, or its terms folded at once: bits then depend on where passes began and ended."""
    fast = {"in_order": lambda *given: delta.solve(*given), "fold_in_order": delta.fold}[name]
    monkeypatch.setattr(delta, name, fast)
    with pytest.warns(UserWarning, match="cannot verify drafts here"):
        engine = Engine(dual(FAMILY), rows=1, capacity=200, plan=steps.parse("full"), exact="token")
    assert engine.finding is not None
    assert not engine.finding.holds
