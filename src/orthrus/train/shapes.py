"""Sizes of a recipe's model, from its configuration alone: built on torch's meta device, so that no weight is read."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from orthrus.checkpoints.load import home_of
from orthrus.errors import CheckpointError
from orthrus.model.attach import attach, duals
from orthrus.model.config import OrthrusConfig
from orthrus.model.markov import markov_of
from orthrus.peers.eagle3_model import Eagle3, Eagle3Config
from orthrus.train.backbone import backbone_config
from orthrus.train.dflash import drafter_of
from orthrus.train.draft import shortened
from orthrus.train.peer_sections import DFlashRecipe, DraftRecipe, Eagle3Recipe
from orthrus.train.sections import BackboneRecipe, Recipe, ViewRecipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """Sizes of a model: parameters by role, and what one token costs.

    `active` are the parameters of matrices that one token goes through, the output head and the twin left out;
    `head` those of the output head; `activations` numbers kept per token for the backward pass, over all layers.
    `upper` counts the layers from the first one with a twin on, which the backward pass goes through.
    Recurrent layers are counted apart from those of attention: `chunks` are the numbers that one of them keeps per
    token for blocks to start from, `states` those of the states of all its heads.
    """

    total: int
    trainable: int
    active: int
    head: int
    layers: int
    upper: int
    recurrent: int
    hidden: int
    attention: int
    keys: int
    chunks: int
    states: int
    vocabulary: int
    activations: int

    @property
    def pair(self) -> int:
        """Operations of a query with one key, over all layers: a score, and its share of a value."""
        return 4 * self.attention * (self.layers - self.recurrent)

    @property
    def state(self) -> int:
        """Operations of a token with the states of all layers: read for its correction and its output, added to."""
        return 6 * self.states * self.recurrent


def shapes_of(recipe: Recipe) -> Shapes:
    """Count a model's parameters by role, without making them."""
    config = _config(recipe)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if isinstance(recipe, ViewRecipe):
        attach(model, OrthrusConfig(markov_rank=recipe.model.markov_rank, layers=recipe.model.chosen_layers))
    twins = [dual.diffusion is not None for dual in duals(model)]
    trainable = sum(p.numel() for p in _trained(recipe, model).parameters() if p.requires_grad)
    text = config.get_text_config()
    # For configurations that do not say it, as transformers' models read them.
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    active, activations = _per_token(model, getattr(text, "num_experts_per_tok", None) or 1)
    recurrent = (getattr(text, "layer_types", None) or []).count("linear_attention")
    keys_of, values_of, states = _recurrent(text) if recurrent else (0, 0, 0)
    return Shapes(
        total=sum(p.numel() for p in model.parameters()),
        trainable=trainable,
        active=active,
        head=text.vocab_size * text.hidden_size,
        layers=text.num_hidden_layers,
        upper=text.num_hidden_layers - (twins.index(True) if True in twins else 0),
        recurrent=recurrent,
        hidden=text.hidden_size,
        attention=text.num_attention_heads * head_dim,
        keys=2 * text.num_key_value_heads * head_dim,
        chunks=3 * keys_of + 2 * values_of,  # the convolution's inputs, keys and corrections
        states=states,
        vocabulary=text.vocab_size,
        activations=activations,
    )


def _trained(recipe: Recipe, model: nn.Module) -> nn.Module:
    """Return the module that a recipe trains, made of shapes alone."""
    with torch.device("meta"):
        if isinstance(recipe, DFlashRecipe):
            return drafter_of(recipe, model, mask=0)
        if isinstance(recipe, DraftRecipe):
            model = AutoModelForCausalLM.from_config(shortened(_config(recipe), recipe.model.layers))
        return Eagle3(Eagle3Config.of(model)) if isinstance(recipe, Eagle3Recipe) else model


def _per_token(model: nn.Module, experts: int) -> tuple[int, int]:
    """Parameters of matrices that a token passes, and the numbers it leaves behind for the backward pass.

    The twin is left out. Stacked experts are matrices of three dimensions.
    """
    twin = {id(p) for dual in duals(model) if dual.diffusion for p in dual.diffusion.parameters()}
    outside = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings  # of transformers' models
    outside |= {id(head().weight)} if callable(head) else set()
    correction = markov_of(model)
    outside |= set() if correction is None else {id(p) for p in correction.parameters()}
    # Short convolutions of single channels: a handful of operations for each.
    outside |= {id(module.weight) for module in model.modules() if isinstance(module, nn.Conv1d)}
    active = activations = 0
    for parameter in model.parameters():
        if parameter.ndim < 2 or id(parameter) in twin | outside:
            continue
        times = experts if parameter.ndim == 3 else 1
        active += parameter[0].numel() * times if parameter.ndim == 3 else parameter.numel()
        activations += (parameter.shape[-1] + parameter.shape[-2]) * times
    return active, activations


def _recurrent(text: Any) -> tuple[int, int, int]:
    """Return how wide keys, values and states are in all heads of a gated delta rule layer."""
    keys = text.linear_num_key_heads * text.linear_key_head_dim
    values = text.linear_num_value_heads * text.linear_value_head_dim
    return keys, values, values * text.linear_key_head_dim


def _config(recipe: Recipe) -> PreTrainedConfig:
    if isinstance(recipe, BackboneRecipe):
        return backbone_config(recipe.model)
    name = recipe.model.backbone
    try:
        return AutoConfig.from_pretrained(home_of(name))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name}: a backbone's config.json is required to plan, found none: {str(error).splitlines()[0]}"
        ) from error
