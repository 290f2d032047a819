"""One draw of a problem: its slot values, its phrasings, and which side of the split it falls on.

A family is a table of a `.toml` file. Its table `draw` names what is drawn, in this order, each by a Python expression
over `words.toml`, the methods of `Draw` and what was drawn before. A template holds such expressions in braces.
"""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from hashlib import blake2b
from types import CodeType
from typing import Any, Final, Literal

from orthrus.data.synthetic.words import WORDS, amount, plural, singular, table_of

Split = Literal["train", "heldout", "phrasing"]
Domain = Literal["maths", "code", "table", "json"]
Family = Mapping[str, Any]

DOMAINS: Final[tuple[Domain, ...]] = ("maths", "code", "table", "json")
TABLES: Final[Mapping[Domain, dict[str, Any]]] = {domain: table_of(domain) for domain in DOMAINS}
FAMILIES: Final[Mapping[Domain, Mapping[str, Family]]] = {
    domain: {name: value for name, value in table.items() if isinstance(value, dict)}
    for domain, table in TABLES.items()
}
"""Families by domain and name; beside them a domain's table holds groups of phrasings that its families share."""

_HELD_OUT_SHARE: Final = 8  # one combination in eight
_RESERVED_PHRASING: Final = 5  # every fifth phrasing of a group
_FIELD: Final = re.compile(r"\{([^{}]+)\}")
_ARTICLE: Final = re.compile(r"\b([Aa]) \{(\w+)\}")


class Draw:
    """Slot values and phrasings for one problem of a kind ("maths.shopping"), drawn from a generator seeded by `key`.

    Everything that a prompt tells must be a slot, since the split is decided by the slots alone; `phrase` and `coin`
    choose wording and leave the split alone.

    Attributes:
        slots: what was drawn. A list has a slot for each of its values: NAME0, NAME1 and so on.
        names: what expressions and templates may name: slots, and what is drawn under `_NAME`, as NAME.
        columns: the lists among these, without underscores at their ends.
    """

    def __init__(self, kind: str, split: Split, *, key: str) -> None:
        self.kind = kind
        self._random = random.Random(key)
        self._split: Split = split
        self.slots: dict[str, Any] = {}
        self.columns: dict[str, Sequence[Any]] = {}
        self.phrasings: list[str] = []
        tools = (
            self.between, self.several, self.unseen, self.one_of, self.some_of, self.uneven, self.any_name,
            self.any_names, self.any_thing, self.coin, self.phrase, amount, plural, singular,
        )  # fmt: skip
        self.names: dict[str, Any] = {**WORDS, **{tool.__name__: tool for tool in tools}}

    def take(self, wanted: Mapping[str, str]) -> None:
        """Draw what a table names; several names before one expression are drawn one after another.

        A thing also has its plural, under its name and an s.
        """
        for names, expression in wanted.items():
            for name in names.split():
                self._keep(name, self.value(expression))
                if expression == "any_thing()":
                    self._keep(f"{name}s", plural(self.names[name]))

    def _keep(self, name: str, value: Any) -> None:
        bare = name.removeprefix("_")
        values = {bare: value}
        if isinstance(value, list):
            values = {f"{bare}{index}": one for index, one in enumerate(value)}
            self.columns[bare.removesuffix("_")] = value
        self.names |= {bare: value, **values}
        if bare == name:
            self.slots |= values

    def value(self, expression: str, **more: Any) -> Any:
        """The value of an expression, which may also name `more`."""
        return eval(_compiled(expression), self.names | more)

    def filled(self, template: str, **more: Any) -> str:
        """A template with its expressions filled in, and `an` for `a` where a vowel follows."""
        fields = self.names | more

        def field(match: re.Match[str]) -> str:
            return str(fields[match[1]] if match[1] in fields else eval(_compiled(match[1]), fields))

        return _FIELD.sub(field, with_articles(template, fields))

    def between(self, low: int, high: int) -> int:
        return low + int(self._random.random() * (high - low + 1))

    def several(self, count: int, low: int, high: int) -> list[int]:
        return self._random.sample(range(low, high + 1), count)

    def unseen(self, count: int, low: int, high: int) -> list[int]:
        """Numbers for checks that the prompt does not tell."""
        return [self._random.randint(low, high) for _ in range(count)]

    def one_of(self, options: Sequence[str]) -> str:
        return options[int(self._random.random() * len(options))]

    def some_of(self, count: int, options: Sequence[str]) -> list[str]:
        return self._random.sample(options, count)

    def uneven(self, count: int, options: Sequence[str]) -> list[str]:
        while len(set(map(len, chosen := self.some_of(count, options)))) < count:
            pass
        return chosen

    def any_name(self) -> str:
        """A person's name that no slot holds."""
        return self._new(WORDS["NAMES"], ())

    def any_names(self, count: int) -> list[str]:
        names: list[str] = []
        for _ in range(count):
            names.append(self._new(WORDS["NAMES"], names))
        return names

    def any_thing(self) -> str:
        """A thing that can be counted and that no slot holds."""
        return self._new(WORDS["THINGS"], ())

    def _new(self, words: Sequence[str], besides: Sequence[str]) -> str:
        while (word := self._random.choice(words)) in (*self.slots.values(), *besides):
            pass
        return word

    def coin(self) -> bool:
        """A fair choice between two orders or forms of the wording."""
        return self._random.random() < 0.5

    def phrase(self, group: str, **more: Any) -> str:
        """One of the phrasings for this split of a group of the family's, or of its domain's, filled in."""
        domain, _, family = self.kind.partition(".")
        shared = TABLES[domain]  # type: ignore[index]
        reserved = self._split == "phrasing"
        allowed = [
            template
            for index, template in enumerate(shared[family].get(group) or shared[group])
            if (index % _RESERVED_PHRASING == _RESERVED_PHRASING - 1) == reserved
        ]
        self.phrasings.append(self.one_of(allowed))
        return self.filled(self.phrasings[-1], **more)

    def held_out(self) -> bool:
        """Whether this combination is kept out of training.

        It is when the whole combination, or the numbers alone, or the first two words alone (a name and a thing,
        mostly) land on the held-out share of a hash. So training lacks whole number tuples and whole pairs of words.
        """
        numbers = [value for value in self.slots.values() if isinstance(value, int)]
        words = [value for value in self.slots.values() if isinstance(value, str)]
        whole = [f"{slot}={value}" for slot, value in sorted(self.slots.items())]
        return any(_reserved(self.kind, part) for part in (whole, numbers, words[:2]) if len(part) > 1)


@cache
def _compiled(expression: str) -> CodeType:
    return compile(expression.strip(), expression, "eval")


def with_articles(template: str, fields: Mapping[str, Any]) -> str:
    """The template with `an` for `a` where the field that follows begins with the sound of a vowel."""

    def article(match: re.Match[str]) -> str:
        word = str(fields[match[2]])
        vowel = word.startswith(("a", "e", "i", "o", "hour"))  # u: as in `unit`, more often than not
        return f"{match[1]}n {{{match[2]}}}" if vowel else match[0]

    return _ARTICLE.sub(article, template)


def _reserved(kind: str, values: Iterable[object]) -> bool:
    digest = blake2b(f"{kind}|{values}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _HELD_OUT_SHARE == 0
