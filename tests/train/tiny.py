"""A backbone recipe small enough to train in a test, on synthetic problems only."""

from pathlib import Path
from typing import Any

from orthrus.train.config import recipe_from_mapping
from orthrus.train.sections import BackboneRecipe

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
