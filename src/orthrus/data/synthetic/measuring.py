"""Word problems about measures, averages, equations and sequences, in whole numbers.

One function a family; each answer has one fixed form and follows from the question.
"""

# ruff: noqa: E501 - a phrasing stays on one line, so that it can be read and counted

from itertools import pairwise
from typing import Final

from orthrus.data.synthetic.draw import Draft, Draw
from orthrus.data.synthetic.words import AREAS, LENGTHS, TOWNS, VEHICLES, WEEKDAYS
from orthrus.data.synthetic.worked import worked


def distance(draw: Draw) -> Draft:
    """Distance from speed and time, with a part already travelled."""
    vehicle, start_town, end_town = draw.choice("vehicle", VEHICLES), *draw.choices("city", 2, TOWNS)
    speed, hours, start = (
        draw.number("speed", 2, 9) * 10,
        draw.number("hours", 2, 9),
        draw.number("start", 2, 60),
    )
    draw.slots["speed"] = speed
    facts = draw.phrase((
        "A {vehicle} on the way from {city0} to {city1} has gone {start} kilometres. It then goes on at {speed} kilometres per hour for {hours} hours.",
        "Between {city0} and {city1} a {vehicle} moves at {speed} kilometres per hour for {hours} hours, after the first {start} kilometres.",
        "A {vehicle} leaves {city0} for {city1}. After {start} kilometres it keeps a speed of {speed} kilometres per hour for {hours} hours.",
        "From {city0} a {vehicle} goes {start} kilometres towards {city1}, and then {hours} more hours at {speed} kilometres per hour.",
        "On its route out of {city0} to {city1}, a {vehicle} first covers {start} kilometres, then travels {hours} hours with {speed} kilometres in each hour.",
        "A {vehicle} heads from {city0} to {city1}: first {start} kilometres, then {hours} hours at a speed of {speed} kilometres per hour.",
    ))  # fmt: skip
    question = draw.phrase((
        "How far has it gone in total?", "How many kilometres is that altogether?", "What is the whole distance?",
        "How many kilometres has the {vehicle} gone then?", "Find the full length of the journey so far.",
        "What distance has the {vehicle} covered by then?",
    ))  # fmt: skip
    steps = [
        f"In {hours} hours at {speed} kilometres per hour the {vehicle} goes {hours} x {speed} = {hours * speed} kilometres.",
        f"With the first {start} kilometres that makes {hours * speed} + {start} = {hours * speed + start} kilometres.",
    ]
    givens = f"The {vehicle} goes from {start_town} to {end_town}."
    return worked(draw, "distance", [facts], question, givens, steps, hours * speed + start)


def rectangle(draw: Draw) -> Draft:
    """Area or perimeter of a rectangle."""
    area, unit = draw.choice("area", AREAS), draw.choice("unit", LENGTHS)
    long, short = draw.number("long", 4, 20), draw.number("short", 2, 9)
    wanted = draw.choice("wanted", ("area", "perimeter"))
    facts = draw.phrase((
        "A {area} is {long} {unit} long and {short} {unit} wide.",
        "The length of a rectangular {area} is {long} {unit} and its width is {short} {unit}.",
        "A rectangular {area} measures {long} {unit} by {short} {unit}.",
        "A {area} has the shape of a rectangle with a length of {long} {unit} and a width of {short} {unit}.",
        "Picture a rectangular {area}: one side has {long} {unit}, the next one {short} {unit}.",
        "A rectangle {long} {unit} long and {short} {unit} wide is the plan of a {area}.",
    ))  # fmt: skip
    question = draw.phrase((
        "What is its {wanted}?", "Find the {wanted}.", "How large is the {wanted} of the {area}?",
        "Work out the {wanted} of the {area}.", "Which {wanted} does this {area} have?", "Calculate the {wanted}.",
    ))  # fmt: skip
    if wanted == "area":
        rule, result = "The area of a rectangle is the length times the width.", long * short
        steps = [f"The area is {long} x {short} = {result} square {unit}."]
    else:
        rule, result = (
            "The perimeter of a rectangle is twice the sum of the length and the width.",
            2 * (long + short),
        )
        steps = [
            f"The length and the width make {long} + {short} = {long + short} {unit}.",
            f"Twice that is 2 x {long + short} = {result} {unit}.",
        ]
    givens = f"The {area} is {long} {unit} long and {short} {unit} wide. {rule}"
    return worked(draw, "rectangle", [facts], question, givens, steps, result)


