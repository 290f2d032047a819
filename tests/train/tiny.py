"""Recipes, backbones and rows small enough to train on in a test."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from orthrus.data.packing import EncodedDocument, pack
from orthrus.decode.frames import Reading
from orthrus.decode.passes import Passes
from orthrus.model.cache import ScratchCache
from orthrus.train.config import recipe_from_mapping
from orthrus.train.sections import BackboneRecipe, ViewRecipe
from orthrus.train.step import batch
from orthrus.train.tokenizer import train_tokenizer
from orthrus.train.view import ViewTask
from tests.families import tiny

TEXTS = ["the cat sat on the mat and the dog sat on the log", "one two three four five six seven eight nine ten"]

TABLES: dict[str, Any] = {
    "kind": "backbone",
    "model": {
        "vocab_size": 600,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 24,
        "max_position_embeddings": 512,
    },
    "tokenizer": {"train_characters": 20_000},
    "data": {
        "tokens": 9_000,
        "row_tokens": 320,
        "sources": [
            {"kind": "synthetic", "domain": "maths", "weight": 2.0, "heldout": 3},
            {"kind": "synthetic", "domain": "json", "weight": 1.0},
        ],
    },
    "optimizer": {"name": "muon+adamw", "lr": 0.01, "muon_lr": 0.01, "weight_decay": 0.1},
    "schedule": {"steps": 8, "warmup_steps": 2},
    "run": {
        "batch_rows": 6,
        "grad_accumulation": 2,
        "threads": 1,
        "checkpoint_every": 3,
        "log_every": 2,
        "eval_every": 4,
    },
}


def tiny_recipe(output: Path, **sections: dict[str, Any]) -> BackboneRecipe:
    """The tiny recipe with some keys of some sections replaced."""
    tables = {**TABLES, "run": {**TABLES["run"], "output": str(output)}}
    for name, keys in sections.items():
        tables[name] = {**tables.get(name, {}), **keys}
    recipe = recipe_from_mapping(tables)
    assert isinstance(recipe, BackboneRecipe)
    return recipe


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A small tokenizer with the chat template."""
    return train_tokenizer(TEXTS * 40, vocab_size=300, max_length=256)


def saved_backbone(folder: Path, tokenizer: PreTrainedTokenizerFast, family: str, **overrides: object) -> Path:
    """Write a tiny random backbone as `from_pretrained` reads it."""
    model = tiny(family, vocab_size=300, **overrides)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def view_recipe(backbone: Path, output: Path, **sections: dict[str, Any]) -> ViewRecipe:
    """A view recipe small enough for a test."""
    tables: dict[str, Any] = {
        "kind": "view",
        "model": {"backbone": str(backbone), "block_size": 6},
        "data": {
            "row_tokens": 200,
            "sources": [{"kind": "synthetic", "domain": "json", "weight": 1.0, "heldout": 2}],
        },
        "responses": {"prompts": 6, "max_new_tokens": 24, "rows": 4, "eval_prompts": 2, "eval_tokens": 12},
        "objective": {"loss": "kl", "block_lengths": [6, 4], "blocks_per_row": 12, "blind_anchor_share": 0.3},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "schedule": {"steps": 6, "warmup_steps": 1},
        "run": {
            "output": str(output),
            "batch_rows": 2,
            "threads": 1,
            "checkpoint_every": 2,
            "log_every": 2,
            "eval_every": 3,
        },
    }
    for name, keys in sections.items():
        tables[name] = {**tables.get(name, {}), **keys}
    recipe = recipe_from_mapping(tables)
    assert isinstance(recipe, ViewRecipe)
    return recipe


def one_row(task: ViewTask, *lengths: int) -> list[Tensor]:
    """Random documents side by side in a row of 64, answers from their fifth token on.

    Returns documents, positions, tokens and answers, `[1, 64]` each.
    """
    ids = [np.random.default_rng(i).integers(5, 300, n).astype(np.int32) for i, n in enumerate(lengths)]
    packed = pack([EncodedDocument(token_ids=d, answer=np.arange(len(d)) >= 4) for d in ids], row_tokens=64, pad_id=0)
    return list(batch(packed, np.arange(1), next(task.model.parameters()).device))


def drafted(model: Any, prefix: list[int], anchor: Tensor, shown: Tensor | None = None) -> Tensor:
    """Return the decoder's own draft logits after a prefix, some drafts given."""
    cache = ScratchCache(rows=1, capacity=80)
    passes = Passes(model, cache)
    with torch.no_grad():
        if prefix:
            passes.prefill(slice(0, 1), [prefix], chunk=64)
        block = anchor[:, None] if shown is None else torch.cat([anchor[:, None], shown], dim=1)
        before = torch.full_like(anchor, -1)[:, None]
        reading = Reading(token_BQ=anchor[:, None], stop_BS=before, shown_BJ=block, drafts=5)
        ahead = passes.run(slice(0, 1), reading).ahead_BSMV
        assert ahead is not None
        return ahead[0, 0]
