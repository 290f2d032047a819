"""FSDP2 over two processes: the weights and files of an unsharded run, in half of its memory, interrupted or not."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from orthrus.checkpoints.files import ADAPTER_FILE, CONFIG_FILE
from orthrus.errors import ConfigError
from orthrus.model.attach import attach
from orthrus.model.fingerprint import backbone_tensors
from orthrus.train import objective
from orthrus.train.checkpoints import checkpoint_paths
from orthrus.train.loop import train
from orthrus.train.ranks import Ranks
from orthrus.train.sections import ViewRecipe
from orthrus.train.sharding import gathered, part, shard, whole
from orthrus.train.step import Loss, Rows
from orthrus.train.view import ViewTask
from tests.families import tiny
from tests.train.ranks_of import in_processes, last_state
from tests.train.tiny import saved_backbone, tiny_recipe, tiny_tokenizer, view_recipe

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "adamw": {},
    "bfloat16": {
        "model": {"gradient_checkpointing": True},
        "optimizer": {"name": "muon+adamw", "muon_lr": 0.01, "clip": 0.5},
        "run": {"dtype": "bfloat16"},
    },
    "by head": {"optimizer": {"name": "muon+adamw", "muon_lr": 0.01, "muon_by": "head"}},
}
TOLERANCE = {"adamw": 1e-5, "bfloat16": 2e-2, "by head": 2e-2}
"""Of a weight, at a rate of 0.01: float32's rounding; Muon's products and all passes in bfloat16, summed otherwise."""


class Crashing(ViewTask):
    """Fails in the middle of step 3, after the checkpoint at 2."""

    def loss(self, rows: Rows, step: int) -> Loss:
        if step == 3:
            raise RuntimeError("stopped by the test")
        return super().loss(rows, step)


def recipe_of(folder: Path, output: str, *, sharding: str, variant: str) -> ViewRecipe:
    """A recipe of two rows a process and step, in two parts."""
    sections = VARIANTS[variant]
    run = {**sections.get("run", {}), "sharding": sharding, "batch_rows": 4, "grad_accumulation": 2}
    model = {"backbone": str(folder / "backbone"), "block_size": 6, **sections.get("model", {})}
    responses = {"eval_prompts": 1, "eval_tokens": 6}
    sections = {**sections, "run": run, "model": model, "responses": responses}
    return view_recipe(folder / "backbone", folder / output, **sections)


def train_sharded(rank: int, folder: Path, output: str, variant: str, task_class: type[ViewTask]) -> None:
    """What each process does: train, then say what it holds and which of the backbone's tensors have changed."""
    recipe = recipe_of(folder, output, sharding="fsdp2", variant=variant)
    task = task_class(recipe)
    train(task, recipe)
    parameters = list(task.model.parameters())
    held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters)
    outside = sum(p.numel() for p in parameters if not isinstance(p, DTensor))
    fresh = AutoModelForCausalLM.from_pretrained(folder / "backbone").state_dict()
    with gathered(task.model, here=True):
        found = backbone_tensors(task.model)
        changed = [name for name, tensor in found.items() if not torch.equal(tensor, fresh[name])]
    report = {"held": held, "outside": outside, "all": sum(p.numel() for p in parameters), "changed": changed}
    (folder / f"{output}-{rank}.json").write_text(json.dumps(report))


def start_again(folder: Path, output: str) -> None:
    """Give a run the answers that were written for another, so that none are written again."""
    shutil.copytree(folder / "alone" / "data", folder / output / "data")


@pytest.fixture(scope="module", params=VARIANTS)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a run of one process, `alone`, and the same one sharded over two, `together`."""
    variant: str = request.param
    folder = tmp_path_factory.mktemp(variant)
    tokenizer = tiny_tokenizer()
    # Three heads: a matrix cut over two processes is cut in the middle of a head.
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3} if variant == "by head" else {}
    saved_backbone(folder / "backbone", tokenizer, "gemma3_text" if variant == "bfloat16" else "qwen3", **heads)
    recipe = recipe_of(folder, "alone", sharding="none", variant=variant)
    train(ViewTask(recipe), recipe)
    start_again(folder, "together")
    assert in_processes(2, train_sharded, folder, "together", variant, ViewTask) == [0, 0]
    return folder, variant


def test_sharded_processes_end_where_one_whole_does(runs: tuple[Path, str]) -> None:
    """Weights within `TOLERANCE`; losses and norms of gradients, which nothing may add up twice, within 2 %."""
    folder, variant = runs
    one, two = last_state(folder / "alone"), last_state(folder / "together")
    assert one["step"] == two["step"] == 6
    for name, tensor in one["trainable"].items():
        torch.testing.assert_close(two["trainable"][name], tensor, rtol=0, atol=TOLERANCE[variant])
    for figure in ("loss", "grad_norm"):
        logged = [
            [line[figure] for line in map(json.loads, (folder / run / "log.jsonl").open()) if line["event"] == "step"]
            for run in ("alone", "together")
        ]
        np.testing.assert_allclose(logged[1], logged[0], rtol=2e-2)


def test_what_is_saved_looks_the_same(runs: tuple[Path, str]) -> None:
    """Same keys, shapes and plain tensors in checkpoint and adapter, same figures in the log, one fingerprint."""
    folder, _ = runs

    def shapes(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shapes(item) for key, item in value.items()}
        if isinstance(value, list):
            return [shapes(item) for item in value]
        return (type(value), value.shape) if isinstance(value, torch.Tensor) else value

    one, two = folder / "alone", folder / "together"
    assert shapes(last_state(two)) == shapes(last_state(one))
    assert shapes(load_file(two / "model" / ADAPTER_FILE)) == shapes(load_file(one / "model" / ADAPTER_FILE))
    assert (two / "model" / CONFIG_FILE).read_text() == (one / "model" / CONFIG_FILE).read_text()
    logs = [[json.loads(line).keys() for line in (run / "log.jsonl").open()] for run in (one, two)]
    assert logs[0] == logs[1]
    assert (two / "RUN.md").exists()


def test_each_process_holds_half_and_the_backbone_stays(runs: tuple[Path, str]) -> None:
    """All but the output head is cut in two; gathered again, the backbone's tensors are those of its file, bitwise."""
    folder, _ = runs
    for rank in range(2):
        report = json.loads((folder / f"together-{rank}.json").read_text())
        assert report["changed"] == []
        assert report["held"] - report["outside"] == (report["all"] - report["outside"]) / 2
        assert report["outside"] == 300 * 48


