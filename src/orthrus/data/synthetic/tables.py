"""Markdown tables to write from records told in words.

Every value stands in the question or is a sum of two that do; an answer is one fixed sentence and the table.
"""

from collections.abc import Sequence

from orthrus.data.synthetic.draw import Draft, Draw
from orthrus.data.synthetic.records import listed, names_of, ordered
from orthrus.data.synthetic.words import CITIES, COLOURS, CURRENCIES, PLURAL, SUBJECTS, THINGS, WEEKDAYS


def _facts(draw: Draw, rows: Sequence[dict[str, str | int]]) -> str:
    """All rows told with one phrasing each, as sentences or as a list."""
    sentences = [draw.phrase("facts", **row) for row in rows]
    return " ".join(sentences) if draw.coin() else "\n" + "\n".join(f"- {sentence}" for sentence in sentences) + "\n"


def _rows(draw: Draw, count: int, **columns: Sequence[str] | tuple[int, int]) -> list[dict[str, str | int]]:
    """Draws `count` records: a column is a list of words (all different) or the limits of a number."""
    drawn: dict[str, Sequence[str | int]] = {}
    for key, kind in columns.items():
        low, high = kind[0], kind[-1]
        if isinstance(low, int) and isinstance(high, int):
            drawn[key] = draw.numbers(f"{key}_", count, low, high)
        else:
            drawn[key] = draw.choices(f"{key}_", count, [word for word in kind if isinstance(word, str)])
    return [{key: values[index] for key, values in drawn.items()} for index in range(count)]


def _table_draft(draw: Draw, facts: str, rows: Sequence[Sequence[object]], *, more: str = "") -> Draft:
    """The draft of a table whose first row is the header."""
    header = [str(cell) for cell in rows[0]]
    head = draw.phrase("heads", columns=listed(header)) + more
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    rule = "|" + " --- |" * len(header)
    answer = "\n".join((f"Here is the table with {listed(header)}:", "", lines[0], rule, *lines[1:]))
    return Draft(prompt=ordered(draw, head, facts), answer=answer, check=tuple(lines))


def people(draw: Draw) -> Draft:
    """People with an age and a city."""
    names = names_of(draw, 3)
    rows = _rows(draw, 3, age=(6, 90), city=CITIES)
    facts = _facts(draw, [row | {"name": name} for row, name in zip(rows, names, strict=True)])
    body = [(name, row["age"], row["city"]) for row, name in zip(rows, names, strict=True)]
    return _table_draft(draw, facts, [("Name", "Age", "City"), *body])


def order(draw: Draw) -> Draft:
    """Things with a quantity and a price."""
    count = 3 + draw.coin()
    rows = _rows(draw, count, item=THINGS, quantity=(2, 60), price=(2, 40))
    draw.slots["money"] = draw.choice("currency", CURRENCIES)
    facts = _facts(draw, [row | {"items": PLURAL[str(row["item"])]} for row in rows])
    body = [(row["item"], row["quantity"], row["price"]) for row in rows]
    return _table_draft(draw, facts, [("Item", "Quantity", "Price"), *body])


def scores(draw: Draw) -> Draft:
    """Two scores each, and their sum."""
    names = names_of(draw, 3)
    rows = _rows(draw, 3, first=(2, 60), second=(2, 39))
    facts = _facts(draw, [row | {"name": name} for row, name in zip(rows, names, strict=True)])
    sums = [int(row["first"]) + int(row["second"]) for row in rows]
    body = [(name, row["first"], row["second"], total) for name, row, total in zip(names, rows, sums, strict=True)]
    more = draw.phrase("more")
    return _table_draft(draw, facts, [("Name", "First", "Second", "Total"), *body], more=more)


def schedule(draw: Draw) -> Draft:
    """What happens when and where."""
    rows = _rows(draw, 3, subject=SUBJECTS, day=WEEKDAYS, hour=(8, 20), room=(1, 60))
    facts = _facts(draw, rows)
    body = [(row["subject"], row["day"], f"{row['hour']}:00", row["room"]) for row in rows]
    return _table_draft(draw, facts, [("Class", "Day", "Time", "Room"), *body])


def stock(draw: Draw) -> Draft:
    """Coloured things on shelves, and their number."""
    rows = _rows(draw, 3, item=THINGS, colour=COLOURS, shelf=(1, 30), number=(2, 80))
    facts = _facts(draw, [row | {"items": PLURAL[str(row["item"])]} for row in rows])
    body = [(row["item"], row["colour"], row["shelf"], row["number"]) for row in rows]
    return _table_draft(draw, facts, [("Item", "Colour", "Shelf", "Number"), *body])
