"""From a recipe to a trained model: the task that the recipe describes, and the loop over it."""

from pkgutil import resolve_name
from typing import Final

from orthrus.train.backbone import BackboneTask
from orthrus.train.loop import TrainResult, train
from orthrus.train.ranks import Ranks
from orthrus.train.sections import AnsweredRecipe, Recipe

TASKS: Final = {
    "view": "orthrus.train.view:ViewTask",
    "eagle3": "orthrus.train.eagle3:Eagle3Task",
    "dflash": "orthrus.train.dflash:DFlashTask",
    "draft": "orthrus.train.draft:DraftTask",
    "blocks": "orthrus.train.blocks:BlocksTask",
}
"""Tasks of recipes of answers by their kind, imported on use."""


def run(recipe: Recipe, *, resume: bool = True) -> TrainResult:
    """Make the recipe's data where it is missing, then train; see `orthrus.train.loop.train` for what is raised."""
    if isinstance(recipe, AnsweredRecipe):
        return train(resolve_name(TASKS[recipe.kind])(recipe), recipe, resume=resume)
    with Ranks(recipe.run.device).main_first():
        task = BackboneTask(recipe)
    return train(task, recipe, resume=resume)
