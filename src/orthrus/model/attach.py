"""Attach the diffusion view to a Hugging Face causal language model, and take it off again.

Finds mixers by what they do, never by architecture, and refuses by name what the dual view cannot serve.
"""

import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from orthrus.errors import ConfigError, UnsupportedModel
from orthrus.kernels import attention, merged, packed
from orthrus.model import attachment, markov, mask_row
from orthrus.model.attachment import Attachment, config_of, is_attached
from orthrus.model.config import OrthrusConfig
from orthrus.model.dual import Dual, DualAttention
from orthrus.model.joined import Joined, Shapes
from orthrus.model.mixer import DualMixer, mixes
from orthrus.model.twin import twin_of

__all__ = [
    "attach",
    "config_of",
    "detach",
    "duals",
    "evaluating",
    "is_attached",
    "layers_of",
    "use_attention",
    "windows_of",
]


def attach(
    model: PreTrainedModel,
    config: OrthrusConfig | None = None,
    *,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Give every attention module of a causal LM a trainable twin, in place, and freeze everything else.

    Plain calls of the model stay what they were, bit for bit; passes with `view=` reach the twin. `attn_implementation`
    is the attention function to switch to ("orthrus" never repeats keys for grouped queries); None keeps the model's
    own.

    Raises:
        UnsupportedModel: the architecture is not served (the message says which part and why).
        ConfigError: a view is attached already, or the mask token is not in the vocabulary.
    """
    if is_attached(model):
        raise ConfigError("this model has a diffusion view already: detach() it first, or load() another")
    config = config or OrthrusConfig()
    sites = list(_mixer_sites(model))
    _require_weights(model)
    rows = model.get_input_embeddings().weight.shape[0]
    mask = rows - 1 if config.mask_token_id is None else config.mask_token_id
    if mask >= rows:
        raise ConfigError(f"mask_token_id must be one of the {rows} embedding rows, found {mask}")
    layers = config.layers_of([mixes(module) for _, _, module, _ in sites])
    partial = None if len(layers) == len(sites) else layers
    twins = [
        twin_of(module, model.get_input_embeddings().weight.dtype) if index in layers else None
        for index, (_, _, module, _) in enumerate(sites)
    ]
    trainable = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    model.requires_grad_(False)
    for (parent, name, module, window), twin in zip(sites, twins, strict=True):
        dual = DualMixer(module, twin) if mixes(module) else DualAttention(module, twin, window=window)
        setattr(parent, name, dual)
    markov.install(model, markov.untrained(model, config.markov_rank))
    mask_row.install(model, mask_row.untrained(model, mask) if config.trained_mask else None)
    config = dataclasses.replace(config, mask_token_id=mask, layers=partial)
    attachment.put(model, Attachment(config, model.config._attn_implementation, trainable))
    if attn_implementation is not None:
        use_attention(model, attn_implementation)
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Take the diffusion view off a model, in place; what remains is the backbone as it was.

    Its attention function is the one it had, and those of its parameters that were to be trained are again. Layers that
    were loaded in int8 or int4 stay so.
    """
    former = attachment.take(model)
    for parent, name, dual in list(_dual_sites(model)):
        setattr(parent, name, dual.ar)
    markov.install(model, None)
    mask_row.install(model, None)
    packed.unpack(model)
    merged.unmerge(model)
    attention.leave_own(model)
    model.set_attn_implementation(former.attention)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in former.trainable and parameter.is_floating_point())
    return model


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Switch a model's attention function; "orthrus" is registered on the way."""
    if name == attention.NAME:
        attention.register()
    model.set_attn_implementation(name)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Keep a model in evaluation mode meanwhile: no dropout, and no gradient checkpointing, which drops the cache."""
    training = [module for module in model.modules() if module.training] if model.training else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def duals(model: nn.Module) -> list[Dual]:
    """Return the model's dual modules in layer order, one of each layer."""
    return [module for module in model.modules() if isinstance(module, Dual)]


def is_hybrid(model: nn.Module) -> bool:
    """Tell whether some layers of a model keep a recurrent state in place of keys."""
    return any(isinstance(dual, DualMixer) for dual in duals(model))


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the model's decoder layers, which hold a dual module each, in order."""
    return [parent for parent, _, _ in _dual_sites(model)]


def windows_of(model: nn.Module) -> tuple[int, ...]:
    """Return the distinct sliding windows of the model's layers, in tokens."""
    windows = {dual.window for dual in duals(model) if isinstance(dual, DualAttention)}
    return tuple(sorted(window for window in windows if window is not None))


def require_reach(model: PreTrainedModel) -> None:
    """Check once, with passes over one token and two, that `view=` reaches every mixer of a model.

    And join both halves of the attention modules whose layers were seen to keep rows apart (`orthrus.model.joined`).

    Raises UnsupportedModel: the architecture does not hand keyword arguments on to its attention.
    """
    with attachment.attachment_of(model).lock:
        if not attachment.attachment_of(model).reached:
            _reach(model)


