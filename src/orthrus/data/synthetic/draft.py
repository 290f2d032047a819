"""From a draw of a family to a question, its answer in a fixed form, and what checks an answer: a function a domain."""

import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count as count_from
from typing import Any, Final

from orthrus.data.synthetic.draw import FAMILIES, Domain, Draw, Family, Split

_HOLDS: Final = {">": operator.gt, "<": operator.lt, ">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """What a family of problems makes of one draw."""

    prompt: str
    answer: str
    check: tuple[str, ...]


def drawn(domain: Domain, index: int, split: Split, seed: int) -> tuple[Draw, Draft]:
    """The first draw of a problem's family that belongs to the split, and what comes of it."""
    families = list(FAMILIES[domain].items())
    name, family = families[index % len(families)]
    for attempt in count_from():
        draw = Draw(f"{domain}.{name}", split, key=f"{seed}/{domain}/{split}/{index}/{attempt}")
        draw.names["holds"] = lambda value, sign, limit: bool(_HOLDS[sign](value, limit))
        draw.names["added"] = lambda values: " + ".join(map(str, values)) or "nothing"
        draw.take(family["draw"])
        draft = _DRAFTS[domain](draw, family)
        if draw.held_out() == (split != "train"):
            return draw, draft
    raise AssertionError("unreachable: the count never ends")


def _maths(draw: Draw, family: Family) -> Draft:
    """A word problem; its answer states what is given and numbers the steps.

    A family's `tells` are the groups of phrasings that state it. Where givens and steps depend on a slot, it is `by`.
    """
    tells = [draw.phrase(group) for group in family.get("tells", ["facts"])]
    parts = [*tells, draw.phrase("question")]
    if family.get("any_order") and not draw.coin():
        parts[:2] = reversed(parts[:2])
    if draw.coin():
        parts.insert(0, draw.phrase("openers"))
    if draw.coin():
        parts.append(draw.phrase("closers"))
    givens, steps = (
        value[draw.slots[family["by"]]] if isinstance(value, dict) else value
        for value in (family["givens"], family["steps"])
    )
    lines = [givens, *(f"Step {number}: {step}" for number, step in enumerate(steps, 1)), "The answer is {answer}."]
    answer = draw.filled("\n".join(lines))
    return Draft(prompt=" ".join(parts), answer=answer, check=(str(draw.names["answer"]),))


def _code(draw: Draw, family: Family) -> Draft:
    """A Python function: one sentence, the function with a docstring, and one example.

    A family's `calls` are lists of arguments: the first is told in the prompt, the others only check. What a call gives
    is the family's `result` of `args`, the first of which is `it`; it does not come from running the answer.
    """
    calls: list[list[Any]] = draw.value(family["calls"])
    results = [draw.value(family["result"], args=args, it=args[0]) for args in calls]
    name = draw.filled(family.get("f", "{verb}_{noun}"))
    params = draw.filled(family.get("params", "{noun}"))
    given = ", ".join(map(_literal, calls[0]))
    draw.slots |= {"f": name, "params": params, "given": given}
    prompt = [draw.phrase("heads", call=f"{name}({params})"), draw.phrase("tries", given=given)]
    body = draw.filled(family["body"]).strip("\n").splitlines()
    lines = [f"def {name}({params}):", f'    """{draw.filled(family["doc"])}"""', *(f"    {line}" for line in body)]
    working = draw.filled(family.get("working", ""), it=calls[0][0])
    answer = (
        f"Here is the function `{name}`:\n\n```python\n" + "\n".join(lines) + "\n```\n\n"
        f"For {given} {working}it returns {_literal(results[0])}."
    )
    checks = (
        f"assert {name}({', '.join(map(_literal, args))}) == {_literal(result)}"
        for args, result in zip(calls, results, strict=True)
    )
    return Draft(prompt=" ".join(prompt), answer=answer, check=tuple(checks))


def _table(draw: Draw, family: Family) -> Draft:
    """A Markdown table of records told in words, a phrasing each, as sentences or as a list."""
    names = list(draw.columns)
    rows = [dict(zip(names, values, strict=True)) for values in zip(*draw.columns.values(), strict=True)]
    sentences = [draw.phrase("facts", **row) for row in rows]
    facts = " ".join(sentences) if draw.coin() else "\n" + "\n".join(f"- {one}" for one in sentences) + "\n"
    more = draw.phrase("more") if "more" in family else ""
    columns = family["columns"]
    cells = [list(columns), *([draw.filled(cell, **row) for cell in columns.values()] for row in rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    header = _listed(list(columns))
    rule = "|" + " --- |" * len(columns)
    answer = "\n".join((f"Here is the table with {header}:", "", lines[0], rule, *lines[1:]))
    head = draw.phrase("heads", columns=header) + more
    return Draft(prompt=_ordered(draw, head, facts), answer=answer, check=tuple(lines))


def _json(draw: Draw, family: Family) -> Draft:
    """A JSON object filled from a description; an answer is one fixed sentence and the JSON text."""
    value = {key: draw.value(expression) for key, expression in family["value"].items()}
    columns = _listed([f'"{key}"' for key in value])
    facts, head = draw.phrase("facts"), draw.phrase("heads", columns=columns)
    answer = f"Here is the JSON object with {columns}:\n\n```json\n{json.dumps(value, indent=2)}\n```"
    return Draft(prompt=_ordered(draw, head, facts), answer=answer, check=(json.dumps(value, sort_keys=True),))


_DRAFTS: Final[Mapping[Domain, Callable[[Draw, Family], Draft]]] = {
    "maths": _maths, "code": _code, "table": _table, "json": _json,
}  # fmt: skip


def _literal(value: object) -> str:
    """The value as Python source, with double quotes around text."""
    return repr(value).replace("'", '"')


def _listed(words: Sequence[str]) -> str:
    """The words as in `a, b and c`."""
    return ", ".join(words[:-1]) + " and " + words[-1]


def _ordered(draw: Draw, head: str, facts: str) -> str:
    first, second = (head, facts) if draw.coin() else (facts, head)
    return f"{first} {second}".replace("\n ", "\n").replace(" \n", "\n").strip()
