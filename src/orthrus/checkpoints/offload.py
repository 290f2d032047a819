"""Which parts of a backbone stay in its files: the decoder layers, read again in every pass."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from orthrus.errors import UnsupportedModel


def device_map(cls: Any, home: Path | str, device: Any, *, config: Any = None, revision: str | None = None) -> Any:
    """Return transformers' `device_map` with every decoder layer on "disk" and the rest on `device`.

    `cls` loads the model (`AutoModelForCausalLM`); without a `config`, the one in `home` is read.
    Raises UnsupportedModel: the architecture does not say what its layers are.
    """
    config = AutoConfig.from_pretrained(home, revision=revision) if config is None else config
    with torch.device("meta"):
        model = cls(config) if hasattr(cls, "config_class") else cls.from_config(config)
    layers = set(model._no_split_modules or ())
    if not layers:
        raise UnsupportedModel(
            f"{type(model).__name__} must name its layers (_no_split_modules), found none: no offload"
        )
    return _devices("", model, layers, device)


def _devices(name: str, module: nn.Module, layers: set[str], device: Any) -> dict[str, Any]:
    if type(module).__name__ in layers:
        return {name: "disk"}
    if not any(type(child).__name__ in layers for child in module.modules()):
        return {name: device}
    inner = [
        _devices(f"{name}.{key}" if name else key, child, layers, device) for key, child in module.named_children()
    ]
    return {key: device for devices in inner for key, device in devices.items()}