def _reach(model: PreTrainedModel) -> None:
    found = duals(model)
    reached: list[bool] = []
    attentions = [dual for dual in found if isinstance(dual, DualAttention)]
    shapes = Shapes([dual.ar for dual in attentions])
    with torch.no_grad(), ExitStack() as hooks:
        for dual in found:
            note = dual.register_forward_pre_hook(lambda _, __, kw: reached.append("view" in kw), with_kwargs=True)
            hooks.enter_context(note)
        for tokens in (1, 2):
            with shapes.watching():
                model.base_model(input_ids=torch.zeros(1, tokens, dtype=torch.long, device=model.device), view="ar")
    if len(reached) != 2 * len(found) or not all(reached):
        raise UnsupportedModel(
            f"{type(model).__name__} does not hand keyword arguments on to its attention, found {sum(reached) // 2} of "
            f"{len(found)} layers reached by view=: its diffusion view could never be run"
        )
    for dual, axes in zip(attentions, shapes.axes(), strict=True):
        dual.joined = None if axes is None or dual.diffusion is None else Joined(dual.ar, dual.diffusion, axes)
    attachment.attachment_of(model).reached = True


def _dual_sites(model: nn.Module) -> Iterator[tuple[nn.Module, str, Dual]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, Dual):
                yield parent, name, child


def _mixer_sites(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module, int | None]]:
    """Yield (decoder layer, attribute, mixer, window) for each layer, or say why it cannot be."""
    config = getattr(model, "config", None)
    if not isinstance(model, PreTrainedModel) or config is None:
        raise UnsupportedModel(f"attach() needs a transformers PreTrainedModel, found {type(model).__name__}")
    name = type(model).__name__
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"{name} is an encoder-decoder: the diffusion view drafts for decoder-only models")
    if not model.can_generate():
        raise UnsupportedModel(f"{name} has no language-model head: load it with AutoModelForCausalLM")
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention", "linear_attention"}
    if kinds:
        raise UnsupportedModel(
            f"{name} has layers of kind {', '.join(sorted(kinds))}: only full and sliding-window attention and the "
            "gated delta rule can keep drafts out of a row's state"
        )
    rope = getattr(text, "rope_parameters", None) or {}
    for part in rope.values() if all(isinstance(v, dict) for v in rope.values()) else [rope]:
        if part.get("rope_type") in ("dynamic", "longrope"):
            raise UnsupportedModel(
                f"{name} uses {part['rope_type']} rotary embeddings, whose frequencies depend on the sequence's "
                "length: drafts beyond the text would change the text"
            )
    layers = text.num_hidden_layers
    sites = [
        (parent, attribute, child)
        for parent in model.modules()
        for attribute, child in parent.named_children()
        if (_takes_a_cache(child) and not any(map(_takes_a_cache, list(child.modules())[1:]))) or mixes(child)
    ]
    recurrent = {i for i, kind in enumerate(getattr(text, "layer_types", None) or ()) if kind == "linear_attention"}
    sites = [site for site in sites if mixes(site[2]) == (site[2].layer_idx in recurrent)]
    if [child.layer_idx for _, _, child in sites] != list(range(layers)):
        missing = set(range(layers)) - {child.layer_idx for _, _, child in sites}
        others = {type(module).__name__ for module in model.modules() if getattr(module, "layer_idx", None) in missing}
        raise UnsupportedModel(
            f"{name} needs one attention module with a key/value cache, or one layer of the gated delta rule, in each "
            f"of its {layers} layers, found {len(sites)}, and {', '.join(sorted(others)) or 'nothing'} in the others: "
            "Mamba, lightning attention, short convolutions and other recurrences are not served, nor layers of the "
            "gated delta rule that are offloaded or replaced by hub kernels"
        )
    if len(recurrent) == layers:
        raise UnsupportedModel(f"{name} has no attention module: the diffusion view drafts by attention")
    for parent, attribute, child in sites:
        yield parent, attribute, child, _window(child, text)


def _require_weights(model: PreTrainedModel) -> None:
    """Refuse weights on the meta device that nobody will fetch, in a model that is not all shapes and no weights."""
    if all(parameter.is_meta for parameter in model.parameters()):
        if any(hasattr(module, "_hf_hook") for module in model.modules()):
            raise UnsupportedModel(
                "an offloaded model must keep its input embedding in memory, found it offloaded too: name a device for "
                "it in device_map"
            )
        return
    for name, module in model.named_modules():
        lost = [key for key, parameter in module.named_parameters(recurse=False) if parameter.is_meta]
        if lost and not hasattr(module, "_hf_hook"):
            raise UnsupportedModel(
                f"{name}.{lost[0]} holds no weights (device 'meta'), and no accelerate hook fetches them: "
                "load the whole model"
            )


def _takes_a_cache(module: nn.Module) -> bool:
    """Tell attention modules, and decoder layers that look like them from outside, from everything else."""
    if not isinstance(getattr(module, "layer_idx", None), int):
        return False
    parameters = inspect.signature(module.forward).parameters
    takes = {"hidden_states", "attention_mask", "past_key_values"} <= parameters.keys()
    passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return takes and passes_on


def _window(module: nn.Module, text_config: object) -> int | None:
    """Return the sliding window of a layer, in tokens; None for full attention."""
    kinds = getattr(text_config, "layer_types", None)
    window = getattr(text_config, "sliding_window", None)
    if kinds:
        return window if kinds[module.layer_idx] == "sliding_attention" else None
    return window
