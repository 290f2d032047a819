"""One draw of a problem: its slot values, its phrasings, and which side of the split it falls on."""

import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from importlib.resources import files
from typing import Any, Final, Literal

from orthrus.data.synthetic.words import NAMES, PLURAL, THINGS

Split = Literal["train", "heldout", "phrasing"]

_HELD_OUT_SHARE: Final = 8  # one combination in eight
_RESERVED_PHRASING: Final = 5  # every fifth phrasing of a group
_ARTICLE: Final = re.compile(r"\b([Aa]) \{(\w+)\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """What a family of problems makes of one draw."""

    prompt: str
    answer: str
    check: tuple[str, ...]


@cache
def phrasings() -> dict[str, Any]:
    """Return what `phrases.toml` holds: groups of phrasings by domain, and by family within."""
    return tomllib.loads(files("orthrus.data.synthetic").joinpath("phrases.toml").read_text(encoding="utf-8"))


class Draw:
    """Slot values and phrasings for one problem of a kind ("maths.shopping"), drawn from a generator seeded by `key`.

    Slots become the fields of the phrasings. Everything that a prompt tells must be a slot, since the split
    is decided by the slots alone; `phrase` and `coin` choose wording and leave the split alone.
    """

    def __init__(self, kind: str, split: Split, *, key: str) -> None:
        self.kind = kind
        self._random = random.Random(key)
        self._split: Split = split
        self.slots: dict[str, str | int] = {}
        self.wording: dict[str, str] = {}
        self.phrasings: list[str] = []

    def number(self, slot: str, low: int, high: int) -> int:
        """A whole number in `low..high`, both included."""
        value = low + int(self._random.random() * (high - low + 1))
        self.slots[slot] = value
        return value

    def numbers(self, slot: str, count: int, low: int, high: int) -> list[int]:
        """`count` different numbers in `low..high`, one slot each."""
        values = self._random.sample(range(low, high + 1), count)
        self.slots.update({f"{slot}{index}": value for index, value in enumerate(values)})
        return values

    def choice(self, slot: str, options: Sequence[str]) -> str:
        """One of the options."""
        value = options[int(self._random.random() * len(options))]
        self.slots[slot] = value
        return value

    def choices(self, slot: str, count: int, options: Sequence[str]) -> list[str]:
        """`count` different options, one slot each."""
        values = self._random.sample(options, count)
        self.slots.update({f"{slot}{index}": value for index, value in enumerate(values)})
        return values

    def name(self, slot: str = "name") -> str:
        """A person's name that no other slot holds."""
        taken = self.slots.values()
        while (value := self._random.choice(NAMES)) in taken:
            pass
        self.slots[slot] = value
        return value

    def thing(self, slot: str = "thing") -> str:
        """A thing that can be counted; fills `slot` and its plural `slot + "s"`, and returns the plural."""
        taken = self.slots.values()
        while (value := self._random.choice(THINGS)) in taken:
            pass
        self.slots[slot] = value
        self.slots[slot + "s"] = PLURAL[value]
        return PLURAL[value]

    def unseen(self, count: int, low: int, high: int) -> list[int]:
        """Numbers for checks that the prompt does not tell, so no slots."""
        return [self._random.randint(low, high) for _ in range(count)]

    def coin(self) -> bool:
        """A fair choice between two orders or forms of the wording."""
        return self._random.random() < 0.5

    def phrase(self, group: str, **more: str | int) -> str:
        """One of a group's phrasings that belong to this split, with the slots (and `more`) filled in.

        The group is the family's own, or one that all families of its domain share.
        """
        domain, _, family = self.kind.partition(".")
        shared = phrasings()[domain]
        reserved = self._split == "phrasing"
        allowed = [
            template
            for index, template in enumerate(shared[family].get(group) or shared[group])
            if (index % _RESERVED_PHRASING == _RESERVED_PHRASING - 1) == reserved
        ]
        template = allowed[int(self._random.random() * len(allowed))]
        self.phrasings.append(template)
        fields = self.slots | self.wording | more
        return with_articles(template, fields).format_map(fields)

    def held_out(self) -> bool:
        """Whether this combination is kept out of training.

        It is when the whole combination, or the numbers alone, or the first two words alone (a name and a
        thing, mostly) land on the held-out share of a hash. So training lacks whole number tuples and whole
        pairs of words, whatever stands around them.
        """
        numbers = [value for value in self.slots.values() if isinstance(value, int)]
        words = [value for value in self.slots.values() if isinstance(value, str)]
        whole = [f"{slot}={value}" for slot, value in sorted(self.slots.items())]
        return any(_reserved(self.kind, part) for part in (whole, numbers, words[:2]) if len(part) > 1)


def with_articles(template: str, fields: Mapping[str, str | int]) -> str:
    """The template with `an` for `a` where the field that follows begins with the sound of a vowel."""

    def article(match: re.Match[str]) -> str:
        word = str(fields[match[2]])
        vowel = word.startswith(("a", "e", "i", "o", "hour"))  # u: as in `unit`, more often than not
        return f"{match[1]}n {{{match[2]}}}" if vowel else match[0]

    return _ARTICLE.sub(article, template)


def _reserved(kind: str, values: Sequence[object]) -> bool:
    digest = blake2b(f"{kind}|{values}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _HELD_OUT_SHARE == 0