def average(draw: Draw) -> Draft:
    """The mean of three whole numbers."""
    name = draw.name()
    draw.choice("activity", ("points", "pages", "laps", "goals", "letters", "photos"))
    days = draw.choices("day", 3, WEEKDAYS)
    a, b = draw.number("v0", 3, 30), draw.number("v1", 3, 30)
    c = 3 * draw.number("v2", 1, 12) + -(a + b) % 3  # so that 3 divides the sum
    draw.slots["v2"] = c
    total = a + b + c
    mean = total // 3
    facts = draw.phrase((
        "{name} counted {v0} {activity} on {day0}, {v1} on {day1} and {v2} on {day2}.",
        "On {day0} {name} had {v0} {activity}, on {day1} {v1} {activity} and on {day2} {v2} {activity}.",
        "{name} writes down {activity}: {day0} {v0}, {day1} {v1}, {day2} {v2}.",
        "The {activity} of {name} were {v0} on {day0}, {v1} on {day1}, and {v2} on {day2}.",
        "In the log of {name} stand {v0} {activity} for {day0}, {v1} for {day1} and {v2} for {day2}.",
        "{name} reached {v0} {activity} on {day0}. On {day1} it was {v1}, and on {day2} it was {v2}.",
    ))  # fmt: skip
    question = draw.phrase((
        "What is the average?", "What is the average number of {activity} per day?", "Find the mean of the three numbers.",
        "How many {activity} is that per day on average?", "Which number of {activity} is the mean?", "Calculate the average of these days.",
    ))  # fmt: skip
    steps = [
        f"The first two numbers make {a} + {b} = {a + b}.",
        f"With the third number the sum is {a + b} + {c} = {total}.",
        f"The average of 3 numbers is {total} / 3 = {mean}.",
    ]
    givens = f"{name} has {a} on {days[0]}, {b} on {days[1]} and {c} on {days[2]}."
    return worked(draw, "average", [facts], question, givens, steps, mean)


def ages(draw: Draw) -> Draft:
    """An age now, later, and another's."""
    name, other = draw.name(), draw.name("other")
    age, gap, later = draw.number("age", 5, 60), draw.number("gap", 2, 20), draw.number("later", 2, 15)
    facts = draw.phrase((
        "{name} is {age} years old. {other} is {gap} years older than {name}.",
        "{other} is {gap} years older than {name}, who is {age}.",
        "{name} is {age}, and {other} is older by {gap} years.",
        "The age of {name} is {age}. {other} was born {gap} years before {name}.",
        "When one knows that {name} is {age}, then {other} has {gap} years more.",
        "{name} turned {age} today. {other} is {gap} years older.",
    ))  # fmt: skip
    question = draw.phrase((
        "How old will {other} be in {later} years?", "What will be the age of {other} in {later} years?",
        "In {later} years, how old is {other}?", "How old is {other} {later} years from now?",
        "Tell the age that {other} reaches after {later} years.", "After {later} years, what age will {other} have?",
    ))  # fmt: skip
    steps = [
        f"{other} is {gap} years older than {name}: {age} + {gap} = {age + gap} years.",
        f"In {later} years {other} will be {age + gap} + {later} = {age + gap + later} years old.",
    ]
    return worked(draw, "ages", [facts], question, f"{name} is {age} years old.", steps, age + gap + later)


_CONVERSIONS: Final = {
    "hours": ("minutes", 60), "minutes": ("seconds", 60), "weeks": ("days", 7), "days": ("hours", 24),
    "years": ("months", 12), "feet": ("inches", 12), "yards": ("feet", 3), "dozens": ("pieces", 12),
    "centimetres": ("millimetres", 10), "metres": ("centimetres", 100),
}  # fmt: skip


