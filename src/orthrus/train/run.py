"""From a recipe to a trained model: the task that the recipe describes, and the loop over it."""

from orthrus.train.backbone import BackboneTask
from orthrus.train.loop import TrainResult, train
from orthrus.train.ranks import Ranks
from orthrus.train.sections import Recipe, ViewRecipe
from orthrus.train.view import ViewTask


def run(recipe: Recipe, *, resume: bool = True) -> TrainResult:
    """Make the recipe's data where it is missing, then train; see `orthrus.train.loop.train` for what is raised.

    With several processes a view's answers are shared out; a backbone's rows are made by the first.
    """
    if isinstance(recipe, ViewRecipe):
        return train(ViewTask(recipe), recipe, resume=resume)
    with Ranks(recipe.run.device).main_first():
        task = BackboneTask(recipe)
    return train(task, recipe, resume=resume)
