"""What tables and JSON have in common: records told in words, before or after the request."""

from collections.abc import Sequence

from orthrus.data.synthetic.draw import Draw


def listed(words: Sequence[str]) -> str:
    """The words as in `a, b and c`."""
    return ", ".join(words[:-1]) + " and " + words[-1]


def ordered(draw: Draw, head: str, facts: str) -> str:
    """The request before or after the facts."""
    first, second = (head, facts) if draw.coin() else (facts, head)
    return f"{first} {second}".replace("\n ", "\n").replace(" \n", "\n").strip()


def names_of(draw: Draw, count: int) -> list[str]:
    """That many different names, in the slots `name0`, `name1` and so on."""
    return [draw.name(f"name{index}") for index in range(count)]
