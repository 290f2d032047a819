"""From a recipe to a trained model: the task that the recipe describes, and the loop over it."""

from orthrus.train.backbone import BackboneTask
from orthrus.train.loop import TrainResult, train
from orthrus.train.peer_sections import BlocksRecipe, DFlashRecipe, Eagle3Recipe
from orthrus.train.ranks import Ranks
from orthrus.train.sections import AnsweredRecipe, Recipe, ViewRecipe
from orthrus.train.step import Task
from orthrus.train.view import ViewTask


def run(recipe: Recipe, *, resume: bool = True) -> TrainResult:
    """Make the recipe's data where it is missing, then train; see `orthrus.train.loop.train` for what is raised.

    With several processes a view's answers are shared out; a backbone's rows are made by the first.
    """
    if isinstance(recipe, AnsweredRecipe):
        return train(_task(recipe), recipe, resume=resume)
    with Ranks(recipe.run.device).main_first():
        task = BackboneTask(recipe)
    return train(task, recipe, resume=resume)


def _task(recipe: AnsweredRecipe) -> Task:
    """Return what a recipe of answers trains; peers are imported on use."""
    if isinstance(recipe, Eagle3Recipe):
        from orthrus.train.eagle3 import Eagle3Task

        return Eagle3Task(recipe)
    if isinstance(recipe, DFlashRecipe):
        from orthrus.train.dflash import DFlashTask

        return DFlashTask(recipe)
    if isinstance(recipe, BlocksRecipe):
        from orthrus.train.blocks import BlocksTask

        return BlocksTask(recipe)
    assert isinstance(recipe, ViewRecipe)
    return ViewTask(recipe)
