"""How a word problem and its worked answer are put together.

An answer restates what is given, does one small calculation a line and closes with "The answer is N.".
"""

from collections.abc import Sequence
from typing import Final

from orthrus.data.synthetic.draw import Draft, Draw

_OPENERS: Final = (
    "Solve this problem.", "Here is a question about numbers.", "Please work this out.",
    "Can you help me with this?", "Read the text and answer.", "I have a maths problem.",
    "A small problem:", "Answer this question.", "Help me solve this one.", "Let us calculate something.",
    "Word problem:", "Try this one.", "Consider the following.", "Please solve the following problem.",
    "This is a puzzle with numbers.",
)  # fmt: skip
_CLOSERS: Final = (
    "Show your steps.", "Explain step by step.", "Please show the working.",
    "Work it out step by step.", "Write down every step.", "Give the steps and the answer.",
    "Think in small steps.", "Show how you get it.", "Explain your answer.", "Let me see each step.",
)  # fmt: skip


def worked(
    draw: Draw, kind: str, facts: Sequence[str], question: str, givens: str, steps: Sequence[str], result: int
) -> Draft:
    """The draft of a problem told by `facts` in their order, with its steps numbered."""
    parts = [*facts, question]
    if draw.coin():
        parts.insert(0, draw.phrase(_OPENERS))
    if draw.coin():
        parts.append(draw.phrase(_CLOSERS))
    lines = [givens, *(f"Step {number}: {step}" for number, step in enumerate(steps, 1))]
    return Draft(
        kind=f"maths.{kind}",
        prompt=" ".join(parts),
        answer="\n".join([*lines, f"The answer is {result}."]),
        check=(str(result),),
    )
