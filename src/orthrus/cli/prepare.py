"""`orthrus prepare`: a recipe's prompts, answers and packed rows, before any training."""

import json
from typing import TYPE_CHECKING, Any

from orthrus.cli.common import Json, out, print_json, resumable
from orthrus.cli.train import Recipe, Set
from orthrus.errors import ConfigError

if TYPE_CHECKING:
    from orthrus.train.sections import AnsweredRecipe


def prepare(recipe: Recipe, overrides: Set = None, as_json: Json = False) -> None:
    """Have the recipe's prompts answered and packed into rows; stopped and started again, it goes on.

    Under torchrun or accelerate launch, processes share the answering.
    """
    from orthrus.train.config import load_recipe
    from orthrus.train.corpus import data_folder
    from orthrus.train.sections import AnsweredRecipe

    checked = load_recipe(recipe, overrides or [])
    if not isinstance(checked, AnsweredRecipe):
        raise ConfigError(
            f"{recipe}: a recipe of answers is required, found kind {checked.kind!r}: backbones pack as they train"
        )
    with resumable():
        main = _run(checked)
    if not main:
        return
    folder = data_folder(checked)
    manifests = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/manifest.json"))}
    if as_json:
        print_json(manifests)
        return
    for name, manifest in manifests.items():
        out().print(f"{folder / name}: {_summary(manifest)}", soft_wrap=True)


def _run(recipe: "AnsweredRecipe") -> bool:
    """Prepare; returns whether this is the process that reports."""
    import torch

    from orthrus.checkpoints.load import DTYPES, device_of, tokenizer_of
    from orthrus.train.prepare import prepare as make
    from orthrus.train.ranks import Ranks
    from orthrus.train.sections import ViewRecipe
    from orthrus.train.start import frozen_backbone, load_backbone

    ranks = Ranks(recipe.run.device)  # before the device is touched: it gives each process its own
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    model, tokenizer = None, None
    if isinstance(recipe, ViewRecipe) and recipe.answers.by == "backbone":
        model, tokenizer = load_backbone(recipe, device_of(recipe.run.device))
    elif recipe.answers.by == "backbone":
        model, tokenizer = frozen_backbone(recipe, dtype=DTYPES[recipe.run.dtype])
    make(recipe, tokenizer or tokenizer_of(recipe.model.backbone), model, ranks=ranks)
    return ranks.main


def _summary(manifest: dict[str, Any]) -> str:
    parts = [
        f"{manifest['rows']} rows of {manifest['row_tokens']}",
        f"{manifest['documents']} answers",
        f"{manifest['answer_tokens']} answer tokens",
        f"{manifest.get('answers_cut_short', 0)} cut short",
        f"{manifest.get('prompts_too_long', 0)} prompts too long",
    ]
    return " · ".join(parts)
