"""How a request for a Python function and its answer are put together, and what such requests draw.

An answer has one sentence, the function with a docstring, and one example.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Final

from orthrus.data.synthetic.draw import Draft, Draw

_COMPARE: Final[dict[str, tuple[Callable[[int, int], bool], str]]] = {
    ">": (operator.gt, "greater than"),
    "<": (operator.lt, "less than"),
    ">=": (operator.ge, "at least"),
    "<=": (operator.le, "at most"),
}
"""What a sign means and its fixed words, which are also the name of its group of phrasings."""


def function(
    draw: Draw,
    task: str,
    *,
    doc: str,
    body: Sequence[str],
    examples: Sequence[tuple[Sequence[object], object]],
    working: str = "",
) -> Draft:
    """The draft of a request for the function that `named` drew.

    The first example is told in the prompt, with `working` in the answer; the others only check.
    """
    name, params = draw.slots["f"], draw.slots["params"]
    given = ", ".join(map(_literal, examples[0][0]))
    draw.slots["given"] = given
    prompt = [draw.phrase("heads", call=f"{name}({params})", task=task), draw.phrase("tries")]
    lines = [f"def {name}({params}):", f'    """{doc}"""', *(f"    {line}" for line in body)]
    answer = (
        f"Here is the function `{name}`:\n\n```python\n" + "\n".join(lines) + "\n```\n\n"
        f"For {given} {working}it returns {_literal(examples[0][1])}."
    )
    checks = tuple(f"assert {name}({', '.join(map(_literal, args))}) == {_literal(value)}" for args, value in examples)
    return Draft(prompt=" ".join(prompt), answer=answer, check=checks)


def _literal(value: object) -> str:
    """The value as Python source, with double quotes around text."""
    return repr(value).replace("'", '"')


def named(draw: Draw, verbs: Sequence[str], nouns: Sequence[str], *more: str) -> str:
    """Draws the function's name and its parameters; returns the first parameter."""
    verb, noun = draw.choice("verb", verbs), draw.choice("noun", nouns)
    draw.slots["f"] = f"{verb}_{noun}"
    draw.slots["params"] = ", ".join((noun, *more))
    return noun


def compared(draw: Draw) -> tuple[str, int, Callable[[int, int], bool], str]:
    """Draws a comparison: its sign, its limit, its meaning, its fixed words.

    The words for this prompt go to the field `test` of the phrasings.
    """
    sign, limit = draw.choice("sign", tuple(_COMPARE)), draw.number("k", 2, 60)
    meaning, words = _COMPARE[sign]
    draw.wording["test"] = f"{draw.phrase(words)} {limit}"
    return sign, limit, meaning, f"{words} {limit}"


def number_lists(draw: Draw, around: int) -> list[list[int]]:
    """A list that the prompt tells and two that only check, the last of them around the limit."""
    shown = draw.numbers("v", 3, max(1, around - 20), around + 20)
    return [shown, draw.unseen(6, 1, 60), [around, around + 1, around - 1]]


def collecting(result: str, start: str, each: str, test: str, then: str) -> list[str]:
    """The lines of a function that begins with some result and does something about each item that passes a test."""
    return [f"{result} = {start}", f"for {each}:", f"    if {test}:", f"        {then}", f"return {result}"]


def added(values: Sequence[int]) -> str:
    """The working of a sum, for the sentence about the example."""
    return f"it adds {' + '.join(map(str, values)) or 'nothing'}, so "
