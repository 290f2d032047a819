"""Word problems in whole numbers: things and money, measures, averages, equations and sequences.

One public function per family, in the order of drawing; each answer has one fixed form and follows from the question.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from orthrus.data.synthetic.draw import Draft, Draw
from orthrus.data.synthetic.words import (
    ACTIVITIES,
    AREAS,
    CONTAINERS,
    CURRENCIES,
    LENGTHS,
    PLACES,
    TOWNS,
    VEHICLES,
    WEEKDAYS,
    amount,
)


def shopping(draw: Draw) -> Draft:
    """The price of two kinds of things."""
    name, first, second = draw.name(), draw.thing("a"), draw.thing("b")
    money = draw.choice("money", CURRENCIES)
    draw.choice("place", PLACES)
    n, p, m, q = (draw.number(slot, 2, 9) for slot in ("n", "p", "m", "q"))
    steps = [
        f"{n} {first} at {p} {money} each cost {n} x {p} = {n * p} {money}.",
        f"{m} {second} at {q} {money} each cost {m} x {q} = {m * q} {money}.",
        f"Together they cost {n * p} + {m * q} = {n * p + m * q} {money}.",
    ]
    return _worked(draw, f"{name} buys {n} {first} and {m} {second}.", steps, n * p + m * q)


def change(draw: Draw) -> Draft:
    """The money left after buying several of one thing."""
    name, things, money = draw.name(), draw.thing(), draw.choice("money", CURRENCIES)
    n, p = draw.number("n", 2, 9), draw.number("p", 2, 9)
    paid = draw.number("paid", n * p // 10 + 1, 10) * 10
    draw.slots["paid"] = paid
    steps = [
        f"{n} {things} at {p} {money} each cost {n} x {p} = {n * p} {money}.",
        f"{paid} {money} minus {n * p} {money} leaves {paid} - {n * p} = {amount(paid - n * p, money)}.",
    ]
    givens = f"{name} has {paid} {money} and buys {n} {things}."
    return _worked(draw, givens, steps, paid - n * p)


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
    return _worked(draw, givens, steps, hours * speed + start)


def sharing(draw: Draw) -> Draft:
    """Division with remainder."""
    name, things, box = draw.name(), draw.thing(), draw.choice("box", CONTAINERS)
    size, full = draw.number("size", 3, 10), draw.number("full", 2, 9)
    rest = draw.number("rest", 1, size - 1)
    total = size * full + rest
    del draw.slots["full"], draw.slots["rest"]
    draw.slots["total"] = total
    steps = [
        f"{size} fits {full} times into {total}, since {size} x {full} = {size * full}.",
        f"{full} full {box} hold {size * full} {things}.",
        f"Left over are {total} - {size * full} = {amount(rest, things)}.",
    ]
    givens = f"{name} has {total} {things} and puts {size} into each of the {box}."
    return _worked(draw, givens, steps, rest)


def comparing(draw: Draw) -> Draft:
    """More or fewer than another, and both together."""
    name, other, things = draw.name(), draw.name("other"), draw.thing()
    n, by = draw.number("n", 15, 90), draw.number("by", 2, 14)
    more = draw.choice("relation", ("more", "fewer")) == "more"
    second, sign = (n + by, "+") if more else (n - by, "-")
    relation = draw.slots["relation"]
    steps = [
        f"{other} has {by} {relation} than {name}: {n} {sign} {by} = {amount(second, things)}.",
        f"Together {name} and {other} have {n} + {second} = {n + second} {things}.",
    ]
    return _worked(draw, f"{name} has {n} {things}.", steps, n + second, facts=("given", "compared"), any_order=True)


def doubling(draw: Draw) -> Draft:
    """Twice, three times or half as many."""
    name, other, things = draw.name(), draw.name("other"), draw.thing()
    n, times = 2 * draw.number("n", 3, 25), draw.choice("times", ("twice", "half", "three times"))
    draw.slots["n"] = n
    working, second = {
        "twice": (f"2 x {n}", 2 * n), "half": (f"{n} / 2", n // 2), "three times": (f"3 x {n}", 3 * n),
    }[times]  # fmt: skip
    steps = [
        f"{other} has {times} as many {things} as {name}: {working} = {second} {things}.",
        f"Together that makes {n} + {second} = {n + second} {things}.",
    ]
    return _worked(draw, f"{name} has {n} {things}.", steps, n + second)


def giving(draw: Draw) -> Draft:
    """Some at first, some bought in packs, some given away."""
    name, other, things = draw.name(), draw.name("other"), draw.thing()
    box = draw.choice("box", CONTAINERS[:6])
    start, packs, size = draw.number("start", 3, 30), draw.number("packs", 2, 9), draw.number("size", 2, 9)
    middle = start + packs * size
    gone = draw.number("gone", 2, min(middle - 2, 20))
    steps = [
        f"{packs} {box} of {size} {things} are {packs} x {size} = {packs * size} {things}.",
        f"With the {start} {things} from before that makes {start} + {packs * size} = {middle} {things}.",
        f"After {gone} {things} go to {other}, {name} has {middle} - {gone} = {middle - gone} {things}.",
    ]
    return _worked(draw, f"{name} has {start} {things} at first.", steps, middle - gone, facts=("bought", "given"))


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
    return _worked(draw, givens, steps, result)


def percent(draw: Draw) -> Draft:
    """A price lowered or raised by tens of percent."""
    _, _, money = draw.name(), draw.thing(), draw.choice("money", CURRENCIES[:3])
    rate, price = 10 * draw.number("rate", 1, 9), 10 * draw.number("price", 2, 20)
    draw.slots |= {"rate": rate, "price": price}
    direction = draw.choice("way", ("lower", "higher"))
    part, tenth, thing = price * rate // 100, price // 10, draw.slots["thing"]
    result, sign = (price - part, "-") if direction == "lower" else (price + part, "+")
    steps = [
        f"10 percent of {price} is {price} / 10 = {tenth}.",
        f"{rate} percent of {price} is {rate // 10} x {tenth} = {part}.",
        f"The new price is {price} {sign} {part} = {result} {money}.",
    ]
    givens = f"The {thing} costs {price} {money} and the price gets {rate} percent {direction}."
    return _worked(draw, givens, steps, result)


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
    return _worked(draw, givens, steps, mean)


def ages(draw: Draw) -> Draft:
    """An age now, later, and another's."""
    name, other = draw.name(), draw.name("other")
    age, gap, later = draw.number("age", 5, 60), draw.number("gap", 2, 20), draw.number("later", 2, 15)
    steps = [
        f"{other} is {gap} years older than {name}: {age} + {gap} = {age + gap} years.",
        f"In {later} years {other} will be {age + gap} + {later} = {age + gap + later} years old.",
    ]
    return _worked(draw, f"{name} is {age} years old.", steps, age + gap + later)


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
    return _worked(draw, givens, steps, n * factor + extra)


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
    return _worked(draw, f"The equation is {a}{letter} {sign} {b} = {c}.", steps, x, facts=())


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
    return _worked(draw, givens, steps, last[-1], facts=())


