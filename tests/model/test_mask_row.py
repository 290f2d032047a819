"""Masks with an embedding of the view's own: the backbone's table stays as it is, and so do texts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import orthrus
from orthrus.checkpoints import files
from orthrus.decode.engine import Engine
from orthrus.decode.options import Options, Sampling
from orthrus.errors import CheckpointError, ConfigError, UnsupportedModel
from orthrus.model.attach import config_of
from orthrus.model.fingerprint import fingerprint, twin_tensors
from orthrus.model.mask_row import mask_row_of
from orthrus.policy import steps
from tests import reference
from tests.decode.drive import BLOCK, decode
from tests.families import VOCAB, perturb, tiny

MASK, OTHER = 7, 41
PROMPTS = [[5, MASK, 6, 7], [8], [30, MASK, MASK, 33, 34, 35], [9, OTHER, 11, VOCAB - 1]]
PLANS = ["full", "fixed:3", "tree:12", "onepass:2", "auto"]


def view(family: str = "qwen3", *, trained: bool = True, mask: int = MASK, **fields: object) -> PreTrainedModel:
    """A view that has moved, with a mask row of its own or without one."""
    config = orthrus.OrthrusConfig(block_size=BLOCK, mask_token_id=mask, trained_mask=trained, **fields)
    model = orthrus.attach(tiny(family), config, attn_implementation="orthrus")
    perturb(model)
    return model


def moved_to(token: int, model: PreTrainedModel) -> PreTrainedModel:
    """Set a model's mask row to a token's embedding."""
    with torch.no_grad():
        model.mask_row.row_C.copy_(model.get_input_embeddings()(torch.tensor(token)))
    return model


def engine_of(model: PreTrainedModel, plan: str, **more: object) -> Engine:
    chosen = steps.parse(plan)
    return Engine(model, rows=3, capacity=40 + chosen.scratch(BLOCK), plan=chosen, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("anchor", ["twin", "backbone"])
@pytest.mark.parametrize("plan", PLANS)
def test_texts_and_drafts_are_those_of_a_mask_token_with_the_same_embedding(plan: str, anchor: str) -> None:
    """Texts that hold the mask token itself, three rows at a time: the same tokens from the same cycles."""
    own = moved_to(OTHER, view(anchor=anchor))
    token = view(anchor=anchor, trained=False, mask=OTHER)
    options = Options(max_new_tokens=12)
    if plan == "auto":  # which steps it takes is the clock's choice
        rows = decode(engine_of(own, plan), PROMPTS, options)
        assert [row.token_ids for row in rows] == [reference.greedy_text(tiny("qwen3"), p, 12) for p in PROMPTS]
        return
    rows, expected = (decode(engine_of(model, plan), PROMPTS, options) for model in (own, token))
    assert [row.token_ids for row in rows] == [row.token_ids for row in expected]
    assert [row.token_ids for row in rows] == [reference.greedy_text(tiny("qwen3"), p, 12) for p in PROMPTS]
    assert [row.stats.accepted_per_position for row in rows] == [row.stats.accepted_per_position for row in expected]
    assert [row.stats.cycles for row in rows] == [row.stats.cycles for row in expected]


def test_a_row_that_has_moved_drafts_otherwise_and_writes_the_same() -> None:
    model = view(anchor="backbone")
    before = decode(engine_of(model, "full"), PROMPTS, Options(max_new_tokens=12))
    with torch.no_grad():
        model.mask_row.row_C.normal_(generator=torch.Generator().manual_seed(0))
    after = decode(engine_of(model, "full"), PROMPTS, Options(max_new_tokens=12))
    assert [row.token_ids for row in before] == [row.token_ids for row in after]
    assert [r.stats.accepted_per_position for r in before] != [r.stats.accepted_per_position for r in after]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma2", "gpt_oss"])
def test_any_family_reads_masks_as_it_reads_tokens(family: str) -> None:
    """Also where embeddings are scaled, by their module or by the model: drafts of the same cycles."""
    own, token = moved_to(OTHER, view(family)), view(family, trained=False, mask=OTHER)
    rows, expected = (decode(engine_of(m, "full"), PROMPTS, Options(max_new_tokens=8)) for m in (own, token))
    assert [(r.token_ids, r.stats.accepted_per_position) for r in rows] == [
        (r.token_ids, r.stats.accepted_per_position) for r in expected
    ]


def test_the_exact_mode_and_coupled_sampling_hold() -> None:
    model = moved_to(OTHER, view(anchor="backbone", block_attention="causal", markov_rank=2))
    for options in (Options(max_new_tokens=10), Options(max_new_tokens=10, sampling=Sampling(do_sample=True), seed=3)):
        plain, drafted = (
            [row.token_ids for row in decode(engine_of(model, plan, exact="token"), PROMPTS, options)]
            for plan in ("ar", "full")
        )
        assert plain == drafted


def test_it_begins_as_the_tokens_and_is_the_views_alone() -> None:
    """Trainable beside the twin; neither backbone nor fingerprint change; off again with the view."""
    model = view()
    assert torch.equal(mask_row_of(model).row_C, model.get_input_embeddings().weight[MASK])
    movable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert movable == twin_tensors(model).keys()
    assert {"mask_row.row_C"} == {name for name in movable if ".diffusion." not in name}
    assert fingerprint(model) == fingerprint(view(trained=False))
    plain, left = tiny("qwen3").state_dict(), orthrus.detach(model).state_dict()
    assert plain.keys() == left.keys()


def test_the_adapter_carries_it_and_the_official_layout_says_that_it_cannot(tmp_path: Path) -> None:
    model = moved_to(OTHER, view())
    orthrus.save(model, tmp_path / "adapter")
    assert "mask_row.row_C" in load_file(tmp_path / "adapter" / "orthrus.safetensors")
    other = orthrus.attach(tiny("qwen3"), files.read_config(tmp_path / "adapter"))
    files.load_adapter(other, tmp_path / "adapter")
    assert config_of(other).trained_mask
    assert torch.equal(other.mask_row.row_C, model.mask_row.row_C)
    with pytest.raises(CheckpointError, match="1 unexpected tensors: mask_row"):
        files.load_adapter(view(trained=False), tmp_path / "adapter")
    with pytest.raises(UnsupportedModel, match="has no place for trained_mask, found True: save an adapter"):
        orthrus.save(model, tmp_path / "official", format="official")
    with pytest.raises(ConfigError, match="trained_mask must be true or false, found 1"):
        orthrus.OrthrusConfig(trained_mask=1)
