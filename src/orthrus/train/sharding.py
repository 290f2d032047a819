"""A model's parameters shared out over the processes of a run, by torch's FSDP2.

A process keeps an equal part of every decoder layer; a layer is gathered only while it computes. `fully_shard` is
called directly: accelerate's plugin makes the whole model the root, whose forward a task never calls, and averages
gradients where a step adds them up.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from orthrus.model.attach import layers_of


def shard(model: PreTrainedModel, *, device: torch.device, processes: int) -> None:
    """Share a dual-view model out over all processes and move it to their devices, in place; one keeps it whole.

    Its gradients are added up over the processes in the backward pass. The output head stays whole everywhere: a step
    needs it from the first slot's logits to the last one's gradient, and each process as often as its own slots ask.
    """
    if processes == 1:
        model.to(device)
        return
    head = model.get_output_embeddings().to(device)
    mesh = init_device_mesh(device.type, (processes,))
    # Without the root's own setting, its parameters would stay gathered between two passes.
    for module in [*layers_of(model), model.get_input_embeddings(), model.base_model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=set(head.parameters()))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it adds


def whole(value: Any, *, here: bool) -> Any:
    """Gather the sharded tensors of nested lists and dicts, on the CPU; all processes call it together.

    Where `here` is false None stands in their place. Whatever is not sharded stays as it is.
    """
    if isinstance(value, DTensor):
        tensor = value.full_tensor().detach()
        return tensor.cpu() if here else None
    if isinstance(value, dict):
        return {key: whole(item, here=here) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item, here=here) for item in value]
    return value


def part(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's part of a whole tensor, cut as a parameter of the same shape is; others stay whole."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def part_of_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return this process's part of an optimizer's whole `state_dict`."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = {
        index: {name: part(tensor, parameters[index]) for name, tensor in tensors.items()}
        for index, tensors in state["state"].items()
    }
    return {**state, "state": kept}


@contextmanager
def gathered(model: nn.Module, *, here: bool) -> Iterator[None]:
    """Give a sharded model whole parameters, on the CPU, to read and save, where `here`; all enter together."""
    sharded = {name: parameter for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)}
    try:
        for name, parameter in sharded.items():
            tensor = whole(parameter, here=here)
            if here:
                _set(model, name, nn.Parameter(tensor, requires_grad=parameter.requires_grad))
        yield
    finally:
        for name, parameter in sharded.items():
            _set(model, name, parameter)


def _set(model: nn.Module, name: str, parameter: Any) -> None:
    module, _, last = name.rpartition(".")
    setattr(model.get_submodule(module), last, parameter)