def budget(draw: Draw) -> Draft:
    """Saving every week towards a goal or spending from it."""
    name, money = draw.name(), draw.choice("money", CURRENCIES)
    draw.thing()
    thing = draw.slots["thing"]
    start, weekly = draw.number("start", 5, 60), draw.number("weekly", 2, 9)
    weeks, spent = draw.number("weeks", 2, 9), draw.number("spent", 2, 5)
    total = start + weekly * weeks
    steps = [
        f"In {weeks} weeks {name} saves {weeks} x {weekly} = {weeks * weekly} {money}.",
        f"With the {start} {money} from before that makes {start} + {weeks * weekly} = {total} {money}.",
        f"After the {thing} for {spent} {money}, {name} has {total} - {spent} = {total - spent} {money}.",
    ]
    return _worked(draw, f"{name} has {start} {money} at first.", steps, total - spent, facts=("saved", "bought"))


def _worked(
    draw: Draw,
    givens: str,
    steps: Sequence[str],
    result: int,
    *,
    facts: Sequence[str] = ("facts",),
    any_order: bool = False,
) -> Draft:
    """Return a problem and its answer, whose steps are numbered.

    Args:
        draw: has the slots that the phrasings name.
        givens: the first sentence of the answer.
        steps: its calculations.
        result: the number asked for.
        facts: groups of phrasings that state the problem.
        any_order: whether two facts may change places.
    """
    stated, question = [draw.phrase(group) for group in facts], draw.phrase("question")
    if any_order and not draw.coin():
        stated.reverse()
    parts = [*stated, question]
    if draw.coin():
        parts.insert(0, draw.phrase("openers"))
    if draw.coin():
        parts.append(draw.phrase("closers"))
    lines = [givens, *(f"Step {number}: {step}" for number, step in enumerate(steps, 1))]
    answer = "\n".join([*lines, f"The answer is {result}."])
    return Draft(prompt=" ".join(parts), answer=answer, check=(str(result),))
