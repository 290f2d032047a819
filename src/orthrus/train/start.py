"""Where training a view starts: the frozen backbone, with an untrained view or with one to train further."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from orthrus.checkpoints.load import DTYPES, backbone_with_tokenizer, device_of, is_adapter, load, locate
from orthrus.errors import ConfigError
from orthrus.model import mask_row
from orthrus.model.attach import attach, config_of, duals
from orthrus.model.attachment import attachment_of
from orthrus.model.config import OrthrusConfig
from orthrus.model.markov import install, untrained
from orthrus.model.mixer import DualMixer
from orthrus.model.twin import in_dtype, require_gradients
from orthrus.train.peer_sections import BlocksModel, DFlashModel
from orthrus.train.sections import AnsweredRecipe, ViewModel, ViewRecipe

_OF_RECIPE: Final = {
    "block_size", "backbone", "block_attention", "block_recurrence", "markov_rank", "anchor", "trained_mask",
}  # fmt: skip
"""What a recipe says of a view in the words of its configuration, whether it begins or goes on."""
_BEGUN_LATER: Final = {("anchor", "twin"), ("markov_rank", 0), ("trained_mask", False)}
"""What a view may be without and learn when it is trained further; masks can learn to start a block."""


def load_backbone(recipe: ViewRecipe, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load the frozen backbone with an untrained view, or with the view that `model.start_from` holds.

    The view is in float32, and so are the buffers; frozen weights are in the run's dtype.

    Raises:
        ConfigError: the recipe's `model.markov_rank`, `anchor`, `layers` or `trained_mask` are not those of the view to
            start from, its rows are longer than the backbone reads, or its mask token is none of the tokenizer's.
        UnsupportedModel: the backbone is quantised in a form that gradients do not pass through.
    """
    model, tokenizer = _in_float32(recipe)
    _check_rows(model, recipe)
    if recipe.run.sharding == "none":  # FSDP2 gathers weights of one dtype
        in_dtype(model, DTYPES[recipe.run.dtype], trained=False)
    model = model.to(device).eval()
    require_gradients(model)
    return model, tokenizer


def frozen_backbone(recipe: AnsweredRecipe, *, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load the backbone that a peer is trained beside, frozen, onto the run's device.

    Its view, which the engine needs, has no twins, unless the answers are to be drafted by a view, which is lent to it.

    Raises ConfigError: the recipe's rows are longer than the backbone reads.
    """
    model, tokenizer = backbone_with_tokenizer(recipe.model.backbone)
    config = OrthrusConfig(backbone=recipe.model.backbone, layers=() if recipe.answers.view is None else None)
    attach(model, config, attn_implementation="orthrus")
    _check_rows(model, recipe)
    return in_dtype(model.requires_grad_(False), dtype).to(device_of(recipe.run.device)).eval(), tokenizer


def mask_token(
    section: ViewModel | DFlashModel | BlocksModel, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
) -> int:
    """Return the token that stands for what is not written yet: the one asked for, <|mask|>, or the last there is.

    Raises ConfigError: the tokenizer has no such token.
    """
    wanted, vocabulary = section.mask_token, tokenizer.get_vocab()
    if wanted is not None and wanted not in vocabulary:
        raise ConfigError(f"model.mask_token must be a token of {section.backbone}, found {wanted!r}")
    return int(vocabulary.get(wanted or "<|mask|>", model.get_input_embeddings().weight.shape[0] - 1))


@contextmanager
def in_one_dtype(model: PreTrainedModel) -> Iterator[None]:
    """Decode as a loaded model does: inside, the view's tensors are in the backbone's dtype, afterwards as before."""
    masters = {p: p.data for p in model.parameters() if p.dtype != model.dtype}
    try:
        for parameter, tensor in masters.items():
            parameter.data = tensor.to(model.dtype)
        yield
    finally:
        for parameter, tensor in masters.items():
            parameter.data = tensor


def _in_float32(recipe: ViewRecipe) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    wanted = recipe.model
    described = wanted.model_dump(include=_OF_RECIPE)
    if wanted.start_from is None:
        model, tokenizer = backbone_with_tokenizer(wanted.backbone)
        mask = mask_token(wanted, tokenizer, model)
        config = OrthrusConfig(**described, mask_token_id=mask, layers=wanted.chosen_layers)
        return attach(model, config, attn_implementation="orthrus"), tokenizer
    backbone = wanted.backbone if is_adapter(locate(wanted.start_from)) else None  # or it holds its own
    model, tokenizer = load(wanted.start_from, dtype="float32", device="cpu", backbone=backbone, pack=False)
    started = config_of(model)
    mask_token(wanted, tokenizer, model)  # checked alone: a view keeps its own
    _check_start(started, replace(started, **described, layers=wanted.chosen_layers), model, wanted.start_from)
    if started.markov_rank == 0:
        install(model, untrained(model, wanted.markov_rank))
    if wanted.trained_mask and not started.trained_mask:
        mask_row.install(model, mask_row.untrained(model, started.mask))
    attachment_of(model).config = replace(started, **described)
    return model, tokenizer


def _check_start(started: OrthrusConfig, wanted: OrthrusConfig, model: PreTrainedModel, source: str) -> None:
    """Refuse to go on with a view whose tensors, or what it reads, are others than the recipe's."""
    mixers = [isinstance(dual, DualMixer) for dual in duals(model)]
    for name in ("anchor", "layers", "markov_rank", "trained_mask"):
        before, now = (
            config.layers_of(mixers) if name == "layers" else getattr(config, name) for config in (started, wanted)
        )
        if before != now and (name, before) not in _BEGUN_LATER:
            raise ConfigError(
                f"model.{name} must be {json.dumps(before)}, as {source} has it, found {json.dumps(now)}: set it, or "
                "start from another view"
            )


def _check_rows(model: PreTrainedModel, recipe: AnsweredRecipe) -> None:
    context = int(model.config.get_text_config().max_position_embeddings)
    if recipe.data.row_tokens > context:
        raise ConfigError(
            f"data.row_tokens must be at most {context}, which is what {recipe.model.backbone} reads, found "
            f"{recipe.data.row_tokens}: make rows shorter, or take a backbone of a longer context"
        )
