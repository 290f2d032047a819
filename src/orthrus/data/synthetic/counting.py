"""Word problems about people, their things and their money, in whole numbers.

One function per family; each answer has one fixed form and follows from the question.
"""

from orthrus.data.synthetic.draw import Draft, Draw
from orthrus.data.synthetic.words import CONTAINERS, CURRENCIES, PLACES, amount
from orthrus.data.synthetic.worked import worked


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
    return worked(draw, f"{name} buys {n} {first} and {m} {second}.", steps, n * p + m * q)


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
    return worked(draw, givens, steps, paid - n * p)


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
    return worked(draw, givens, steps, rest)


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
    return worked(draw, f"{name} has {n} {things}.", steps, n + second, facts=("given", "compared"), any_order=True)


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
    return worked(draw, f"{name} has {n} {things}.", steps, n + second)


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
    return worked(draw, f"{name} has {start} {things} at first.", steps, middle - gone, facts=("bought", "given"))


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
    return worked(draw, givens, steps, result)


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
    return worked(draw, f"{name} has {start} {money} at first.", steps, total - spent, facts=("saved", "bought"))
