"""A draft model is the backbone's first layers, trained on by cross-entropy; a run makes one that the engine takes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from orthrus.checkpoints.drafters import load_drafter
from orthrus.checkpoints.load import backbone_with_tokenizer
from orthrus.errors import ConfigError, UnsupportedModel
from orthrus.model.attach import attach
from orthrus.model.config import OrthrusConfig
from orthrus.peers.draft import DraftModel
from orthrus.train.config import recipe_from_mapping
from orthrus.train.draft import DraftTask, first_layers
from orthrus.train.peer_sections import DraftRecipe
from orthrus.train.plan import plan
from orthrus.train.run import run
from tests.families import tiny
from tests.train.tiny import saved_backbone, tiny_tokenizer, view_recipe


def draft_recipe(folder: Path, layers: int = 1, **sections: dict[str, Any]) -> DraftRecipe:
    tables = view_recipe(folder / "backbone", folder / "run").model_dump(mode="json")
    del tables["objective"]
    tables |= {"kind": "draft", "model": {"backbone": str(folder / "backbone"), "layers": layers}}
    for name, keys in sections.items():
        tables[name] = {**tables[name], **keys}
    recipe = recipe_from_mapping(tables)
    assert isinstance(recipe, DraftRecipe)
    return recipe


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_it_starts_as_the_backbone_s_first_layers(family: str) -> None:
    """Hidden states before the last norm are those of the backbone behind as many layers."""
    whole = tiny(family)
    small = first_layers(whole, 1)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        behind = whole(ids, output_hidden_states=True).hidden_states[1]
        found = small.base_model(ids).last_hidden_state
    torch.testing.assert_close(found, whole.base_model.norm(behind).detach())
    assert len(small.base_model.layers) == small.config.num_hidden_layers == 1


def test_the_loss_is_that_of_the_answers_tokens_document_by_document(tmp_path: Path) -> None:
    """Against plain passes over each document of a packed row."""
    saved_backbone(tmp_path / "backbone", tiny_tokenizer(), "qwen3")
    task = DraftTask(draft_recipe(tmp_path))
    rows = task._data.rows
    loss = task.loss(torch.arange(1).numpy(), 0)
    total, count = 0.0, 0
    for document in sorted(set(rows.document[0].tolist()) - {-1}):
        own = torch.from_numpy(rows.document[0] == document)
        ids, answer = (
            torch.from_numpy(rows.token_ids[0].copy()).long()[own],
            torch.from_numpy(rows.answer[0].copy())[own],
        )
        with torch.no_grad():
            logp = task.model(ids[None]).logits[0].log_softmax(-1)
        for place in range(1, len(ids)):
            if answer[place]:
                total, count = total - float(logp[place - 1, ids[place]]), count + 1
    assert int(loss.weight) == count > 0
    assert float(loss.total.detach()) == pytest.approx(total, rel=1e-5)


def test_a_run_makes_a_draft_model_that_is_loaded_by_name(tmp_path: Path) -> None:
    """Its weights have moved, in every part; what it took is beside it."""
    saved_backbone(tmp_path / "backbone", tiny_tokenizer(), "qwen3")
    recipe = draft_recipe(tmp_path)
    result = run(recipe)
    assert result.model is not None
    assert {"heldout/json/agreement", "heldout/json/tokens_per_cycle"} <= result.metrics.keys()
    model, _ = backbone_with_tokenizer(recipe.model.backbone)
    model.name_or_path = recipe.model.backbone
    before = first_layers(model, 1).state_dict()
    attach(model, OrthrusConfig(layers=()), attn_implementation="orthrus")
    assert isinstance(load_drafter(f"draft:{result.model}", model), DraftModel)
    small, _ = backbone_with_tokenizer(str(result.model))
    assert all(not torch.equal(tensor.float(), before[name]) for name, tensor in small.state_dict().items())
    assert plan(recipe).shapes.trainable == sum(p.numel() for p in small.parameters())


def test_what_cannot_be_shortened_is_refused(tmp_path: Path) -> None:
    """As many layers as the backbone has; layers that do not see the whole text."""
    saved_backbone(tmp_path / "backbone", tiny_tokenizer(), "qwen3")
    with pytest.raises(ConfigError, match=r"model\.layers must be less than the backbone's 2, found 2"):
        DraftTask(draft_recipe(tmp_path, layers=2))
    saved_backbone(tmp_path / "backbone", tiny_tokenizer(), "gemma3_text")
    with pytest.raises(UnsupportedModel, match="training a draft model needs full attention"):
        DraftTask(draft_recipe(tmp_path, run={"output": str(tmp_path / "other")}))
