"""What a model computes with: all that decides its results to the last bit, and how long they take."""

import hashlib
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from orthrus.kernels.attention import uses_own
from orthrus.kernels.compiled import between
from orthrus.kernels.packed import kernels_of
from orthrus.kernels.rounded import rounded_to
from orthrus.memory import machine, settings
from orthrus.model.graphs import is_compiled
from orthrus.model.markov import NAME as MARKOV
from orthrus.model.mask_row import NAME as MASK_ROW
from orthrus.model.twin import is_plain, present, stored_parts

TWIN: Final = ".diffusion."
"""What the name of every parameter of a twin contains."""

_SAMPLE: Final = 4096


def fingerprint(model: PreTrainedModel) -> str:
    """Digest the backbone's weights: names, shapes and evenly spaced samples, the same in float32 and bfloat16."""
    return _digest(model, {backbone_name(name): name for name, _ in model.named_parameters() if not of_view(name)})[:32]


def identity(model: PreTrainedModel) -> str:
    """Digest what quantisation leaves alone, the embedding and all vectors: the same for every form of a backbone."""
    embedding = model.get_input_embeddings().weight
    kept = [name for name, p in model.named_parameters() if not of_view(name) and (p is embedding or p.ndim == 1)]
    return _digest(model, {backbone_name(name): name for name in kept})[:32]


def quantization_of(model: PreTrainedModel) -> str | None:
    """Return the form in which a quantised backbone keeps weights, as "torchao Int8Tensor"; None for plain ones."""
    if (ours := rounded_to(model)) is not None:
        return f"orthrus {ours}"
    kinds = {type(p) for name, p in model.named_parameters() if not of_view(name) and not is_plain(p)}
    return ", ".join(sorted(f"{kind.__module__.partition('.')[0]} {kind.__name__}" for kind in kinds)) or None


def precision_of(model: PreTrainedModel) -> str:
    """Return what a model was loaded in, as `load` calls it: its dtype, or "int8" or "int4" where its layers are so."""
    return rounded_to(model) or str(model.dtype).removeprefix("torch.")


def weights_digest(model: PreTrainedModel) -> str:
    """Return twelve hexadecimal digits for a model's weights, the view's too: the same in float32 and bfloat16."""
    return _digest(model, {name: name for name, _ in model.named_parameters()})[:12]


def _digest(model: PreTrainedModel, names: Mapping[str, str]) -> str:
    """Digest parameters under the names given for them; weights that lie elsewhere are fetched one by one."""
    digest = hashlib.sha256()
    for called, name in sorted(names.items()):
        module, _, last = name.rpartition(".")
        parent = model.get_submodule(module)
        with present(parent):
            tensor = getattr(parent, last)
            digest.update(f"{called} {list(tensor.shape)}".encode())
            for part in stored_parts(tensor):
                flat = part.reshape(-1)
                samples = flat[:: max(1, flat.numel() // _SAMPLE)].to("cpu", torch.bfloat16).view(torch.int16)
                digest.update(samples.numpy().tobytes())
    return digest.hexdigest()


def twin_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the trainable view's tensors by name, as they are stored: not copies."""
    return {name: tensor for name, tensor in model.state_dict().items() if of_view(name)}


def backbone_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the frozen model's parameters under the names they have without a view."""
    return {backbone_name(name): p for name, p in model.named_parameters() if not of_view(name)}


def backbone_name(name: str) -> str:
    """Return the name that a frozen parameter has without a view."""
    return name.replace(".ar.", ".")


def of_view(name: str) -> bool:
    """Tell whether a parameter of this name belongs to the view."""
    return TWIN in name or name.startswith((f"{MARKOV}.", f"{MASK_ROW}."))


def key_of(model: PreTrainedModel) -> tuple[object, ...]:
    """Return what tells within a process whether a model still computes as it did: cheap, and no weights."""
    kernels = (model.config._attn_implementation, uses_own(model, 1), is_compiled(model), kernels_of(model))
    return (str(model.device), precision_of(model), *kernels, torch.get_num_threads(), *settings(model.device))


def operators_of(model: PreTrainedModel) -> list[str]:
    """Name what passes of a model do by operators compiled here: attention, norms and rotations, products of one row.

    Which ones is settled when a model is loaded, whatever is loaded beside it. (Those of integers have the same bits as
    what stands in for them, or nothing does.)
    """
    own = uses_own(model, 1)
    one = any(kernels.own for kernels in kernels_of(model))
    return ["attention"] * own + ["norm", "rotary"] * (own and between() is not None) + ["one row"] * one


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    """Return weights (their digest), dtype, machine and kernels of a model as it stands, as JSON values."""
    return {
        "weights": weights_digest(model),
        "dtype": precision_of(model),
        "machine": machine(model.device),
        "attention": model.config._attn_implementation,
        "own_attention": uses_own(model, 1),
        "compiled": is_compiled(model),
        "packed": sorted(map(str, kernels_of(model))),
    }
