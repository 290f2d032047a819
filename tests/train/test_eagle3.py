"""The training-time test equals its definition, written entry by entry; a run makes a drafter that the engine takes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from orthrus.checkpoints.drafters import load_drafter
from orthrus.checkpoints.load import backbone_with_tokenizer
from orthrus.errors import ConfigError
from orthrus.model.attach import attach
from orthrus.model.config import OrthrusConfig
from orthrus.peers.eagle3_model import Eagle3
from orthrus.train.config import recipe_from_mapping
from orthrus.train.eagle3 import Eagle3Task, unrolled
from orthrus.train.peer_sections import Eagle3Recipe
from orthrus.train.plan import plan
from orthrus.train.run import run
from tests.train.tiny import saved_backbone, tiny_tokenizer, view_recipe


def eagle3_recipe(folder: Path, **sections: dict[str, Any]) -> Eagle3Recipe:
    tables = view_recipe(folder / "backbone", folder / "run").model_dump(mode="json")
    tables |= {"kind": "eagle3", "model": {"backbone": str(folder / "backbone")}, "objective": {"steps": 3}}
    for name, keys in sections.items():
        tables[name] = {**tables[name], **keys}
    recipe = recipe_from_mapping(tables)
    assert isinstance(recipe, Eagle3Recipe)
    return recipe


@pytest.mark.parametrize("taps", [[0, 2, 1], [0, 1, 1]])
def test_taps_that_vllm_would_read_in_another_order_are_refused(taps: list[int], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.taps must rise"):
        eagle3_recipe(tmp_path, model={"taps": taps})


def slow_step(drafter: Eagle3, tokens_E: Tensor, feature_S: list[Tensor], g_T: Tensor, t: int) -> Tensor:
    """What the drafter says at entry t after the drafts before it in `feature_S`: keys gathered one by one.

    `tokens_E` are the document's embeddings; entries of the text up to t have the backbone's features, and the entries
    behind t the drafter's own.
    """
    entries = [(place, tokens_E[place], g_T[place - 1]) for place in range(1, t + 1)]
    entries += [(t + i, tokens_E[t + i], said) for i, said in enumerate(feature_S, start=1)]
    keys, values = [], []
    for place, token, feature in entries:
        joined = drafter.join(token[None, None], feature[None, None])
        key, value = drafter.keys(joined, torch.tensor([[place]]))
        keys.append(key)
        values.append(value)
    place, token, feature = entries[-1]
    joined = drafter.join(token[None, None], feature[None, None])
    seen = torch.ones(1, 1, len(keys), dtype=torch.bool)
    position = torch.tensor([[place]])
    return drafter.attend(joined, feature[None, None], position, torch.cat(keys, 2), torch.cat(values, 2), seen)[0, 0]


def test_steps_equal_their_definition_for_every_document_of_a_row(tmp_path: Path) -> None:
    """Two documents side by side, three steps, every entry that has three tokens behind it."""
    saved_backbone(tmp_path / "backbone", tiny_tokenizer(), "qwen3")
    task = Eagle3Task(eagle3_recipe(tmp_path))
    drafter, lengths = task.model, (6, 7)
    document_BT = torch.tensor([[0] * 6 + [1] * 7 + [-1]])
    embedded_BTH, g_BTH = torch.randn(1, 14, 48), torch.randn(1, 14, 48)
    with torch.no_grad():
        steps = unrolled(drafter, embedded_BTH, g_BTH, document_BT, 3)
        start = 0
        for length in lengths:
            own = slice(start, start + length)
            for t in range(1, length - 2):
                said: list[Tensor] = []
                for step in range(3):
                    expected = slow_step(drafter, embedded_BTH[0, own], said, g_BTH[0, own], t)
                    found = steps[step].output_BTH[0, start + t]
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
                    said.append(expected)
            start += length


def test_a_run_makes_a_drafter_that_is_loaded_by_name(tmp_path: Path) -> None:
    """Six steps; loss down; what was trained is what is read; what it took is beside it."""
    saved_backbone(tmp_path / "backbone", tiny_tokenizer(), "qwen3")
    recipe = eagle3_recipe(tmp_path)
    result = run(recipe)
    assert result.finished
    assert result.model is not None
    assert {"heldout/json/accepted", "heldout/json/tokens_per_cycle"} <= result.metrics.keys()
    model, _ = backbone_with_tokenizer(recipe.model.backbone)
    attach(model, OrthrusConfig(layers=()), attn_implementation="orthrus")
    drafter = load_drafter(f"eagle3:{result.model}", model)
    assert drafter.proposals == 3
    took = plan(recipe)
    assert took.shapes.trainable == sum(p.numel() for p in drafter.drafter.parameters())
    assert took.operations > 0


def test_the_softmax_over_the_answers_tokens_leaves_out_all_others(tmp_path: Path) -> None:
    """Equal to a head whose other rows say minus infinity; held-out rows keep the whole vocabulary."""
    saved_backbone(tmp_path / "backbone", tiny_tokenizer(), "qwen3")
    few = Eagle3Task(eagle3_recipe(tmp_path, objective={"steps": 2, "vocabulary": "answers", "loss": "cross_entropy"}))
    rows = few._data.rows
    index = torch.arange(1).numpy()
    tokens = torch.from_numpy(np.unique(rows.token_ids[rows.answer])).long()
    assert few._answer_tokens is not None
    assert torch.equal(few._answer_tokens, tokens)
    assert len(tokens) < few._backbone.lm_head.weight.shape[0]
    found, whole = few.loss(index, 0), few._loss(rows, index, -1)
    others = torch.ones(few._backbone.lm_head.weight.shape[0], dtype=torch.bool)
    others[tokens] = False
    few._backbone.lm_head.register_forward_hook(lambda _, __, out: out.masked_fill(others, -1e9))
    masked = few._loss(rows, index, -1)
    torch.testing.assert_close(found.total, masked.total)
    assert float(found.total.detach()) < float(whole.total.detach())


def test_the_loss_is_the_steps_mean_losses_decayed(tmp_path: Path) -> None:
    """Against the definition on one packed row: mean KL of each step over the entries that have that many answers."""
    saved_backbone(tmp_path / "backbone", tiny_tokenizer(), "qwen3")
    task = Eagle3Task(eagle3_recipe(tmp_path, objective={"steps": 3, "step_decay": 0.5}))
    rows = task._data.rows
    loss = task.loss(torch.arange(1).numpy(), 0)
    document, answer = (torch.from_numpy(a[:1].copy()) for a in (rows.document, rows.answer))
    token_BT = torch.from_numpy(rows.token_ids[:1].copy()).long()
    position_BT = torch.from_numpy(rows.position[:1].copy()).long()
    from orthrus.train import frozen

    read = frozen.read(task._backbone, token_BT, document, position_BT, task.model.config.taps)
    embedded = task._backbone.get_input_embeddings()(token_BT)
    steps = unrolled(task.model, embedded, task.model.fuse(read.tapped), document, 3)
    expected, T = 0.0, token_BT.shape[1]
    for i, own in enumerate(steps):
        terms = []
        for t in range(T - i - 1):
            reach = range(t + 1, t + i + 2)
            if position_BT[0, t] > 0 and all(answer[0, r] and document[0, r] == document[0, t] for r in reach):
                teacher = task._backbone.lm_head(read.hidden_BTC[0, t + i]).log_softmax(-1)
                student = task._backbone.lm_head(task.model.norm(own.output_BTH[0, t])).log_softmax(-1)
                terms.append((teacher.exp() * (teacher - student)).sum())
        expected += 0.5**i * float(torch.stack(terms).detach().mean())
    assert abs(float(loss.total.detach()) / float(loss.weight) - expected) < 1e-4 * abs(expected)
