"""What packed rows say of their answers, as far as the cost of a step depends on it."""

from dataclasses import dataclass

from orthrus.checkpoints.files import read_object
from orthrus.train.corpus import data_folder
from orthrus.train.prepare import made_from
from orthrus.train.sections import AnsweredRecipe, Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """Answers of packed rows.

    Attributes:
        share: of all positions, those that belong to answers.
        tokens: different tokens in them; None for the whole vocabulary.
    """

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
