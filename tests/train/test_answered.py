"""What drafters trained on a backbone's answers have in common."""

from pathlib import Path

import pytest
import torch

from orthrus.train.answered import AnsweredTask
from orthrus.train.dflash import DFlashTask
from orthrus.train.eagle3 import Eagle3Task
from tests.train.test_dflash import dflash_recipe
from tests.train.test_eagle3 import eagle3_recipe


def test_rotary_frequencies_are_not_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a run of bfloat16, weights are cast and positions are not, neither in training nor in the engine."""
    run = {"dtype": "bfloat16"}
    monkeypatch.setattr(AnsweredTask, "_drafted", lambda task, prompts, drafter: drafter)
    for task in (DFlashTask(dflash_recipe(tmp_path, run=run)), Eagle3Task(eagle3_recipe(tmp_path, run=run))):
        modules = (task._backbone, task._decoded([]).drafter)
        assert {p.dtype for module in modules for p in module.parameters()} == {torch.bfloat16}
        frequencies = [b for module in modules for name, b in module.named_buffers() if name.endswith("inv_freq")]
        assert len(frequencies) >= 4
        assert {buffer.dtype for buffer in frequencies} == {torch.float32}
