"""Word problems about measures, averages, equations and sequences, in whole numbers.

One function per family; each answer has one fixed form and follows from the question.
"""

from itertools import pairwise
from typing import Final

from orthrus.data.synthetic.draw import Draft, Draw
from orthrus.data.synthetic.words import ACTIVITIES, AREAS, LENGTHS, TOWNS, VEHICLES, WEEKDAYS
from orthrus.data.synthetic.worked import worked


def distance(draw: Draw) -> Draft:
    """Distance from speed and time, with a part already travelled."""
    vehicle, start_town, end_town = draw.choice("vehicle", VEHICLES), *draw.choices("city", 2, TOWNS)
    speed, hours, start = draw.number("speed", 2, 9) * 10, draw.number("hours", 2, 9), draw.number("start", 2, 60)
    draw.slots["speed"] = speed
    steps = [
        f"In {hours} hours at {speed} kilometres per hour the {vehicle} goes "
        f"{hours} x {speed} = {hours * speed} kilometres.",
        f"With the first {start} kilometres that makes {hours * speed} + {start} = {hours * speed + start} kilometres.",
    ]
    givens = f"The {vehicle} goes from {start_town} to {end_town}."
    return worked(draw, givens, steps, hours * speed + start)


def rectangle(draw: Draw) -> Draft:
    """Area or perimeter of a rectangle."""
    area, unit = draw.choice("area", AREAS), draw.choice("unit", LENGTHS)
    long, short = draw.number("long", 4, 20), draw.number("short", 2, 9)
    wanted = draw.choice("wanted", ("area", "perimeter"))
    if wanted == "area":
        rule, result = "The area of a rectangle is the length times the width.", long * short
        steps = [f"The area is {long} x {short} = {result} square {unit}."]
    else:
        rule = "The perimeter of a rectangle is twice the sum of the length and the width."
        result = 2 * (long + short)
        steps = [
            f"The length and the width make {long} + {short} = {long + short} {unit}.",
            f"Twice that is 2 x {long + short} = {result} {unit}.",
        ]
    givens = f"The {area} is {long} {unit} long and {short} {unit} wide. {rule}"
    return worked(draw, givens, steps, result)


def average(draw: Draw) -> Draft:
    """The mean of three whole numbers."""
    name = draw.name()
    draw.choice("activity", ACTIVITIES)
    days = draw.choices("day", 3, WEEKDAYS)
    a, b = draw.number("v0", 3, 30), draw.number("v1", 3, 30)
    c = 3 * draw.number("v2", 1, 12) + -(a + b) % 3  # so that 3 divides the sum
    draw.slots["v2"] = c
    total = a + b + c
    mean = total // 3
    steps = [
        f"The first two numbers make {a} + {b} = {a + b}.",
        f"With the third number the sum is {a + b} + {c} = {total}.",
        f"The average of 3 numbers is {total} / 3 = {mean}.",
    ]
    givens = f"{name} has {a} on {days[0]}, {b} on {days[1]} and {c} on {days[2]}."
    return worked(draw, givens, steps, mean)


def ages(draw: Draw) -> Draft:
    """An age now, later, and another's."""
    name, other = draw.name(), draw.name("other")
    age, gap, later = draw.number("age", 5, 60), draw.number("gap", 2, 20), draw.number("later", 2, 15)
    steps = [
        f"{other} is {gap} years older than {name}: {age} + {gap} = {age + gap} years.",
        f"In {later} years {other} will be {age + gap} + {later} = {age + gap + later} years old.",
    ]
    return worked(draw, f"{name} is {age} years old.", steps, age + gap + later)


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
    one = {"feet": "foot", "centimetres": "centimetre", "inches": "inch"}.get(large, large.removesuffix("s"))
    givens = f"{name} has {n} {large} and {extra} {small}. One {one} has {factor} {small}."
    steps = [
        f"{n} {large} are {n} x {factor} = {n * factor} {small}.",
        f"With {extra} more {small} that makes {n * factor} + {extra} = {n * factor + extra} {small}.",
    ]
    return worked(draw, givens, steps, n * factor + extra)


def equation(draw: Draw) -> Draft:
    """A linear equation with a whole solution."""
    letter = draw.choice("letter", ("x", "y", "z", "n", "t", "a", "k", "m"))
    a, x, sign = draw.number("a", 2, 9), draw.number("x", 2, 9), draw.choice("sign", ("+", "-"))
    b = draw.number("b", 1, 20 if sign == "+" else min(20, a * x - 1))
    c = a * x + b if sign == "+" else a * x - b
    del draw.slots["x"]
    draw.slots["c"] = c
    back, undo = ("Subtract", "-") if sign == "+" else ("Add", "+")
    steps = [
        f"{back} {b} on both sides: {a}{letter} = {c} {undo} {b} = {a * x}.",
        f"Divide both sides by {a}: {letter} = {a * x} / {a} = {x}.",
        f"Check: {a} x {x} {sign} {b} = {a * x} {sign} {b} = {c}.",
    ]
    return worked(draw, f"The equation is {a}{letter} {sign} {b} = {c}.", steps, x, facts=())


def sequence(draw: Draw) -> Draft:
    """The terms that follow in an arithmetic sequence."""
    start, step = draw.number("start", 1, 40), draw.number("step", 2, 12)
    terms = [start + index * step for index in range(7)]
    draw.slots["shown"] = ", ".join(map(str, terms[:4]))
    ahead = draw.number("ahead", 2, 3)
    ordinal = {2: "second", 3: "third"}[ahead]
    draw.slots["place"] = ordinal
    last = terms[3 : 4 + ahead]
    steps = [f"The step is {terms[1]} - {terms[0]} = {step}."]
    steps += [f"The next number is {here} + {step} = {there}." for here, there in pairwise(last)]
    givens = f"The numbers are {draw.slots['shown']} and we need the {ordinal} number after {terms[3]}."
    return worked(draw, givens, steps, last[-1], facts=())
