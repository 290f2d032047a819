"""The backbone's task: documents that do not see each other, the loss as specified, a model that loads."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from orthrus.data.packing import NO_DOCUMENT, PackedRows, load_rows
from orthrus.errors import ConfigError, DataError
from orthrus.train.backbone import BackboneTask, _tokenizer, next_token_targets
from tests.train.tiny import TABLES, tiny_recipe


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("backbone")


@pytest.fixture(scope="module")
def task(output: Path) -> BackboneTask:
    return BackboneTask(tiny_recipe(output))


@pytest.fixture(scope="module")
def rows(task: BackboneTask, output: Path) -> PackedRows:
    return load_rows(output / "data" / "train", tokenizer=PreTrainedTokenizerFast.from_pretrained(output / "tokenizer"))


@torch.no_grad()
def specified_loss(task: BackboneTask, rows: PackedRows, index: list[int], prompt_weight: float) -> Tensor:
    """Sum and weight of the loss, one document and one token at a time, each document run on its own."""
    total, weight = 0.0, 0.0
    for row in index:
        for document in range(rows.document[row].max() + 1):
            here = rows.document[row] == document
            ids = torch.tensor(np.array(rows.token_ids[row][here])).long()
            answer = rows.answer[row][here]
            log_probs = task.model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
            for at in range(len(ids) - 1):
                scale = 1.0 if answer[at + 1] else prompt_weight
                total -= scale * log_probs[at, ids[at + 1]].item()
                weight += scale
    return torch.tensor([total, weight])


def test_the_loss_is_that_of_every_document_alone(task: BackboneTask, rows: PackedRows) -> None:
    shared = np.flatnonzero(rows.document.max(axis=1) > 0)
    assert len(shared) >= 2, "rows of several documents are needed"
    index = [0, *shared[:2].tolist()]
    loss = task.loss(np.array(index), step=0)
    measured = torch.stack([loss.total.detach(), loss.weight])
    torch.testing.assert_close(measured, specified_loss(task, rows, index, 0.3), rtol=1e-5, atol=1e-3)


def test_metrics_split_the_loss_into_answers_and_the_rest(task: BackboneTask, rows: PackedRows) -> None:
    loss = task.loss(np.array([0, 1]), step=0)
    (answer, answers), (prompt, prompts) = loss.metrics["answer_loss"], loss.metrics["prompt_loss"]
    torch.testing.assert_close(answer + 0.3 * prompt, loss.total.detach())
    torch.testing.assert_close(answers + 0.3 * prompts, loss.weight)


def test_targets_stay_inside_documents() -> None:
    pad = NO_DOCUMENT
    rows = PackedRows(
        token_ids=np.zeros((1, 6), dtype=np.int32),
        document=np.array([[0, 0, 1, 1, pad, pad]], dtype=np.int32),
        position=np.array([[0, 1, 0, 1, 0, 0]], dtype=np.int32),
        answer=np.array([[False, True, False, True, False, False]]),
    )
    has_target, answer = next_token_targets(rows, slice(None))
    assert has_target.tolist() == [[True, False, True, False, False]]
    assert answer.tolist() == [[True, False, True, False, False]]


def test_tokens_outside_answers_can_weigh_nothing(task: BackboneTask, output: Path) -> None:
    other = BackboneTask(tiny_recipe(output, objective={"prompt_weight": 0.0}))
    loss = other.loss(np.array([0, 1]), step=0)
    total, count = loss.metrics["answer_loss"]
    assert loss.weight == count
    torch.testing.assert_close(loss.total.detach(), total)


def test_the_same_seed_makes_the_same_model(task: BackboneTask, output: Path) -> None:
    same, other = (BackboneTask(tiny_recipe(output, run={"seed": seed})) for seed in (0, 1))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(task.model.get_parameter(name), same.model.get_parameter(name))
    assert not torch.equal(task.model.get_parameter(name), other.model.get_parameter(name))


def test_the_published_model_loads_with_its_tokenizer(task: BackboneTask, tmp_path: Path) -> None:
    task.save(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    for name, tensor in task.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.to(torch.bfloat16)), name
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert not list(tmp_path.glob("*.bin"))


def test_rows_of_another_recipe_are_not_taken(task: BackboneTask, output: Path) -> None:
    with pytest.raises(DataError, match="other data than the recipe names"):
        BackboneTask(tiny_recipe(output, data={"seed": 5}))


def test_a_tokenizer_of_another_size_is_refused(task: BackboneTask, output: Path) -> None:
    """A folder that is there already is not taken for the recipe's, whose model would have too few embeddings."""
    model = TABLES["model"] | {"vocab_size": 599}
    with pytest.raises(ConfigError, match=r"tokenizer: a tokenizer of model\.vocab_size \(599\) .* found one of 600"):
        BackboneTask(tiny_recipe(output, model=model))


def test_a_tokenizer_is_copied_whole_or_not_at_all(
    task: BackboneTask, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it copies, a run leaves no folder that the next would take for the tokenizer."""
    copytree = shutil.copytree

    def killed(source: Path, target: Path) -> None:
        copytree(source, target)
        (target / "tokenizer.json").unlink()
        raise KeyboardInterrupt

    recipe = tiny_recipe(tmp_path, model=TABLES["model"] | {"start_from": str(output)})
    monkeypatch.setattr(shutil, "copytree", killed)
    with pytest.raises(KeyboardInterrupt):
        _tokenizer(recipe, tmp_path / "tokenizer")
    monkeypatch.undo()
    assert not (tmp_path / "tokenizer").exists()
    copied = _tokenizer(recipe, tmp_path / "tokenizer")
    assert copied.get_vocab() == PreTrainedTokenizerFast.from_pretrained(output / "tokenizer").get_vocab()
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_a_run_to_start_from_has_a_tokenizer(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, model=TABLES["model"] | {"start_from": str(tmp_path / "nowhere")})
    with pytest.raises(
        ConfigError, match=r"model\.start_from must be the folder of a backbone's run, .* found no .*nowhere"
    ):
        _tokenizer(recipe, tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_an_error_of_the_recipe(output: Path) -> None:
    """Not torch's own, with its traceback."""
    with pytest.raises(ConfigError, match="device 'cuda' cannot be used here"):
        BackboneTask(tiny_recipe(output, run={"device": "cuda"}))
