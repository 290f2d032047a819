"""Models of a shape alone: random weights, made on the device, from nothing but a `config.json`.

What a pass costs does not depend on its weights, so a model can be timed before it is downloaded, or trained.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from orthrus.checkpoints.integers import INTEGERS
from orthrus.checkpoints.load import device_of, dtype_of, ready
from orthrus.errors import CheckpointError
from orthrus.model.attach import attach
from orthrus.model.config import OrthrusConfig

BLOCK = 32
"""Block length of the paper's models."""


def is_shape(model: str) -> bool:
    """Tell whether a model is named by its configuration alone."""
    return model.endswith(".json")


def shaped(
    config: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    compile: bool = False,
    pack: bool | None = None,
) -> PreTrainedModel:
    """Make a dual-view model of random weights after a configuration file; the options are those of `load`.

    Raises:
        CheckpointError: the file is no configuration of a model.
        ConfigError: a dtype or a device that cannot be used here.
    """
    target = device_of(device)
    wanted = dtype_of(dtype, target)
    try:
        settings = AutoConfig.from_pretrained(config)
        with target:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(settings, dtype=wanted if wanted != "auto" else torch.bfloat16)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{config} must be a model's config.json: {str(error).splitlines()[0]}") from error
    attach(model, OrthrusConfig(block_size=BLOCK, mask_token_id=0), attn_implementation="orthrus")
    return ready(model, compile=compile, pack=pack, integers=str(dtype) if dtype in INTEGERS else None)
