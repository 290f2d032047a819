"""Training a view on a CUDA device: FlexAttention's loss and gradients are those of dense masks on the CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from orthrus.train.loop import train
from orthrus.train.view import ViewTask
from tests.train.tiny import saved_backbone, view_recipe

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gpt_oss"])
def test_the_loss_and_its_gradients_are_the_cpus(
    family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    backbone = saved_backbone(tmp_path / "backbone", tokenizer, family, head_dim=16)
    losses, gradients = {}, {}
    data = None
    for device in ("cpu", "cuda"):
        task = ViewTask(view_recipe(backbone, tmp_path / "run", run={"device": device}), data=data)
        data = task._data
        loss = task.loss(np.arange(2), 0)
        loss.total.backward()
        losses[device] = float(loss.total)
        gradients[device] = {name: p.grad.cpu() for name, p in task.trainable().items() if p.grad is not None}
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-4)
    assert gradients["cuda"].keys() == gradients["cpu"].keys()
    for name, gradient in gradients["cpu"].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradients["cuda"][name], gradient, rtol=1e-2, atol=1e-3 * scale)


def test_a_run_ends_and_its_view_drafts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Six steps in bfloat16, checkpoints and evaluation included."""
    backbone = saved_backbone(tmp_path / "backbone", tokenizer, "qwen3", head_dim=16)
    recipe = view_recipe(backbone, tmp_path / "run", run={"device": "cuda", "dtype": "bfloat16"})
    assert train(ViewTask(recipe), recipe).finished
