"""What a recipe will cost, before it runs: tokens, steps, memory and hours, from the model's shapes alone.

Builds the model on torch's meta device, so no weight is read. Sliding windows are counted as whole contexts. Peak rates
are the vendors' for dense bfloat16.

Units: operations are floating-point operations (a multiply-add is two), memory is bytes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from orthrus.checkpoints.load import home_of
from orthrus.errors import CheckpointError
from orthrus.model.attach import attach, duals
from orthrus.model.config import OrthrusConfig
from orthrus.model.delta import CHUNK
from orthrus.model.markov import markov_of
from orthrus.train import peer_plan
from orthrus.train.backbone import backbone_config
from orthrus.train.objective import NEEDS_TEACHER
from orthrus.train.packed import MOST, Answers, answers_of
from orthrus.train.peer_sections import DFlashRecipe, Eagle3Recipe
from orthrus.train.sections import AnsweredRecipe, BackboneRecipe, Recipe, ViewRecipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """A device: operations per second at peak, the share of them that a step reaches, memory in bytes."""

    rate: float
    share: float
    memory: float | None


HARDWARE = {
    "A100 80GB": Hardware(rate=312e12, share=0.35, memory=80e9),
    "H100 80GB": Hardware(rate=989e12, share=0.35, memory=80e9),
    "H200": Hardware(rate=989e12, share=0.35, memory=141e9),
    "RTX 4090": Hardware(rate=165e12, share=0.35, memory=24e9),
    # Measured: training the bundled backbone (results/train-nano-backbone.jsonl), not a peak.
    "one thread of an AMD EPYC": Hardware(rate=90e9, share=1.0, memory=None),
}
"""Shares on GPUs are assumptions; on the CPU the rate is what a run reached."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run takes on a number of equal devices.

    `seconds` per step and `hours` in all by hardware; `memory` in bytes on each device.
    """

    shapes: Shapes
    steps: int
    tokens: int
    drafted: int
    operations: float
    devices: int
    memory: dict[str, float]
    seconds: dict[str, float]
    hours: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "drafted_slots": self.drafted,
            "operations_per_step": self.operations,
            "devices": self.devices,
            "parameters": self.shapes.total,
            "trainable": self.shapes.trainable,
            "memory_bytes": {**self.memory, "all": sum(self.memory.values())},
            "seconds_per_step": self.seconds,
            "hours": self.hours,
        }


def plan(recipe: Recipe, *, devices: int = 1, answers: Answers = MOST) -> Plan:
    """Work out what a recipe takes on so many devices of each kind; `grad_accumulation = "auto"` counts as one part.

    Args:
        recipe: of any kind.
        devices: equal ones.
        answers: what its packed rows say (`packed.answers_of`).

    Raises:
        CheckpointError: the backbone's configuration cannot be read.
    """
    shapes = shapes_of(recipe)
    operations = step_operations(recipe, shapes, answers)
    steps, rows = recipe.schedule.steps, recipe.run.batch_rows
    parts = 1 if recipe.run.grad_accumulation == "auto" else recipe.run.grad_accumulation
    seconds = {name: operations / (hw.rate * hw.share * devices) for name, hw in HARDWARE.items()}
    return Plan(
        shapes=shapes,
        steps=steps,
        tokens=steps * rows * recipe.data.row_tokens,
        drafted=steps * rows * _slots(recipe),
        operations=operations,
        devices=devices,
        memory=_memory(recipe, shapes, rows / parts / devices, devices),
        seconds=seconds,
        hours={name: value * steps / 3600 for name, value in seconds.items()},
    )


def notes(recipe: AnsweredRecipe) -> dict[str, Any]:
    """Return what a peer's training took, for those who compare it: parameters, steps, rows, operations in all."""
    shapes, steps = shapes_of(recipe), recipe.schedule.steps
    return {
        "kind": recipe.kind,
        "trainable": shapes.trainable,
        "steps": steps,
        "rows": steps * recipe.run.batch_rows,
        "operations": steps * step_operations(recipe, shapes, answers_of(recipe)),
    }