def conversion(draw: Draw) -> Draft:
    """A larger unit and some of the smaller one, all in the smaller."""
    name, large = draw.name(), draw.choice("large", tuple(_CONVERSIONS))
    small, factor = _CONVERSIONS[large]
    draw.slots["small"] = small
    n, extra = draw.number("n", 2, 9), draw.number("extra", 2, factor - 1)
    facts = draw.phrase((
        "{name} measures {n} {large} and {extra} {small}.", "{name} has written down {n} {large} and {extra} {small}.",
        "In a note {name} reads: {n} {large} and {extra} {small}.", "{name} needs exactly {n} {large} and {extra} {small}.",
        "The list of {name} says {n} {large} plus {extra} {small}.", "{name} asks about {n} {large} and {extra} {small}.",
    ))  # fmt: skip
    question = draw.phrase((
        "How many {small} is that?", "What is that in {small}?", "Convert this to {small}.",
        "How many {small} are there in all?", "Give the whole as {small}.", "Express it in {small} only.",
    ))  # fmt: skip
    one = {"feet": "foot", "centimetres": "centimetre", "inches": "inch"}.get(large, large.removesuffix("s"))
    givens = f"{name} has {n} {large} and {extra} {small}. One {one} has {factor} {small}."
    steps = [
        f"{n} {large} are {n} x {factor} = {n * factor} {small}.",
        f"With {extra} more {small} that makes {n * factor} + {extra} = {n * factor + extra} {small}.",
    ]
    return worked(draw, "conversion", [facts], question, givens, steps, n * factor + extra)


def equation(draw: Draw) -> Draft:
    """A linear equation with a whole solution."""
    letter = draw.choice("letter", ("x", "y", "z", "n", "t", "a", "k", "m"))
    a, x, sign = draw.number("a", 2, 9), draw.number("x", 2, 9), draw.choice("sign", ("+", "-"))
    b = draw.number("b", 1, 20 if sign == "+" else min(20, a * x - 1))
    c = a * x + b if sign == "+" else a * x - b
    del draw.slots["x"]
    draw.slots["c"] = c
    question = draw.phrase((
        "Solve {a}{letter} {sign} {b} = {c} for {letter}.", "Find {letter} if {a}{letter} {sign} {b} = {c}.",
        "What is {letter} when {a}{letter} {sign} {b} = {c}?", "The equation is {a}{letter} {sign} {b} = {c}. What is {letter}?",
        "Which value of {letter} makes {a}{letter} {sign} {b} = {c} true?", "Given {a}{letter} {sign} {b} = {c}, find {letter}.",
        "Determine {letter} from {a}{letter} {sign} {b} = {c}.", "For which {letter} is {a}{letter} {sign} {b} = {c}?",
    ))  # fmt: skip
    back, undo = ("Subtract", "-") if sign == "+" else ("Add", "+")
    steps = [
        f"{back} {b} on both sides: {a}{letter} = {c} {undo} {b} = {a * x}.",
        f"Divide both sides by {a}: {letter} = {a * x} / {a} = {x}.",
        f"Check: {a} x {x} {sign} {b} = {a * x} {sign} {b} = {c}.",
    ]
    return worked(draw, "equation", [], question, f"The equation is {a}{letter} {sign} {b} = {c}.", steps, x)


def sequence(draw: Draw) -> Draft:
    """The terms that follow in an arithmetic sequence."""
    start, step = draw.number("start", 1, 40), draw.number("step", 2, 12)
    terms = [start + index * step for index in range(7)]
    draw.slots["shown"] = ", ".join(map(str, terms[:4]))
    ahead = draw.number("ahead", 2, 3)
    ordinal = {2: "second", 3: "third"}[ahead]
    draw.slots["place"] = ordinal
    question = draw.phrase((
        "A sequence begins {shown}. What is the {place} number after these?",
        "Look at the numbers {shown}. Find the {place} one that comes next.",
        "The numbers {shown} grow by the same step. What is the {place} next number?",
        "Continue {shown} and give the {place} number that follows.",
        "Someone counts {shown} and goes on like that. Which is the {place} number to come?",
        "Find the rule in {shown}. Then give the {place} number after the last one.",
        "Here is a pattern: {shown}. What is the {place} number after it?",
    ))  # fmt: skip
    last = terms[3 : 4 + ahead]
    steps = [f"The step is {terms[1]} - {terms[0]} = {step}."]
    steps += [f"The next number is {here} + {step} = {there}." for here, there in pairwise(last)]
    givens = f"The numbers are {draw.slots['shown']} and we need the {ordinal} number after {terms[3]}."
    return worked(draw, "sequence", [], question, givens, steps, last[-1])
