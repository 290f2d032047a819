"""Optimizers and the learning-rate schedule."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from orthrus.errors import ConfigError
from orthrus.train.muon import Muon, heads_of
from orthrus.train.sections import OptimizerSection, ScheduleSection


def learning_rate_factor(step: int, schedule: ScheduleSection) -> float:
    """The share of the full learning rate at a step, counted from 0: a pure function."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    span = max(1, schedule.steps - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / span)
    floor = schedule.final_fraction
    match schedule.kind:
        case "constant":
            left, decay = schedule.steps - step, schedule.decay_steps
            return 1.0 if left > decay or decay == 0 else floor + (1 - floor) * left / (decay + 1)
        case "linear":
            return floor + (1 - floor) * (1 - progress)
        case "cosine":
            return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


def hidden_matrices(model: nn.Module, trainable: Mapping[str, nn.Parameter]) -> set[str]:
    """Names of the trainable matrices that Muon is made for: those of linear layers, less the output head."""
    get_head = getattr(model, "get_output_embeddings", None)  # of transformers' models
    head = get_head() if callable(get_head) else None
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear) and module is not head}
    return {name for name, parameter in trainable.items() if id(parameter) in linear}


def build_optimizers(
    model: nn.Module, trainable: Mapping[str, nn.Parameter], section: OptimizerSection
) -> list[torch.optim.Optimizer]:
    """Optimizers for the trainable parameters; every group keeps its full rate as `base_lr`.

    Raises ConfigError: nothing is trainable.
    """
    if not trainable:
        raise ConfigError("at least one trainable parameter is required; found none")
    matrices = hidden_matrices(model, trainable) if section.name == "muon+adamw" else set()
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        chosen = {name: trainable[name] for name in sorted(matrices)}
        heads = heads_of(model, chosen) if section.muon_by == "head" else dict.fromkeys(chosen.values(), 1)
        optimizers.append(Muon(heads, lr=section.muon_lr or section.lr, weight_decay=section.weight_decay))
    if rest := [parameter for name, parameter in trainable.items() if name not in matrices]:
        decayed = [p for p in rest if p.ndim > 1]
        groups = [
            {"params": decayed, "weight_decay": section.weight_decay},
            {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        fused = True if all(p.is_cpu for p in rest) else None  # elsewhere torch chooses
        optimizers.append(torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, fused=fused))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