def shapes_of(recipe: Recipe) -> Shapes:
    """Count a model's parameters by role, without making them."""
    config = _config(recipe)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if isinstance(recipe, ViewRecipe):
        chosen = recipe.model.layers
        layers = tuple(chosen) if isinstance(chosen, list) else chosen
        attach(model, OrthrusConfig(markov_rank=recipe.model.markov_rank, layers=layers))
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
        upper=text.num_hidden_layers - _first_twin(model),
        recurrent=recurrent,
        hidden=text.hidden_size,
        attention=text.num_attention_heads * head_dim,
        keys=2 * text.num_key_value_heads * head_dim,
        chunks=3 * keys_of + 2 * values_of,  # the convolution's inputs, keys and corrections
        states=states,
        vocabulary=text.vocab_size,
        activations=activations,
    )


def _first_twin(model: nn.Module) -> int:
    """Return how many layers lie below the first twin; 0 where there is none."""
    twins = [dual.diffusion is not None for dual in duals(model)]
    return twins.index(True) if True in twins else 0


def _trained(recipe: Recipe, model: nn.Module) -> nn.Module:
    """Return the module that a recipe trains, made of shapes alone."""
    if isinstance(recipe, DFlashRecipe):
        from orthrus.train.dflash import drafter_of

        with torch.device("meta"):
            return drafter_of(recipe, model, mask=0)
    if not isinstance(recipe, Eagle3Recipe):
        return model
    from orthrus.peers.eagle3_model import Eagle3, Eagle3Config

    with torch.device("meta"):
        return Eagle3(Eagle3Config.of(model))


def step_operations(recipe: Recipe, shapes: Shapes, answers: Answers = MOST) -> float:
    """Operations of one optimizer step over the whole batch: this is the floor that a step's time is held against."""
    T = recipe.data.row_tokens
    # Of a query with one key: a score, and its share of a value.
    pair = 4 * shapes.attention * (shapes.layers - shapes.recurrent)
    # Of a token with a state: what it reads for its correction and its output, and what it adds.
    state = 6 * shapes.states * shapes.recurrent
    if isinstance(recipe, BackboneRecipe):
        per_row = 6 * (shapes.active + shapes.head) * T + 3 * pair * T * T + 3 * state * T
        return float(per_row * recipe.run.batch_rows)
    goal = getattr(recipe, "objective", None)
    few = answers.tokens if getattr(goal, "vocabulary", "all") == "answers" else None
    vocabulary = few or shapes.vocabulary
    softmax = vocabulary * shapes.hidden
    numbers = {"active": shapes.active, "head": softmax, "layers": shapes.layers, "pair": pair}
    rank = recipe.model.markov_rank if isinstance(recipe, ViewRecipe | DFlashRecipe) else 0
    moved = shapes.trainable - 2 * rank * shapes.vocabulary  # without the correction
    if isinstance(recipe, DFlashRecipe):
        numbers |= {"trainable": moved, "hidden": shapes.hidden, "keys": shapes.keys, "vocabulary": vocabulary}
        return peer_plan.dflash_operations(recipe, answers=answers, **numbers)
    if not isinstance(recipe, ViewRecipe):
        return peer_plan.operations(recipe, answers=answers, trainable=moved, **numbers)
    M, scored = _computed(recipe), _scored(recipe)
    again = 2 if recipe.model.gradient_checkpointing else 1
    backward = shapes.upper / shapes.layers
    # A slot reads a row and its own block: on CPUs as peers' budgets count it, on CUDA without what a mask hides, half
    # of a causal row and what follows an anchor. The row's keys are the frozen pass's and need no gradient.
    seen = T / 2 if recipe.run.device == "cuda" else T
    block = recipe.model.block_size
    read = pair * M * (seen * (again + backward) + block * (again + 2 * backward))
    teacher = 2 * shapes.active * T + pair * T * seen + state * T
    student = 2 * shapes.active * M * (again + backward) + 2 * moved * M + read + state * M * (again + 2)
    # The state before each anchor, out of half a chunk on average, is found again in a layer that is computed again.
    student += recipe.objective.blocks_per_row * CHUNK * shapes.states * shapes.recurrent * again
    rows_read = min(T * answers.share, scored) if _needs_teacher(recipe) else 0
    # Logits are computed again in the backward pass.
    head = 2 * softmax * (3 * scored + 2 * rows_read) + 6 * rank * vocabulary * scored
    return float((teacher + student + head) * recipe.run.batch_rows)


