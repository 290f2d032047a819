"""The vocabulary of the generated problems, from `words.toml`, and nouns in the right number."""

import tomllib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Final


def table_of(name: str) -> dict[str, Any]:
    """Return a table of this package's data, in its order."""
    return tomllib.loads(files("orthrus.data.synthetic").joinpath(f"{name}.toml").read_text(encoding="utf-8"))


def plural(word: str) -> str:
    """A regular noun in the plural."""
    if word.endswith(("s", "x", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


WORDS: Final[Mapping[str, Any]] = {
    name: value.split() if isinstance(value, str) else value for name, value in table_of("words").items()
}
_SINGULAR: Final[dict[str, str]] = {plural(word): word for word in WORDS["THINGS"]} | WORDS["SINGULAR"]


def singular(noun: str) -> str:
    """A noun of the vocabulary in the singular."""
    return _SINGULAR.get(noun, noun.removesuffix("s"))


def amount(count: int, noun: str) -> str:
    """A count with its noun, given in the plural, in the right number: `1 box` or `3 boxes`."""
    return f"{count} {singular(noun) if count == 1 else noun}"
