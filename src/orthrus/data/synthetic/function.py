"""How a request for a Python function and its answer are put together, and what such requests draw.

An answer has one sentence, the function with a docstring, and one example.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Final

from orthrus.data.synthetic.draw import Draft, Draw

_HEADS: Final = (
    "Write a Python function `{call}` that {task}.", "Please write a function `{call}` in Python that {task}.",
    "I need a Python function `{call}`. It {task}.", "Define `{call}` in Python, a function that {task}.",
    "Code a function `{call}` that {task}.", "Create a Python function called `{call}` that {task}.",
    "Give me a function `{call}` which {task}.", "Can you write `{call}`? The function {task}.",
    "Implement `{call}`, which {task}.", "In Python, how would `{call}` look if it {task}?",
    "Show me a short Python function `{call}` that {task}.", "Help me with a function `{call}` that {task}.",
    "Write the function `{call}`. It {task}.", "My program needs `{call}`: a function that {task}.",
    "Make `{call}` a Python function that {task}.", "Write some Python: `{call}` {task}.",
)  # fmt: skip
_TRIES: Final = (
    "What does it give for {given}?", "Try it on {given}.", "Show the result for {given}.",
    "Use {given} as an example.", "Add what comes out for {given}.", "Give an example with {given}.",
    "Also say what {given} gives.", "Then apply it to {given}.", "Example input: {given}.", "Test it with {given}.",
)  # fmt: skip
NOUNS: Final = (
    "ages", "amounts", "balances", "costs", "counts", "days", "distances", "fees", "goals", "grades", "heights",
    "hours", "items", "lengths", "levels", "limits", "marks", "minutes", "numbers", "orders", "points", "prices",
    "ranks", "rates", "readings", "results", "sales", "scores", "sizes", "speeds", "steps", "sums", "times",
    "values", "votes", "weights", "widths", "years",
)  # fmt: skip
WORD_LISTS: Final = (
    "cities",
    "colours",
    "entries",
    "labels",
    "lines",
    "names",
    "tags",
    "titles",
    "tokens",
    "words",
)
WORDS: Final = (
    "apple", "pear", "plum", "fig", "kiwi", "lemon", "mango", "grape", "peach", "melon", "oak", "elm", "birch",
    "cedar", "maple", "river", "lake", "hill", "sand", "stone", "cloud", "rain", "snow", "wind", "storm", "cat",
    "dog", "horse", "sheep", "goat", "tiger", "eagle", "robin", "owl", "red", "blue", "green", "amber", "ivory",
)  # fmt: skip
_COMPARE: Final[dict[str, tuple[Callable[[int, int], bool], str, tuple[str, ...]]]] = {
    ">": (
        operator.gt,
        "greater than",
        ("greater than", "more than", "above", "over", "higher than", "larger than"),
    ),
    "<": (operator.lt, "less than", ("less than", "below", "under", "smaller than", "beneath", "lower than")),
    ">=": (
        operator.ge,
        "at least",
        ("at least", "no less than", "greater than or equal to", ">=", "not under"),
    ),
    "<=": (operator.le, "at most", ("at most", "no more than", "less than or equal to", "<=", "not over")),
}


def function(
    draw: Draw,
    kind: str,
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
    prompt = [draw.phrase(_HEADS, call=f"{name}({params})", task=task), draw.phrase(_TRIES)]
    lines = [f"def {name}({params}):", f'    """{doc}"""', *(f"    {line}" for line in body)]
    answer = (
        f"Here is the function `{name}`:\n\n```python\n" + "\n".join(lines) + "\n```\n\n"
        f"For {given} {working}it returns {_literal(examples[0][1])}."
    )
    checks = tuple(f"assert {name}({', '.join(map(_literal, args))}) == {_literal(value)}" for args, value in examples)
    return Draft(kind=f"code.{kind}", prompt=" ".join(prompt), answer=answer, check=checks)


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
    meaning, words, phrasings = _COMPARE[sign]
    draw.wording["test"] = f"{draw.phrase(phrasings)} {limit}"
    return sign, limit, meaning, f"{words} {limit}"


def number_lists(draw: Draw, around: int) -> list[list[int]]:
    """A list that the prompt tells and two that only check, the last of them around the limit."""
    shown = draw.numbers("v", 3, max(1, around - 20), around + 20)
    return [shown, draw.unseen(6, 1, 60), [around, around + 1, around - 1]]


def added(values: Sequence[int]) -> str:
    """The working of a sum, for the sentence about the example."""
    return f"it adds {' + '.join(map(str, values)) or 'nothing'}, so "
