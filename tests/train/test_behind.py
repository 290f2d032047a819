"""Blocks of masks behind the backbone's row, a softmax over the answers' tokens, runs that end when they are told."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from orthrus.checkpoints import files
from orthrus.errors import ConfigError
from orthrus.model.attach import config_of
from orthrus.train import anchors, frozen, objective
from orthrus.train.checkpoints import load_latest
from orthrus.train.loop import train
from orthrus.train.optim import learning_rate_factor
from orthrus.train.sections import ScheduleSection
from orthrus.train.start import in_one_dtype
from orthrus.train.view import TeacherKeys, ViewTask
from tests.train.tiny import one_row, saved_backbone, view_recipe

BEHIND = {"anchor": "backbone", "layers": "last:1", "markov_rank": 4}
SEEN = {"blind_anchor_share": 0.0}


@pytest.fixture
def backbone(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    return saved_backbone(tmp_path / "backbone", tokenizer, "llama")


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_a_block_behind_the_backbones_row_is_a_blind_one_whose_last_slot_predicts_too(
    attention: str, backbone: Path, tmp_path: Path
) -> None:
    model = {**BEHIND, "block_attention": attention}
    behind = ViewTask(view_recipe(backbone, tmp_path / "run", model=model, objective=SEEN))
    blind = ViewTask(
        view_recipe(
            backbone,
            tmp_path / "run",
            model={**model, "anchor": "twin", "block_size": 5},
            objective={"blind_anchor_share": 1.0, "block_lengths": [5]},
        )
    )
    document, position, token, answer = one_row(behind, 23, 31)
    generator = torch.Generator().manual_seed(0)
    blocks = anchors.sample(
        document, answer, blocks=8, block_length=6, blind_share=1.0, inside=True, generators=[generator]
    )
    assert answer.gather(1, blocks.anchor_BN).all()
    hidden = []
    for task in (behind, blind):
        keys = TeacherKeys(document)
        with torch.no_grad():
            frozen.read(task.model, token, document, position, keys=keys)
            hidden.append(task._student(keys, token, document, position, blocks, 5))
    assert torch.equal(*hidden)


def test_training_says_what_was_trained(backbone: Path, tmp_path: Path) -> None:
    recipe = view_recipe(backbone, tmp_path / "run", model=BEHIND, objective={**SEEN, "loss": "cross_entropy"})
    assert train(ViewTask(recipe), recipe).finished
    saved = files.read_config(tmp_path / "run" / "model")
    assert (saved.anchor, saved.layers) == ("backbone", (1,))
    again = {**BEHIND, "start_from": str(tmp_path / "run" / "model"), "layers": "last:2"}
    with pytest.raises(ConfigError, match="layers must be"):
        ViewTask(view_recipe(backbone, tmp_path / "more", model=again, objective=SEEN))


def test_a_view_of_the_twins_anchor_goes_on_behind_the_backbones_row(backbone: Path, tmp_path: Path) -> None:
    """It starts with the same tensors, and is saved as what it has become, which does not go back."""
    twin = {**BEHIND, "anchor": "twin"}
    recipe = view_recipe(backbone, tmp_path / "twin", model=twin)
    assert train(ViewTask(recipe), recipe).finished
    again = {**BEHIND, "start_from": str(tmp_path / "twin" / "model")}
    recipe = view_recipe(backbone, tmp_path / "behind", model=again, objective=SEEN)
    task = ViewTask(recipe)
    begun = {**ViewTask(view_recipe(backbone, tmp_path / "same", model={**again, "anchor": "twin"})).trainable()}
    assert all(torch.equal(tensor, begun[name]) for name, tensor in task.trainable().items())
    assert train(task, recipe).finished
    assert not any(torch.equal(tensor, begun[name]) for name, tensor in task.trainable().items())
    assert files.read_config(tmp_path / "behind" / "model").anchor == "backbone"
    back = {**twin, "start_from": str(tmp_path / "behind" / "model")}
    with pytest.raises(ConfigError, match='anchor must be "backbone"'):
        ViewTask(view_recipe(backbone, tmp_path / "back", model=back))


def test_a_mask_row_is_trained_below_the_first_twin_too_and_the_backbones_table_is_not(
    backbone: Path, tmp_path: Path
) -> None:
    """Its gradient comes through the frozen layer below the only twin; a run goes on from it and not without it."""
    model = {**BEHIND, "trained_mask": True, "mask_token": "<|im_end|>"}
    recipe = view_recipe(backbone, tmp_path / "run", model=model, objective=SEEN)
    task = ViewTask(recipe)
    table, row = task.model.get_input_embeddings().weight.clone(), task.model.mask_row.row_C.detach().clone()
    assert torch.equal(row, table[config_of(task.model).mask])
    task.loss(torch.arange(2).numpy(), 0).total.backward()
    assert task.model.mask_row.row_C.grad.abs().max() > 0
    assert train(task, recipe).finished
    assert torch.equal(task.model.get_input_embeddings().weight, table)
    assert not torch.equal(task.model.mask_row.row_C, row)
    again = {**model, "start_from": str(tmp_path / "run" / "model")}
    more = ViewTask(view_recipe(backbone, tmp_path / "more", model=again, objective=SEEN))
    assert torch.equal(more.model.mask_row.row_C, task.model.mask_row.row_C)
    with pytest.raises(ConfigError, match="trained_mask must be true, as"):
        ViewTask(view_recipe(backbone, tmp_path / "less", model={**again, "trained_mask": False}, objective=SEEN))


def test_a_softmax_over_the_answers_tokens_is_the_whole_one_less_the_others(backbone: Path, tmp_path: Path) -> None:
    """Equal in loss and gradient to the whole softmax with all other logits at minus infinity."""
    goal = {**SEEN, "loss": "cross_entropy", "vocabulary": "answers"}
    task = ViewTask(view_recipe(backbone, tmp_path / "run", model=BEHIND, objective=goal))
    tokens = task._answer_tokens
    assert tokens is not None
    assert 1 < len(tokens) < 300
    others = torch.ones(300, dtype=torch.bool)
    others[tokens] = False
    markov = task.model.markov
    assert not markov.after_VR[others].any()
    with torch.no_grad():
        markov.before_VR.normal_(generator=torch.Generator().manual_seed(0))
    loss = task.loss(torch.arange(1).numpy(), 0)
    loss.total.backward()
    found = {name: p.grad for name, p in task.trainable().items()}
    for p in task.trainable().values():
        p.grad = None
    whole = objective.chunked

    def masked(*args: object, head: objective.Head, **kwargs: object) -> objective.SlotScores:
        def with_others(hidden: torch.Tensor) -> torch.Tensor:
            return task.model.get_output_embeddings()(hidden).masked_fill(others, -torch.inf)

        student, teacher, target = args[1:]
        before = kwargs.pop("before")._replace(after=None)
        return whole(args[0], student, teacher, tokens[target], head=with_others, before=before, **kwargs)

    objective.chunked = masked
    try:
        again = task.loss(torch.arange(1).numpy(), 0)
    finally:
        objective.chunked = whole
    again.total.backward()
    torch.testing.assert_close(again.total, loss.total)
    for name, p in task.trainable().items():
        torch.testing.assert_close(p.grad, found[name], msg=name)


def test_frozen_weights_are_in_the_runs_dtype_and_the_view_is_decoded_in_it(backbone: Path, tmp_path: Path) -> None:
    task = ViewTask(view_recipe(backbone, tmp_path / "run", model=BEHIND, objective=SEEN, run={"dtype": "bfloat16"}))
    assert {p.dtype for p in task.trainable().values()} == {torch.float32}
    assert {p.dtype for p in task.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {b.dtype for b in task.model.buffers()} == {torch.float32}  # rotary frequencies
    before = {name: p.data_ptr() for name, p in task.trainable().items()}
    with in_one_dtype(task.model):
        assert {p.dtype for p in task.model.parameters()} == {torch.bfloat16}
    assert {name: p.data_ptr() for name, p in task.trainable().items()} == before


def test_a_constant_rate_ends_on_a_line() -> None:
    schedule = ScheduleSection(steps=10, kind="constant", decay_steps=4, warmup_steps=2)
    factors = [learning_rate_factor(step, schedule) for step in range(10)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_a_run_of_constant_rate_may_end_sooner_or_later(backbone: Path, tmp_path: Path) -> None:
    def recipe(steps: int, decay: int, kind: str = "constant"):
        schedule = {"steps": steps, "kind": kind, "decay_steps": decay}
        return view_recipe(backbone, tmp_path / "run", model=BEHIND, objective=SEEN, schedule=schedule)

    assert train(ViewTask(recipe(4, 0)), recipe(4, 0)).step == 4
    folder = tmp_path / "run" / "checkpoints"
    found = load_latest(folder, recipe(6, 2))
    assert found is not None
    assert train(ViewTask(recipe(6, 2)), recipe(6, 2)).step == 6
    with pytest.raises(ConfigError, match=r"schedule\.steps"):
        load_latest(folder, recipe(9, 0))  # its rate has come down by now


def test_what_a_block_behind_the_backbone_cannot_be_is_refused(backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be 0 with model\.anchor = 'backbone'"):
        view_recipe(backbone, tmp_path / "run", model=BEHIND)
    with pytest.raises(ConfigError, match="mask_token must be a token"):
        ViewTask(view_recipe(backbone, tmp_path / "run", model={**BEHIND, "mask_token": "<|none|>"}, objective=SEEN))
    assert config_of(
        ViewTask(
            view_recipe(backbone, tmp_path / "run", model={**BEHIND, "mask_token": "<|im_end|>"}, objective=SEEN)
        ).model
    ).mask
