"""JSON objects to fill from a description.

Every value stands in the question; an answer is one fixed sentence and the JSON text.
"""

# ruff: noqa: E501 - a phrasing stays on one line, so that it can be read and counted

import json
from collections.abc import Callable
from typing import Final

from orthrus.data.synthetic.draw import Draft, Draw
from orthrus.data.synthetic.records import listed, ordered, people
from orthrus.data.synthetic.words import CITIES, COLOURS, MONTHS

_JSON_HEADS: Final = (
    "Write this as JSON with the keys {columns}.", "Turn this into a JSON object. The keys are {columns}.",
    "Make a JSON object with the keys {columns}.", "Give me this in JSON. Use the keys {columns}.",
    "Fill a JSON object whose keys are {columns}.", "Convert this to JSON with the fields {columns}.",
    "I need this as a JSON object with {columns}.", "Please write JSON with {columns} as keys.",
    "Create JSON from this text. Keys: {columns}.", "Put these facts into JSON under the keys {columns}.",
)  # fmt: skip


def _json_draft(draw: Draw, kind: str, facts: str, value: dict[str, object]) -> Draft:
    columns = listed([f'"{key}"' for key in value])
    head = draw.phrase(_JSON_HEADS, columns=columns)
    answer = f"Here is the JSON object with {columns}:\n\n```json\n{json.dumps(value, indent=2)}\n```"
    check = (json.dumps(value, sort_keys=True),)
    return Draft(kind=f"json.{kind}", prompt=ordered(draw, head, facts), answer=answer, check=check)


def contact_json(draw: Draw) -> Draft:
    """A person with an address."""
    name, city = draw.name(), draw.choice("city", CITIES)
    street = draw.choice(
        "street", ("Hill", "Lake", "Mill", "Oak", "Park", "Rose", "Station", "Church", "Bridge", "Garden")
    )
    age, house, phone = (
        draw.number("age", 18, 90),
        draw.number("house", 1, 120),
        draw.number("phone", 10000, 99999),
    )
    facts = draw.phrase((
        "{name} is {age} years old and lives at {house} {street} Street in {city}. The phone number is {phone}.",
        "{name} from {city} is {age}. The address is {house} {street} Street and the phone number {phone}.",
        "The contact is {name}, aged {age}, phone {phone}, at {house} {street} Street in {city}.",
        "You can reach {name} at {phone}. {name} is {age} and lives in {city}, {house} {street} Street.",
        "At {house} {street} Street, {city}, lives {name}. Age: {age}. Phone: {phone}.",
        "Call {name} on {phone}. The home of {name}, who is {age}, is {house} {street} Street in {city}.",
    ))  # fmt: skip
    value = {
        "name": name,
        "age": age,
        "street": f"{house} {street} Street",
        "city": city,
        "phone": str(phone),
    }
    return _json_draft(draw, "contact", facts, value)


def order_json(draw: Draw) -> Draft:
    """An order with two items."""
    customer, first, second = draw.name(), draw.thing("a"), draw.thing("b")
    number, n, m, city = (
        draw.number("number", 100, 999),
        draw.number("n", 2, 60),
        draw.number("m", 2, 60),
        draw.choice("city", CITIES),
    )
    facts = draw.phrase((
        "{name} orders {n} {as} and {m} {bs} for delivery to {city}. The order number is {number}.",
        "Order {number} from {name} has {n} {as} and {m} {bs}. It goes to {city}.",
        "{name} in {city} wants {n} {as} and {m} {bs}, with the order number {number}.",
        "Please send {n} {as} and {m} {bs} to {name} in {city}. This is order {number}.",
        "Under number {number} we ship {n} {as} together with {m} {bs} to {city}, where {name} waits.",
        "The customer {name} from {city} bought {n} {as} and {m} {bs} with order number {number}.",
    ))  # fmt: skip
    items = [{"item": first, "quantity": n}, {"item": second, "quantity": m}]
    return _json_draft(draw, "order", facts, {"order": number, "customer": customer, "city": city, "items": items})


def event_json(draw: Draw) -> Draft:
    """An event with a date, a place and a host."""
    title = draw.choice(
        "title",
        (
            "Concert",
            "Lecture",
            "Meeting",
            "Party",
            "Picnic",
            "Race",
            "Reading",
            "Show",
            "Workshop",
            "Festival",
        ),
    )
    city, month, host = draw.choice("city", CITIES), draw.choice("month", MONTHS), draw.name()
    day, hour, guests = draw.number("day", 1, 28), draw.number("hour", 8, 22), draw.number("guests", 5, 300)
    draw.slots["low_title"] = title.lower()
    facts = draw.phrase((
        "{name} hosts a {low_title} in {city} on {month} {day} at {hour}:00 for {guests} guests.",
        "A {low_title} with {guests} guests takes place in {city} on {month} {day} at {hour}:00. The host is {name}.",
        "On {month} {day} at {hour}:00, {name} welcomes {guests} guests in {city} to a {low_title}.",
        "The {low_title} of {name} is in {city} on {month} {day}. It starts at {hour}:00 and has {guests} guests.",
        "Come to {city} for the {low_title} on {month} {day}, {hour}:00: {name} as host and {guests} guests.",
        "In {city} there will be a {low_title} on {month} {day} at {hour}:00. {name} hosts it and expects {guests} guests.",
    ))  # fmt: skip
    value = {
        "title": title,
        "city": city,
        "month": month,
        "day": day,
        "time": f"{hour}:00",
        "host": host,
        "guests": guests,
    }
    return _json_draft(draw, "event", facts, value)


