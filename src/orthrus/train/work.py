"""What one optimizer step takes, by the kind of its recipe.

Operations are floating-point operations; a multiply-add is two. A peer's are counted as a view's, so that budgets can
be made equal. Frozen weights take one pass, trained ones three: forwards, and twice backwards.
"""

from dataclasses import dataclass
from typing import NamedTuple

from orthrus.checkpoints.files import read_object
from orthrus.model.delta import CHUNK
from orthrus.train.corpus import data_folder
from orthrus.train.peer_sections import BlocksRecipe, DFlashRecipe, DraftRecipe, Eagle3Recipe
from orthrus.train.prepare import made_from
from orthrus.train.sections import AnsweredRecipe, BlockObjective, Recipe, ViewRecipe
from orthrus.train.shapes import Shapes


class Work(NamedTuple):
    """What one row of a step takes.

    Attributes:
        operations: of all passes, the logits and the loss.
        kept: positions whose activations are kept for the backward pass.
        drafted: slots of blocks, a view's anchors included; tokens that a peer predicts, at most.
        depth: layers that keep activations, as a share of the backbone's.
    """

    operations: float
    kept: int
    drafted: int
    depth: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """Answers of packed rows: their share of all positions, and how many different tokens (None: the vocabulary)."""

    share: float = 1.0
    tokens: int | None = None


MOST = Answers()
"""Before the recipe's rows are packed: the most that a step can cost."""


def answers_of(recipe: Recipe) -> Answers:
    """Return what the manifest of a recipe's rows says; the most where none are packed, or rows for another recipe.

    Weights are not read here, so that rows of another backbone under the same recipe pass for its own.
    """
    if not isinstance(recipe, AnsweredRecipe) or not (path := data_folder(recipe) / "train/manifest.json").is_file():
        return MOST
    values = read_object(path, missing="it is written beside packed rows")
    asked = made_from(recipe, None)
    if any(values["about"].get(name) != asked.get(name) for name in ("data", "responses", "answers")):
        return MOST
    positions = values["rows"] * values["row_tokens"]
    return Answers(share=values["answer_tokens"] / positions, tokens=values.get("tokens_distinct"))


def work_of(recipe: Recipe, shapes: Shapes, answers: Answers = MOST) -> Work:
    """Return what a row of a recipe takes; `answers` is what its packed rows say."""
    match recipe:
        case ViewRecipe():
            return _view(recipe, shapes, answers)
        case Eagle3Recipe():
            return _eagle3(recipe, shapes, answers)
        case DFlashRecipe():
            return _dflash(recipe, shapes, answers)
        case DraftRecipe():
            return _draft(recipe, shapes, answers)
        case BlocksRecipe():
            return _blocks(recipe, shapes)
    T = recipe.data.row_tokens
    operations = 6 * (shapes.active + shapes.head) * T + 3 * shapes.pair * T * T + 3 * shapes.state * T
    return Work(operations, T, 0)


def step_operations(recipe: Recipe, shapes: Shapes, answers: Answers = MOST) -> float:
    """Operations of one optimizer step over the whole batch: this is the floor that a step's time is held against."""
    return float(work_of(recipe, shapes, answers).operations * recipe.run.batch_rows)


def _view(recipe: ViewRecipe, shapes: Shapes, answers: Answers) -> Work:
    wanted, blocks, T = recipe.model, recipe.objective.blocks_per_row, recipe.data.row_tokens
    slots, scored = blocks * wanted.block_size, blocks * (wanted.block_size - 1)  # an anchor's slot or a last one idles
    # A block's last slot is left out where nothing sees it.
    alone = wanted.block_attention == "causal" and wanted.block_recurrence == "causal"
    M = scored if alone or wanted.anchor == "backbone" else slots
    again = 2 if wanted.gradient_checkpointing else 1
    backward = shapes.upper / shapes.layers
    # A slot reads a row and its own block: on CPUs as peers' budgets count it, on CUDA without what a mask hides, half
    # of a causal row and what follows an anchor. The row's keys are the frozen pass's and need no gradient.
    seen = T / 2 if recipe.run.device == "cuda" else T
    read = shapes.pair * M * (seen * (again + backward) + wanted.block_size * (again + 2 * backward))
    moved = shapes.trainable - 2 * wanted.markov_rank * shapes.vocabulary  # without the correction
    teacher = 2 * shapes.active * T + shapes.pair * T * seen + shapes.state * T
    student = 2 * shapes.active * M * (again + backward) + 2 * moved * M + read + shapes.state * M * (again + 2)
    # The state before each anchor, out of half a chunk on average, is found again in a layer that is computed again.
    student += blocks * CHUNK * shapes.states * shapes.recurrent * again
    logits = _logits(recipe.objective, shapes, answers, scored, rank=wanted.markov_rank, row_tokens=T)
    return Work(teacher + student + logits, slots, slots)


