"""Prompts of a suite (a file, a Hugging Face dataset, generated problems), and how an answer to one is judged."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, get_args

from orthrus.data.prompts import Message, PromptRecord, read_prompts
from orthrus.data.synthetic import DOMAINS, Domain, Problem, Split, is_right, problem
from orthrus.errors import ConfigError, DataError

SYNTHETIC: Final = "synthetic"
SYNTHETIC_PROMPTS: Final = 100  # of the generator's endless supply, unless a limit says otherwise
_BEHIND = re.compile(r"(.+)\+(\d+)")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One prompt of a suite.

    Attributes:
        domain: the kind of prompt within the suite, as its records say (their category), else the set's name.
        messages: the chat to answer; of a prompt with several turns, the first.
        number: the number an answer must end with, for maths sets that give one.
    """

    suite: str
    id: str
    domain: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    problem: Problem | None = None
    number: str | None = None

    @property
    def judged(self) -> bool:
        """Whether anything can tell right answers from wrong ones."""
        return self.problem is not None or self.number is not None


def read_suite(name: str, *, folder: Path | None = None, limit: int | None = None) -> list[Item]:
    """Read a suite's prompts.

    `name` is `synthetic:DOMAIN[@SPLIT]`, a prompt-set file, the name of one in `folder`, or a Hugging Face dataset as
    `name[:config][@split]`; with `+N` each question stands behind N characters of others.

    Raises:
        ConfigError: an unknown domain or split, or a limit below 1.
        DataError: a file or dataset that cannot be read.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, found {limit}")
    path = _in_folder(name, folder)
    if path is None and (behind := _BEHIND.fullmatch(name)):
        made = behind[1].partition(":")[0] == SYNTHETIC
        items = read_suite(behind[1], folder=folder, limit=max(limit or 0, SYNTHETIC_PROMPTS) if made else None)
        return [_behind(items, index, int(behind[2])) for index in range(len(items))][:limit]
    if name.partition(":")[0] == SYNTHETIC:
        return _synthetic(name, SYNTHETIC_PROMPTS if limit is None else limit)
    suite = name if path is None else path.name.removesuffix(".gz").removesuffix(".jsonl")
    return _distinct([_item(suite, record) for record in read_prompts(path or name, limit)])


def read_suites(names: Sequence[str], *, folder: Path | None = None, limit: int | None = None) -> list[Item]:
    """Read the prompts of several suites, one after another; raises as `read_suite` does.

    Raises ConfigError for names of one suite that both have a prompt of the same id.
    """
    owners: dict[tuple[str, str], str] = {}
    out = []
    for name in names:
        for item in read_suite(name, folder=folder, limit=limit):
            if (other := owners.get((item.suite, item.id))) is not None:
                raise ConfigError(
                    f"suites must differ in their names or in the ids of their prompts, but {other!r} and {name!r} "
                    f"both have {item.id!r} of suite {item.suite!r}: leave one out, or give its file another name"
                )
            owners[item.suite, item.id] = name
            out.append(item)
    return out


def judge(item: Item, text: str) -> bool | None:
    """Say whether a text answers an item rightly; None where nothing can tell.

    Problems of the domain code EXECUTE what the text holds (see `orthrus.data.synthetic.is_right`).
    """
    if item.problem is not None:
        return is_right(item.problem, text)
    if item.number is None:
        return None
    numbers = _NUMBER.findall(text)
    return bool(numbers) and _value(numbers[-1]) == _value(item.number)


def _synthetic(name: str, limit: int) -> list[Item]:
    asked, _, split = name.partition(":")[2].partition("@")
    domains: dict[str, Domain] = {option: option for option in DOMAINS}
    splits: dict[str, Split] = {option: option for option in get_args(Split)}
    split = split or "heldout"
    if asked not in domains or split not in splits:
        raise ConfigError(
            f"a synthetic suite is {SYNTHETIC}:DOMAIN[@SPLIT] with a domain of {', '.join(domains)} and "
            f"a split of {', '.join(splits)}; found {name!r}"
        )
    made = [problem(domains[asked], index, split=splits[split]) for index in range(limit)]
    return [
        Item(
            suite=f"{SYNTHETIC}:{asked}@{split}",
            id=one.id,
            domain=one.domain,
            messages=({"role": "user", "content": one.prompt},),
            problem=one,
        )
        for one in made
    ]


def _behind(items: Sequence[Item], index: int, characters: int) -> Item:
    """Put the suite's other questions before one, so many characters of them."""
    item, text = items[index], ""
    others = itertools.cycle(_question(other)[1] for other in (*items[index + 1 :], *items[:index]))
    while len(text) < characters:
        if not (question := next(others, "")):
            raise DataError(f"suite {item.suite!r} must have other questions to put before {item.id!r}, found none")
        text += f"{question}\n\n"
    at, question = _question(item)
    messages = list(item.messages)
    longer: Message = {**messages[at], "content": f"{text[:characters]}\n\nAnswer this only:\n\n{question}"}
    messages[at] = longer
    return replace(item, suite=f"{item.suite}+{characters}", messages=tuple(messages))


def _question(item: Item) -> tuple[int, str]:
    """Return the place of an item's first question among its messages, and its text."""
    at = next((at for at, message in enumerate(item.messages) if message["role"] == "user"), 0)
    return at, str(item.messages[at]["content"])


def _in_folder(name: str, folder: Path | None) -> Path | None:
    """Return the file that a name stands for: itself, or one in the folder, its ending left out or not."""
    candidates = [Path(name)]
    if folder is not None:
        candidates = [folder / name, folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz", *candidates]
    return next((path for path in candidates if path.is_file()), None)


def _item(suite: str, record: PromptRecord) -> Item:
    category = record.meta.get("category")
    answer = record.reference.get("answer") if isinstance(record.reference, dict) else None
    is_number = isinstance(answer, str) and _NUMBER.fullmatch(answer) is not None
    return Item(
        suite=suite,
        id=record.id,
        domain=category if isinstance(category, str) else record.task,
        messages=record.turns[0],
        tools=record.tools,
        number=answer if is_number else None,
    )


def _distinct(items: list[Item]) -> list[Item]:
    counts: dict[str, int] = {}
    out: dict[str, Item] = {}
    for item in items:
        id = item.id
        while id in out:
            counts[item.id] = counts.get(item.id, 1) + 1
            id = f"{item.id}#{counts[item.id]}"
        out[id] = replace(item, id=id)
    return list(out.values())


def _value(number: str) -> float:
    return float(number.replace(",", ""))
