"""Markdown tables to write from records told in words.

Every value stands in the question or is a sum of two that do; an answer is one fixed sentence and the table.
"""

# ruff: noqa: E501 - a phrasing stays on one line, so that it can be read and counted

from collections.abc import Callable, Sequence
from typing import Final

from orthrus.data.synthetic.draw import Draft, Draw
from orthrus.data.synthetic.records import listed, ordered, people
from orthrus.data.synthetic.words import CITIES, COLOURS, CURRENCIES, PLURAL, THINGS, WEEKDAYS

_TABLE_HEADS: Final = (
    "Make a Markdown table with the columns {columns}.", "Write a table with the columns {columns}.",
    "Put this into a Markdown table. The columns are {columns}.", "I need a table in Markdown with {columns} as columns.",
    "Arrange the following in a table whose columns are {columns}.", "Turn this into a Markdown table ({columns}).",
    "Please make a table from this. Columns: {columns}.", "Show this as a Markdown table with columns {columns}.",
    "Create a Markdown table. Use the columns {columns}.", "Set up a table, columns {columns}, for these facts.",
)  # fmt: skip


def _facts(draw: Draw, templates: Sequence[str], rows: Sequence[dict[str, str | int]]) -> str:
    """All rows told with one phrasing each, as sentences or as a list."""
    sentences = [draw.phrase(templates, **row) for row in rows]
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


def _table_draft(draw: Draw, kind: str, facts: str, rows: Sequence[Sequence[object]], *, more: str = "") -> Draft:
    """The draft of a table whose first row is the header."""
    header = [str(cell) for cell in rows[0]]
    head = draw.phrase(_TABLE_HEADS, columns=listed(header)) + more
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    rule = "|" + " --- |" * len(header)
    answer = "\n".join((f"Here is the table with {listed(header)}:", "", lines[0], rule, *lines[1:]))
    return Draft(kind=f"table.{kind}", prompt=ordered(draw, head, facts), answer=answer, check=tuple(lines))


def people_table(draw: Draw) -> Draft:
    """People with an age and a city."""
    names = people(draw, 3)
    rows = _rows(draw, 3, age=(6, 90), city=CITIES)
    facts = _facts(draw, (
        "{name} is {age} years old and lives in {city}.", "{name}, {age}, is from {city}.", "In {city} lives {name}, who is {age}.",
        "{name} lives in {city} and is {age}.", "At the age of {age}, {name} has a home in {city}.", "{name} is {age} and comes from {city}.",
    ), [row | {"name": name} for row, name in zip(rows, names, strict=True)])  # fmt: skip
    body = [(name, row["age"], row["city"]) for row, name in zip(rows, names, strict=True)]
    return _table_draft(draw, "people", facts, [("Name", "Age", "City"), *body])


def order_table(draw: Draw) -> Draft:
    """Things with a quantity and a price."""
    count = 3 + draw.coin()
    rows = _rows(draw, count, item=THINGS, quantity=(2, 60), price=(2, 40))
    draw.slots["money"] = draw.choice("currency", CURRENCIES)
    facts = _facts(draw, (
        "There are {quantity} {items} at {price} {money} each.", "{quantity} {items} cost {price} {money} each.",
        "We order {quantity} {items}, {price} {money} each.", "A {item} costs {price} {money} and we take {quantity}.",
        "The list has {quantity} {items} with a price of {price} {money}.", "We need {quantity} {items} at {price} {money} each.",
    ), [row | {"items": PLURAL[str(row["item"])]} for row in rows])  # fmt: skip
    body = [(row["item"], row["quantity"], row["price"]) for row in rows]
    return _table_draft(draw, "order", facts, [("Item", "Quantity", "Price"), *body])


def score_table(draw: Draw) -> Draft:
    """Two scores each, and their sum."""
    names = people(draw, 3)
    rows = _rows(draw, 3, first=(2, 60), second=(2, 39))
    facts = _facts(draw, (
        "{name} has {first} points in round one and {second} in round two.", "{name}: {first} points first, then {second}.",
        "In the first round {name} gets {first} points, in the second {second}.", "{name} scores {first} and then {second}.",
        "First {first} and later {second} points go to {name}.", "{name} wins {first} points in the first round and {second} in the second.",
    ), [row | {"name": name} for row, name in zip(rows, names, strict=True)])  # fmt: skip
    sums = [int(row["first"]) + int(row["second"]) for row in rows]
    body = [(name, row["first"], row["second"], total) for name, row, total in zip(names, rows, sums, strict=True)]
    more = draw.phrase((
        " Total is the sum of both.", " The total adds the two rounds.", " Add both scores for the total.",
        " For Total, add First and Second.", " Sum up the two for the last column.",
    ))  # fmt: skip
    return _table_draft(draw, "scores", facts, [("Name", "First", "Second", "Total"), *body], more=more)


def schedule_table(draw: Draw) -> Draft:
    """What happens when and where."""
    subjects = (
        "Art", "Biology", "Chess", "Choir", "Dance", "Drama", "English", "French", "German", "Guitar", "History",
        "Judo", "Maths", "Music", "Physics", "Piano", "Rowing", "Spanish", "Swimming", "Tennis", "Yoga",
    )  # fmt: skip
    rows = _rows(draw, 3, subject=subjects, day=WEEKDAYS, hour=(8, 20), room=(1, 60))
    facts = _facts(draw, (
        "{subject} is on {day} at {hour}:00 in room {room}.", "On {day} at {hour}:00 there is {subject} in room {room}.",
        "{subject} takes place in room {room} on {day} at {hour}:00.", "Room {room} has {subject} on {day} at {hour}:00.",
        "At {hour}:00 on {day}, come to room {room} for {subject}.", "{subject}: {day}, {hour}:00, room {room}.",
    ), rows)  # fmt: skip
    body = [(row["subject"], row["day"], f"{row['hour']}:00", row["room"]) for row in rows]
    return _table_draft(draw, "schedule", facts, [("Class", "Day", "Time", "Room"), *body])


def stock_table(draw: Draw) -> Draft:
    """Coloured things on shelves, and their number."""
    rows = _rows(draw, 3, item=THINGS, colour=COLOURS, shelf=(1, 30), number=(2, 80))
    facts = _facts(draw, (
        "Shelf {shelf} has {number} {colour} {items}.", "There are {number} {colour} {items} on shelf {shelf}.",
        "On shelf {shelf} lie {number} {items} in {colour}.", "We keep {number} {colour} {items} on shelf {shelf}.",
        "The {number} {colour} {items} belong on shelf {shelf}.", "{number} {items}, all {colour}, stand on shelf {shelf}.",
    ), [row | {"items": PLURAL[str(row["item"])]} for row in rows])  # fmt: skip
    body = [(row["item"], row["colour"], row["shelf"], row["number"]) for row in rows]
    return _table_draft(draw, "stock", facts, [("Item", "Colour", "Shelf", "Number"), *body])


FAMILIES: Final[tuple[Callable[[Draw], Draft], ...]] = (
    people_table, order_table, score_table, schedule_table, stock_table,
)  # fmt: skip
