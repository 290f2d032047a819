"""How a word problem and its worked answer are put together.

An answer restates what is given, does one small calculation a line and closes with "The answer is N.".
"""

from collections.abc import Sequence

from orthrus.data.synthetic.draw import Draft, Draw


def worked(
    draw: Draw,
    givens: str,
    steps: Sequence[str],
    result: int,
    *,
    facts: Sequence[str] = ("facts",),
    any_order: bool = False,
) -> Draft:
    """Return a problem and its answer, whose steps are numbered.

    Args:
        draw: has the slots that the phrasings name.
        givens: the first sentence of the answer.
        steps: its calculations.
        result: the number asked for.
        facts: groups of phrasings that state the problem.
        any_order: whether two facts may change places.
    """
    stated, question = [draw.phrase(group) for group in facts], draw.phrase("question")
    if any_order and not draw.coin():
        stated.reverse()
    parts = [*stated, question]
    if draw.coin():
        parts.insert(0, draw.phrase("openers"))
    if draw.coin():
        parts.append(draw.phrase("closers"))
    lines = [givens, *(f"Step {number}: {step}" for number, step in enumerate(steps, 1))]
    answer = "\n".join([*lines, f"The answer is {result}."])
    return Draft(prompt=" ".join(parts), answer=answer, check=(str(result),))