def settings_json(draw: Draw) -> Draft:
    """The settings of a program."""
    theme, language = (
        draw.choice("theme", COLOURS),
        draw.choice(
            "language",
            (
                "Arabic",
                "Dutch",
                "English",
                "French",
                "German",
                "Hindi",
                "Italian",
                "Polish",
                "Spanish",
                "Turkish",
            ),
        ),
    )
    size, volume = draw.number("size", 8, 40), draw.number("volume", 0, 100)
    sound, sync = draw.choice("sound", ("on", "off")), draw.choice("sync", ("on", "off"))
    facts = draw.phrase((
        "The theme is {theme}, the language is {language} and the font size is {size}. Sound is {sound} with volume {volume}, and sync is {sync}.",
        "Use the language {language}, a {theme} theme and font size {size}. Turn sound {sound}, set the volume to {volume}, and turn sync {sync}.",
        "Sync is {sync} and sound is {sound}. The volume is {volume}, the font size {size}, the theme {theme} and the language {language}.",
        "My settings: {theme} theme, {language} language, font size {size}, volume {volume}, sound {sound}, sync {sync}.",
        "Choose {theme} as theme and {language} as language, switch sound {sound} and sync {sync}, with size {size} for the font and {volume} for the volume.",
        "Set the font size to {size} and the volume to {volume}. Sound should be {sound} and sync {sync}. Theme: {theme}. Language: {language}.",
    ))  # fmt: skip
    value = {
        "theme": theme,
        "language": language,
        "font_size": size,
        "volume": volume,
        "sound": sound == "on",
        "sync": sync == "on",
    }
    return _json_draft(draw, "settings", facts, value)


def book_json(draw: Draw) -> Draft:
    """A book in a library."""
    author = draw.name()
    draw.thing()
    adjective = draw.choice(
        "adjective",
        ("Lost", "Last", "First", "Silent", "Golden", "Hidden", "Broken", "Secret", "Little", "Old"),
    )
    noun = draw.slots["thing"]
    draw.slots["title"] = title = f"The {adjective} {str(noun).title()}"
    pages, year = draw.number("pages", 60, 700), draw.number("year", 1900, 2024)
    lent = draw.choice("state", ("lent out", "on the shelf"))
    facts = draw.phrase((
        "\"{title}\" by {name} has {pages} pages and is from {year}. It is {state}.",
        "In {year}, {name} wrote \"{title}\", a book of {pages} pages. It is now {state}.",
        "The book \"{title}\" is {state}. It has {pages} pages, and {name} wrote it in {year}.",
        "{name} is the author of \"{title}\" ({year}, {pages} pages), which is {state}.",
        "Among the books that are {state} is \"{title}\" from {year}, written by {name} on {pages} pages.",
        "The library has \"{title}\" from {year} with {pages} pages. The author is {name}. The book is {state}.",
    ))  # fmt: skip
    value = {"title": title, "author": author, "year": year, "pages": pages, "lent": lent == "lent out"}
    return _json_draft(draw, "book", facts, value)


def team_json(draw: Draw) -> Draft:
    """A team with a list of members."""
    members, team = people(draw, 3), draw.choice("colour", COLOURS)
    city, wins, losses = draw.choice("city", CITIES), draw.number("wins", 2, 40), draw.number("losses", 2, 40)
    facts = draw.phrase((
        "The {colour} team from {city} has the members {name0}, {name1} and {name2}. It has {wins} wins and {losses} losses.",
        "{name0}, {name1} and {name2} play for the {colour} team in {city}, with {wins} wins and {losses} losses.",
        "In {city} the {colour} team won {wins} games and lost {losses}. Its members are {name0}, {name1} and {name2}.",
        "With {wins} wins and {losses} losses, the {colour} team of {city} has {name0}, {name1} and {name2} as members.",
        "Members of the {colour} team are {name0}, {name1} and {name2}. They come from {city}, and count {wins} wins against {losses} losses.",
        "The {colour} team is {name0}, {name1} and {name2}, all from {city}. They won {wins} times and lost {losses} times.",
    ))  # fmt: skip
    value = {"team": team, "city": city, "members": members, "wins": wins, "losses": losses}
    return _json_draft(draw, "team", facts, value)


FAMILIES: Final[tuple[Callable[[Draw], Draft], ...]] = (
    contact_json, order_json, event_json, settings_json, book_json, team_json,
)  # fmt: skip