def _dflash(recipe: DFlashRecipe, shapes: Shapes, answers: Answers) -> Work:
    wanted, blocks, T = recipe.model, recipe.objective.blocks_per_row, recipe.data.row_tokens
    slots, scored = blocks * wanted.block_size, blocks * (wanted.block_size - (not wanted.shift))
    depth = wanted.draft_layers / shapes.layers
    fused = (3 if wanted.taps is None else len(wanted.taps)) * shapes.hidden * shapes.hidden
    moved = shapes.trainable - 2 * wanted.markov_rank * shapes.vocabulary - fused
    context = 6 * (fused + wanted.draft_layers * shapes.keys * shapes.hidden) * T
    body = 6 * moved * slots + 3 * shapes.pair * depth * slots * (T + wanted.block_size)
    logits = _logits(recipe.objective, shapes, answers, scored, rank=wanted.markov_rank, row_tokens=T)
    return Work(_frozen(shapes, T) + context + body + logits, T + slots, scored, depth)


def _eagle3(recipe: Eagle3Recipe, shapes: Shapes, answers: Answers) -> Work:
    goal, T = recipe.objective, recipe.data.row_tokens
    drafter = 6 * shapes.trainable * goal.steps * T + 3 * shapes.pair / shapes.layers * goal.steps * T * T
    # Logits are computed again in the backward pass, the backbone's at every step of the draft.
    passes = (3 + 2 * goal.needs_teacher) * goal.steps
    logits = 2 * _tokens(goal.vocabulary, shapes, answers) * shapes.hidden * passes * T * answers.share
    return Work(_frozen(shapes, T) + drafter + logits, T, T * goal.steps, goal.steps / shapes.layers)


def _draft(recipe: DraftRecipe, shapes: Shapes, answers: Answers) -> Work:
    T, depth = recipe.data.row_tokens, recipe.model.layers / shapes.layers
    scored = T * answers.share
    body = depth * (6 * shapes.active * T + 3 * shapes.pair * T * T)
    # Logits are computed again in the backward pass, and the head is trained.
    return Work(body + 8 * shapes.head * scored, T, round(scored), depth)


def _blocks(recipe: BlocksRecipe, shapes: Shapes) -> Work:
    T, times = recipe.data.row_tokens, 2 if recipe.objective.complement else 1
    kept = T if recipe.model.block_size is None else 2 * T  # masked, and clean
    body = times * (6 * shapes.active * kept + 3 * shapes.pair * kept * kept)
    masked = T * times / 2  # of the tokens
    return Work(body + 8 * shapes.head * masked, kept, T * times // 2)


def _frozen(shapes: Shapes, T: int) -> int:
    """The backbone's pass that a drafter reads."""
    return 2 * shapes.active * T + shapes.pair * T * T


def _logits(
    goal: BlockObjective, shapes: Shapes, answers: Answers, scored: int, *, rank: int, row_tokens: int
) -> float:
    """Logits of slots, with their correction, and of the backbone's rows; both again in the backward pass."""
    tokens = _tokens(goal.vocabulary, shapes, answers)
    rows = min(row_tokens * answers.share, scored) if goal.needs_teacher else 0
    return 2 * tokens * shapes.hidden * (3 * scored + 2 * rows) + 6 * rank * tokens * scored


def _tokens(vocabulary: str, shapes: Shapes, answers: Answers) -> int:
    return answers.tokens or shapes.vocabulary if vocabulary == "answers" else shapes.vocabulary
