"""What a step of a peer's training takes: operations, and positions that leave something for the backward pass.

Counted as `plan` counts a view's, so that budgets can be made equal. Knows recipes and shapes; builds no model.
"""

from orthrus.train.peer_sections import BlocksRecipe, Eagle3Recipe
from orthrus.train.sections import AnsweredRecipe


def operations(recipe: AnsweredRecipe, *, active: int, head: int, pair: int, layers: int, trainable: int) -> float:
    """Return the operations of one optimizer step over the whole batch.

    Args:
        recipe: of a peer.
        active: parameters of matrices that a token goes through, the head left out.
        head: parameters of the head.
        pair: operations of a query with one key in all layers.
        layers: how many these are.
        trainable: parameters that are trained.
    """
    T = recipe.data.row_tokens
    if isinstance(recipe, Eagle3Recipe):
        steps = recipe.objective.steps
        frozen = 2 * (active + head) * T + pair * T * T
        drafter = 6 * trainable * steps * T + 3 * (pair / layers) * steps * T * T
        scored = 2 * head * 4 * steps * T  # logits are computed again in the backward pass
        return float((frozen + drafter + scored) * recipe.run.batch_rows)
    positions, times = read(recipe), _times(recipe)
    body = times * (6 * active * positions + 3 * pair * positions * positions)
    return float((body + 2 * head * 4 * T * times / 2) * recipe.run.batch_rows)  # half of the tokens are masked


def read(recipe: AnsweredRecipe) -> int:
    """Return how many positions a row has in a pass whose activations are kept."""
    whole = isinstance(recipe, BlocksRecipe) and recipe.model.block_size is None
    return recipe.data.row_tokens * (1 if whole or isinstance(recipe, Eagle3Recipe) else 2)


def drafted(recipe: AnsweredRecipe) -> int:
    """Return how many tokens of a row are predicted at most."""
    if isinstance(recipe, Eagle3Recipe):
        return recipe.data.row_tokens * recipe.objective.steps
    return recipe.data.row_tokens * _times(recipe) // 2


def _times(recipe: AnsweredRecipe) -> int:
    return 2 if isinstance(recipe, BlocksRecipe) and recipe.objective.complement else 1
