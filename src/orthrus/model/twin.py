"""The twin of an attention module: a trainable copy in floating point, in whatever form the original keeps its weights.

Quantised linear layers are copied dequantised; weights that accelerate keeps elsewhere, to where they are used.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from orthrus.errors import UnsupportedModel
from orthrus.kernels.rounded import RoundedLinear

_Module = TypeVar("_Module", bound=nn.Module)

OF_HOOKS = ("_hf_hook", "_old_forward", "forward")  # what accelerate sets on a module


_OWN = ("torch", "orthrus")  # whose types of tensors hold the numbers that they stand for, sharded ones too


def twin_of(attention: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of an attention module that can be trained, equal to it up to what quantisation rounds.

    Copies of quantised weights get `dtype`, in which the model computes; others keep their own.

    Raises UnsupportedModel: weights that cannot be turned into floating point.
    """
    # Modules read from the model's configuration which attention function to call; twins must follow it too.
    copies: dict[int, Any] = {id(v): v for v in vars(attention).values() if isinstance(v, PreTrainedConfig)}
    fetched: dict[str, Tensor] = {}
    for path, module in attention.named_modules():
        hook = module.__dict__.get("_hf_hook")
        if hook is not None:
            copies[id(hook)] = hook  # not copied: it may hold every weight of the model
        with present(module):
            dense = _dequantised(module, dtype)
            if dense is not None:
                copies[id(module)] = dense
            elif hook is not None:
                parameters = module.named_parameters(prefix=path, recurse=False)
                fetched |= {name: parameter.detach().clone() for name, parameter in parameters}
    twin = copy.deepcopy(attention, copies)
    for module in twin.modules():
        for name in OF_HOOKS:
            module.__dict__.pop(name, None)
    for name, weight in fetched.items():
        path, _, last = name.rpartition(".")
        setattr(twin.get_submodule(path), last, nn.Parameter(weight))
    _require_plain(twin, like=attention)
    return twin.requires_grad_(True)


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """Keep a module's own parameters where they are computed with, though accelerate may store them elsewhere."""
    hook = module.__dict__.get("_hf_hook")
    if hook is None or not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def is_plain(weight: Tensor) -> bool:
    """Tell whether a tensor is stored as the numbers that it stands for."""
    return _library(weight) in _OWN and weight.is_floating_point() and weight.dtype.itemsize > 1


def stored_parts(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that a tensor is stored as: itself, or a quantised one's numbers and scales."""
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)
    if _library(tensor) in _OWN:
        return [tensor.detach()]
    if flatten is None:
        return [tensor.detach().as_subclass(Tensor)]
    inner = [getattr(tensor, name) for name in flatten()[0]]
    return [part for each in inner if each is not None for part in stored_parts(each)]


def require_gradients(model: nn.Module) -> None:
    """Check that gradients pass through a model's quantised layers, by one layer of each kind.

    Raises UnsupportedModel: they get lost in one, or come out wrong; the message names it.
    """
    met = set()
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or (type(module), type(weight)) in met:
            continue
        met.add((type(module), type(weight)))
        dense = _dequantised(module, torch.float32)
        if dense is None:
            continue
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        x_RC = torch.zeros(2, dense.in_features, dtype=dtype, device=weight.device, requires_grad=True)
        with torch.enable_grad():
            total = module(x_RC).sum()
            (gradient,) = torch.autograd.grad(total, x_RC, allow_unused=True) if total.requires_grad else (None,)
        gradient = torch.zeros_like(x_RC) if gradient is None else gradient
        expected = dense.weight.detach().sum(0).expand(2, -1)
        if not torch.allclose(gradient.float(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max())):
            raise UnsupportedModel(
                f"gradients do not pass through {name} ({type(module).__name__} of {type(weight).__name__}): no view "
                "can be trained on this backbone: train it on the unquantised one, and load it on this"
            )


def in_dtype(module: _Module, dtype: torch.dtype, *, trained: bool = True) -> _Module:
    """Turn a module's weights into a dtype, in place; buffers keep theirs: rounded rotary frequencies shift positions.

    Packed weights stay as they are, and so do those that are `trained`, where these are left out.
    """
    for parameter in module.parameters():
        wanted = trained or not parameter.requires_grad
        if wanted and parameter.is_floating_point() and parameter.dtype.itemsize > 1:
            parameter.data = parameter.data.to(dtype)
    return module


def _library(tensor: Tensor) -> str:
    return type(tensor).__module__.partition(".")[0]


def _dequantised(module: nn.Module, dtype: torch.dtype) -> nn.Linear | None:
    """Return a quantised linear layer as a plain one; None for any other module."""
    weight = module._parameters.get("weight")
    if weight is None or is_plain(weight) or not hasattr(module, "out_features"):
        return None
    dense: Any = _numbers(module, weight)
    if dense is None:
        return None
    dense = dense.detach().reshape(module.out_features, module.in_features).to(dtype)
    bias = module._parameters.get("bias")
    linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")  # type: ignore[arg-type]
    linear.weight = nn.Parameter(dense)
    linear.bias = None if bias is None else nn.Parameter(bias.detach().to(dense.dtype, copy=True))  # type: ignore[assignment]
    return linear.train(module.training)


def _numbers(module: nn.Module, weight: Tensor) -> Tensor | None:
    """Return the numbers that a quantised weight stands for; None where that is not known."""
    library = _library(weight)
    if isinstance(module, RoundedLinear):
        return module.dequantised()
    if library == "bitsandbytes":
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        dense: Tensor = dequantize_bnb_weight(weight, getattr(module, "state", None))
        return dense
    return weight.dequantize() if library == "torchao" else None


def _require_plain(twin: nn.Module, *, like: nn.Module) -> None:
    """Refuse a twin that holds weights as something else than plain floating-point numbers."""
    for path, module in twin.named_modules():
        tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        for name, tensor in tensors.items():
            beside = isinstance(module, nn.Linear) and name not in ("weight", "bias")
            if beside or (tensor.ndim > 1 and not is_plain(tensor)):
                raise UnsupportedModel(
                    f"{type(like).__name__} keeps {path}.{name} as {type(tensor).__name__} of {tensor.dtype}, which "
                    "cannot be turned into a trainable twin: load the backbone dequantised (many of transformers' "
                    "quantisation configs take dequantize=True), or quantised by torchao or bitsandbytes"
                )
