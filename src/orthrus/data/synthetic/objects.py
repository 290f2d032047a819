"""JSON objects to fill from a description.

Every value stands in the question; an answer is one fixed sentence and the JSON text.
"""

import json

from orthrus.data.synthetic.draw import Draft, Draw
from orthrus.data.synthetic.records import listed, names_of, ordered
from orthrus.data.synthetic.words import ADJECTIVES, CITIES, COLOURS, EVENTS, LANGUAGES, MONTHS, STREETS


def _json_draft(draw: Draw, value: dict[str, object]) -> Draft:
    columns = listed([f'"{key}"' for key in value])
    facts, head = draw.phrase("facts"), draw.phrase("heads", columns=columns)
    answer = f"Here is the JSON object with {columns}:\n\n```json\n{json.dumps(value, indent=2)}\n```"
    check = (json.dumps(value, sort_keys=True),)
    return Draft(prompt=ordered(draw, head, facts), answer=answer, check=check)


def contact(draw: Draw) -> Draft:
    """A person with an address."""
    name, city = draw.name(), draw.choice("city", CITIES)
    street = draw.choice("street", STREETS)
    age, house, phone = draw.number("age", 18, 90), draw.number("house", 1, 120), draw.number("phone", 10000, 99999)
    address = f"{house} {street} Street"
    return _json_draft(draw, {"name": name, "age": age, "street": address, "city": city, "phone": str(phone)})


def order(draw: Draw) -> Draft:
    """An order with two items."""
    customer, first, second = draw.name(), draw.thing("a"), draw.thing("b")
    number, n, m = draw.number("number", 100, 999), draw.number("n", 2, 60), draw.number("m", 2, 60)
    city = draw.choice("city", CITIES)
    items = [{"item": first, "quantity": n}, {"item": second, "quantity": m}]
    return _json_draft(draw, {"order": number, "customer": customer, "city": city, "items": items})


def event(draw: Draw) -> Draft:
    """An event with a date, a place and a host."""
    title = draw.choice("title", EVENTS)
    city, month, host = draw.choice("city", CITIES), draw.choice("month", MONTHS), draw.name()
    day, hour, guests = draw.number("day", 1, 28), draw.number("hour", 8, 22), draw.number("guests", 5, 300)
    draw.slots["low_title"] = title.lower()
    value = {
        "title": title,
        "city": city,
        "month": month,
        "day": day,
        "time": f"{hour}:00",
        "host": host,
        "guests": guests,
    }
    return _json_draft(draw, value)


def settings(draw: Draw) -> Draft:
    """The settings of a program."""
    theme, language = draw.choice("theme", COLOURS), draw.choice("language", LANGUAGES)
    size, volume = draw.number("size", 8, 40), draw.number("volume", 0, 100)
    sound, sync = draw.choice("sound", ("on", "off")), draw.choice("sync", ("on", "off"))
    value = {
        "theme": theme,
        "language": language,
        "font_size": size,
        "volume": volume,
        "sound": sound == "on",
        "sync": sync == "on",
    }
    return _json_draft(draw, value)


def book(draw: Draw) -> Draft:
    """A book in a library."""
    author = draw.name()
    draw.thing()
    adjective = draw.choice("adjective", ADJECTIVES)
    noun = draw.slots["thing"]
    draw.slots["title"] = title = f"The {adjective} {str(noun).title()}"
    pages, year = draw.number("pages", 60, 700), draw.number("year", 1900, 2024)
    lent = draw.choice("state", ("lent out", "on the shelf"))
    value = {"title": title, "author": author, "year": year, "pages": pages, "lent": lent == "lent out"}
    return _json_draft(draw, value)


def team(draw: Draw) -> Draft:
    """A team with a list of members."""
    members, team = names_of(draw, 3), draw.choice("colour", COLOURS)
    city, wins, losses = draw.choice("city", CITIES), draw.number("wins", 2, 40), draw.number("losses", 2, 40)
    value = {"team": team, "city": city, "members": members, "wins": wins, "losses": losses}
    return _json_draft(draw, value)