@pytest.mark.parametrize("runs", ["bfloat16"], indirect=True)
def test_an_interrupted_sharded_run_ends_with_the_same_weights(runs: tuple[Path, str]) -> None:
    """Stopped in the middle of a step and started again, two processes end bit for bit as if never stopped."""
    folder, variant = runs
    start_again(folder, "parts")
    assert 0 not in in_processes(2, train_sharded, folder, "parts", variant, Crashing)
    assert [path.name for path in checkpoint_paths(folder / "parts" / "checkpoints")] == ["step-00000002"]
    assert in_processes(2, train_sharded, folder, "parts", variant, ViewTask) == [0, 0]
    resumed, never = last_state(folder / "parts"), last_state(folder / "together")
    assert resumed["step"] == never["step"]
    assert [n for n, t in never["trainable"].items() if not torch.equal(resumed["trainable"][n], t)] == []


def one_step_apart(rank: int, folder: Path) -> None:
    """Gradients of row 0 in the first process and, in the second, of row 1 without a slot to score."""
    recipe = recipe_of(folder, "together", sharding="fsdp2", variant="adamw")
    task = with_one_answer(ViewTask(recipe))
    task.loss(np.array([rank]), 0).total.backward()
    gradients = whole({name: parameter.grad for name, parameter in task.trainable().items()}, here=rank == 0)
    if rank == 0:
        torch.save(gradients, folder / "gradients.pt")


def with_one_answer(task: ViewTask) -> ViewTask:
    """Take the answers out of row 1, and score slots in chunks so small that rows differ in their number."""
    answer = np.array(task._data.rows.answer)
    answer[1] = False
    task._data = replace(task._data, rows=replace(task._data.rows, answer=answer))
    objective.chunked.__kwdefaults__["chunk"] = 8
    return task


@pytest.mark.parametrize("runs", ["adamw"], indirect=True)
def test_processes_with_and_without_slots_wait_for_each_other(
    runs: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often a process calls the output head, even never, gradients are the sum over both rows."""
    folder, _ = runs
    monkeypatch.setattr(objective.chunked, "__kwdefaults__", dict(objective.chunked.__kwdefaults__))
    assert in_processes(2, one_step_apart, folder) == [0, 0]
    task = with_one_answer(ViewTask(recipe_of(folder, "alone", sharding="none", variant="adamw")))
    task.loss(np.array([0, 1]), 0).total.backward()
    found = torch.load(folder / "gradients.pt")
    assert found.keys() == task.trainable().keys()
    for name, parameter in task.trainable().items():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def cut_and_gather(rank: int, folder: Path) -> None:
    """Cut a matrix of three rows between two processes and gather it again."""
    Ranks("cpu")
    layer = nn.Linear(5, 3, bias=False)
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    tensor, other = torch.arange(15.0).view(3, 5), torch.tensor(7.0)
    cut = part(tensor, layer.weight)
    assert isinstance(cut, DTensor)
    assert cut.to_local().shape == layer.weight.to_local().shape == (2 - rank, 5)
    assert part(other, layer.weight) is other
    found = whole({"a": [cut, other]}, here=rank == 0)["a"]
    assert torch.equal(found[0], tensor) if rank == 0 else found[0] is None
    assert found[1] is other


def test_parts_of_unequal_size_make_the_whole(tmp_path: Path) -> None:
    """Rows that do not divide are cut as FSDP2 cuts parameters, and come together again, in the first process alone."""
    assert in_processes(2, cut_and_gather, tmp_path) == [0, 0]


def test_one_process_keeps_the_model_whole() -> None:
    """Without others to share with, sharding changes nothing."""
    model = attach(tiny("qwen3"))
    before = dict(model.named_parameters())
    shard(model, device=torch.device("cpu"), processes=1)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_what_cannot_be_sharded_is_refused(tmp_path: Path) -> None:
    """Backbones, and parts of a step that a process would have to find by itself."""
    with pytest.raises(ConfigError, match=r"run\.sharding must be 'none' for a backbone, found 'fsdp2'"):
        tiny_recipe(tmp_path, run={"sharding": "fsdp2"})
    with pytest.raises(ConfigError, match="grad_accumulation must be a number with sharding, found 'auto'"):
        view_recipe(tmp_path, tmp_path, run={"sharding": "fsdp2", "grad_accumulation": "auto"})