def _memory(recipe: Recipe, shapes: Shapes, rows: float, devices: int) -> dict[str, float]:
    """Bytes on one of so many devices, which computes so many rows at a time, by what they hold.

    A sharded device has a share of everything but the output head, and two whole layers: one computes while the next
    arrives.
    """
    width = 2 if recipe.run.dtype == "bfloat16" else 4
    T = recipe.data.row_tokens
    tokens = T if isinstance(recipe, BackboneRecipe) else _slots(recipe)
    held = float(shapes.activations)
    if not isinstance(recipe, BackboneRecipe | ViewRecipe):
        tokens = peer_plan.read(recipe)
    if isinstance(recipe, Eagle3Recipe):
        held *= recipe.objective.steps / shapes.layers
    if isinstance(recipe, DFlashRecipe):
        held *= recipe.model.draft_layers / shapes.layers
    cast = 2.0 * shapes.active if recipe.run.dtype == "bfloat16" else 0.0  # autocast's copies, for the backward pass
    sharded = recipe.run.sharding != "none" and devices > 1
    share = 1 / devices if sharded else 1.0
    shared = 4.0 * (shapes.total - shapes.head)
    masks = float(T * T)
    keys = 0.0
    if isinstance(recipe, ViewRecipe):
        keys = rows * T * (shapes.layers - shapes.recurrent) * shapes.keys * width
        keys += 4 * rows * T * shapes.recurrent * (shapes.chunks + shapes.states / CHUNK)  # float32
        masks = float(tokens * (tokens + T))
        if recipe.model.gradient_checkpointing:
            held = shapes.activations / shapes.layers + 2 * shapes.hidden * shapes.layers
            cast /= shapes.layers
    return {
        "weights": 4.0 * shapes.head + shared * share,
        "gathered_layers": 2 * shared / shapes.layers if sharded else 0.0,
        "cast_weights": cast,
        "gradients": 4.0 * shapes.trainable * share,
        "optimizer": (8.0 if recipe.optimizer.name == "adamw" else 4.0) * shapes.trainable * share,
        "teacher_keys": keys,
        "activations": rows * tokens * held * width,
        "masks": rows * masks * (1 if recipe.run.device == "cuda" else 1 + width),
        "logits": 4 * 4.0 * shapes.vocabulary * min(1024.0, rows * tokens),
    }


def _per_token(model: nn.Module, experts: int) -> tuple[int, int]:
    """Parameters of matrices that a token passes, and the numbers it leaves behind for the backward pass.

    The twin stands beside the original, so it is left out. Stacked experts are matrices of three dimensions.
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


def _slots(recipe: Recipe) -> int:
    """Slots of the block pass per row, anchors included."""
    if isinstance(recipe, ViewRecipe):
        return recipe.objective.blocks_per_row * recipe.model.block_size
    return 0 if isinstance(recipe, BackboneRecipe) else peer_plan.drafted(recipe)


def _computed(recipe: ViewRecipe) -> int:
    """Slots per row that go through the layers: without a block's last where nothing sees it."""
    wanted = recipe.model
    alone = wanted.block_attention == "causal" and wanted.block_recurrence == "causal"
    return _scored(recipe) if alone or wanted.anchor == "backbone" else _slots(recipe)


def _scored(recipe: ViewRecipe) -> int:
    """Slots per row that have something to predict, at most."""
    return recipe.objective.blocks_per_row * (recipe.model.block_size - 1)


def _needs_teacher(recipe: ViewRecipe) -> bool:
    goal = recipe.objective
    return goal.acceptance == "overlap" or bool(NEEDS_TEACHER & goal.mixture.keys())


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
