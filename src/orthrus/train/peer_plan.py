"""The cost of a step of a peer's training: operations, and positions whose activations are kept.

Counts follow `plan`'s for a view, so that budgets can be made equal.
"""

from orthrus.train.objective import NEEDS_TEACHER
from orthrus.train.packed import Answers
from orthrus.train.peer_sections import BlocksRecipe, DFlashRecipe, Eagle3Recipe
from orthrus.train.sections import AnsweredRecipe


def operations(
    recipe: AnsweredRecipe, *, active: int, head: int, pair: int, layers: int, trainable: int, answers: Answers
) -> float:
    """Return the operations of one optimizer step over the whole batch.

    Args:
        recipe: of a peer.
        active: parameters of the matrices that a token passes, without the head.
        head: parameters of the head, for the tokens of the softmax.
        pair: operations of a query with one key, summed over all layers.
        layers: number of layers.
        trainable: number of trained parameters.
        answers: what the packed rows say.
    """
    T = recipe.data.row_tokens
    if isinstance(recipe, Eagle3Recipe):
        steps = recipe.objective.steps
        frozen = 2 * active * T + pair * T * T
        drafter = 6 * trainable * steps * T + 3 * (pair / layers) * steps * T * T
        # Logits are computed again in the backward pass, the backbone's at every step of the draft.
        taught = recipe.objective.loss in NEEDS_TEACHER
        scored = 2 * head * (3 + 2 * taught) * steps * T * answers.share
        return float((frozen + drafter + scored) * recipe.run.batch_rows)
    positions, times = read(recipe), _times(recipe)
    body = times * (6 * active * positions + 3 * pair * positions * positions)
    return float((body + 2 * head * 4 * T * times / 2) * recipe.run.batch_rows)  # half of the tokens are masked


def dflash_operations(
    recipe: DFlashRecipe,
    *,
    active: int,
    head: int,
    pair: int,
    layers: int,
    trainable: int,
    hidden: int,
    keys: int,
    vocabulary: int,
    answers: Answers,
) -> float:
    """Return the operations of one optimizer step of a DFlash drafter.

    Args:
        recipe: of the drafter. Arguments that are not listed here are those of `operations`.
        trainable: number of trained parameters without the correction's.
        hidden: the hidden size.
        keys: numbers in a token's keys and values of one layer.
        vocabulary: tokens of the softmax.
    """
    wanted, T = recipe.model, recipe.data.row_tokens
    slots, scored = recipe.objective.blocks_per_row * wanted.block_size, drafted(recipe)
    fused = (3 if wanted.taps is None else len(wanted.taps)) * hidden * hidden
    frozen = 2 * active * T + pair * T * T
    context = 6 * (fused + wanted.draft_layers * keys * hidden) * T
    attended = 3 * (pair / layers) * wanted.draft_layers * slots * (T + wanted.block_size)
    body = 6 * (trainable - fused) * slots + attended
    teacher = recipe.objective.acceptance == "overlap" or bool(NEEDS_TEACHER & recipe.objective.mixture.keys())
    logits = (
        2 * head * (3 * scored + 2 * teacher * min(T * answers.share, scored))
        + 6 * wanted.markov_rank * vocabulary * scored
    )
    return float((frozen + context + body + logits) * recipe.run.batch_rows)


def read(recipe: AnsweredRecipe) -> int:
    """Return the positions per row of a pass whose activations are kept."""
    if isinstance(recipe, DFlashRecipe):
        return recipe.data.row_tokens + recipe.objective.blocks_per_row * recipe.model.block_size
    whole = isinstance(recipe, BlocksRecipe) and recipe.model.block_size is None
    return recipe.data.row_tokens * (1 if whole or isinstance(recipe, Eagle3Recipe) else 2)


def drafted(recipe: AnsweredRecipe) -> int:
    """Return the most tokens of a row that are predicted."""
    if isinstance(recipe, Eagle3Recipe):
        return recipe.data.row_tokens * recipe.objective.steps
    if isinstance(recipe, DFlashRecipe):
        return recipe.objective.blocks_per_row * (recipe.model.block_size - (not recipe.model.shift))
    return recipe.data.row_tokens * _times(recipe) // 2


def _times(recipe: AnsweredRecipe) -> int:
    return 2 if isinstance(recipe, BlocksRecipe) and recipe.objective.complement else 1
