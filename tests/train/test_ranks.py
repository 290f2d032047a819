"""Several processes make one run: the same steps as one process, interrupted or not, and refusals."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orthrus.errors import ConfigError
from orthrus.train.backbone import BackboneTask
from orthrus.train.checkpoints import checkpoint_paths
from orthrus.train.loop import train
from orthrus.train.ranks import Ranks
from orthrus.train.step import Loss, Rows
from tests.train.ranks_of import in_processes, last_state
from tests.train.tiny import tiny_recipe

RUN = {"batch_rows": 4, "grad_accumulation": 1}


class Dying(BackboneTask):
    """Kills its own process, the second, in the middle of step 4."""

    def loss(self, rows: Rows, step: int) -> Loss:
        if step == 4 and Ranks("cpu").count == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(rows, step)


def train_in(rank: int, output: Path, task: type[BackboneTask], run: dict[str, Any]) -> None:
    """What each process does."""
    recipe = tiny_recipe(output, run=run)
    train(task(recipe), recipe)


def refused(rank: int, folder: Path) -> None:
    """Write what sharing three rows between two processes says."""
    try:
        Ranks("cpu").share(np.arange(3))
    except ConfigError as error:
        (folder / str(rank)).write_text(str(error))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process over whole batches."""
    output = tmp_path_factory.mktemp("alone")
    recipe = tiny_recipe(output, run=RUN)
    train(BackboneTask(recipe), recipe)
    return output


@pytest.fixture
def prepared(alone: Path, tmp_path: Path) -> Path:
    """An output folder with tokenizer and rows."""
    for name in ("tokenizer", "data"):
        shutil.copytree(alone / name, tmp_path / name)
    return tmp_path


@pytest.fixture(scope="module")
def together(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in two processes with half of every batch each."""
    output = tmp_path_factory.mktemp("together")
    for name in ("tokenizer", "data"):
        shutil.copytree(alone / name, output / name)
    assert in_processes(2, train_in, output, BackboneTask, RUN) == [0, 0]
    return output


def test_two_processes_end_where_one_does(alone: Path, together: Path) -> None:
    """Half a batch each, summed, is the batch: weights within 2e-3 (a fifth of one step's rate), losses within 1e-3."""
    one, two = last_state(alone), last_state(together)
    assert one["step"] == two["step"] == 8
    for name, tensor in one["trainable"].items():
        torch.testing.assert_close(two["trainable"][name], tensor, rtol=0, atol=2e-3)
    losses = [
        [line["loss"] for line in map(json.loads, (folder / "log.jsonl").open()) if line["event"] == "step"]
        for folder in (alone, together)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


def test_the_first_process_alone_writes(together: Path) -> None:
    """Every report is in the log once, and the log says how many processes there were."""
    lines = [json.loads(line) for line in (together / "log.jsonl").open()]
    assert [line["step"] for line in lines] == [0, 2, 4, 4, 6, 8, 8]
    assert lines[0]["provenance"]["processes"] == 2
    assert (together / "model" / "model.safetensors").exists()


def test_two_killed_processes_resume_bitwise_equal(together: Path, prepared: Path) -> None:
    """One is killed in the middle of a step and takes the other along; the run started again ends the same."""
    codes = in_processes(2, train_in, prepared, Dying, RUN)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] != 0
    assert [path.name for path in checkpoint_paths(prepared / "checkpoints")] == ["step-00000003"]
    assert in_processes(2, train_in, prepared, BackboneTask, RUN) == [0, 0]
    resumed, whole = last_state(prepared), last_state(together)
    assert resumed["step"] == whole["step"]
    assert [n for n, t in whole["trainable"].items() if not torch.equal(resumed["trainable"][n], t)] == []


def test_rows_that_cannot_be_shared_equally_are_refused(tmp_path: Path) -> None:
    """Three rows for two processes: both say what is required."""
    assert in_processes(2, refused, tmp_path) == [0, 0]
    for rank in ("0", "1"):
        assert "must be a multiple of the processes (2), found 3" in (tmp_path / rank).read_text()


def test_one_process_shares_with_nobody() -> None:
    """Without a process group, sums and rows pass through as they are."""
    ranks = Ranks("cpu")
    assert (ranks.count, ranks.main) == (1, True)
    assert ranks.share(np.arange(3)).tolist() == [0, 1, 2]
    assert ranks.add({"a": (1.0, 2.0)}) == {"a": (1.0, 2.0)}
    assert (ranks.any(True), ranks.any(False)) == (True, False)
