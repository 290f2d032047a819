"""Word problems about people, their things and their money, in whole numbers.

One function a family; each answer has one fixed form and follows from the question.
"""

# ruff: noqa: E501 - a phrasing stays on one line, so that it can be read and counted

from orthrus.data.synthetic.draw import Draft, Draw
from orthrus.data.synthetic.words import CONTAINERS, CURRENCIES, PLACES, amount
from orthrus.data.synthetic.worked import worked


def shopping(draw: Draw) -> Draft:
    """The price of two kinds of things."""
    name, first, second = draw.name(), draw.thing("a"), draw.thing("b")
    money = draw.choice("money", CURRENCIES)
    draw.choice("place", PLACES)
    n, p, m, q = (draw.number(slot, 2, 9) for slot in ("n", "p", "m", "q"))
    facts = draw.phrase((
        "{name} buys {n} {as} for {p} {money} each and {m} {bs} for {q} {money} each at the {place}.",
        "At the {place}, {name} buys {n} {as} and {m} {bs}. Each {a} costs {p} {money} and each {b} costs {q} {money}.",
        "A {a} costs {p} {money} at the {place} and a {b} costs {q} {money}. {name} buys {n} {as} and {m} {bs}.",
        "{name} needs {n} {as} at {p} {money} each. {name} also needs {m} {bs} at {q} {money} each, all from the {place}.",
        "The {place} sells {as} at {p} {money} each and {bs} at {q} {money} each, and {name} takes home {n} {as} and {m} {bs}.",
        "In the {place} there are {as} at {p} {money} each and {bs} at {q} {money} each. {name} wants {n} {as} and {m} {bs}.",
        "{name} went to the {place} and paid for {n} {as} and {m} {bs}. One {a} was {p} {money}. One {b} was {q} {money}.",
    ))  # fmt: skip
    question = draw.phrase((
        "How much does it cost in total?", "What is the total price in {money}?", "How many {money} is that altogether?",
        "What does {name} pay in all?", "Find the sum of money that {name} spends.", "How many {money} does {name} spend?",
    ))  # fmt: skip
    steps = [
        f"{n} {first} at {p} {money} each cost {n} x {p} = {n * p} {money}.",
        f"{m} {second} at {q} {money} each cost {m} x {q} = {m * q} {money}.",
        f"Together they cost {n * p} + {m * q} = {n * p + m * q} {money}.",
    ]
    return worked(
        draw,
        "shopping",
        [facts],
        question,
        f"{name} buys {n} {first} and {m} {second}.",
        steps,
        n * p + m * q,
    )


def change(draw: Draw) -> Draft:
    """The money left after buying several of one thing."""
    name, things, money = draw.name(), draw.thing(), draw.choice("money", CURRENCIES)
    n, p = draw.number("n", 2, 9), draw.number("p", 2, 9)
    paid = draw.number("paid", n * p // 10 + 1, 10) * 10
    draw.slots["paid"] = paid
    facts = draw.phrase((
        "{name} has {paid} {money} and buys {n} {things} at {p} {money} each.",
        "{name} pays for {n} {things} with {paid} {money}. Each {thing} costs {p} {money}.",
        "One {thing} costs {p} {money}. {name} buys {n} {things} and hands over {paid} {money}.",
        "With {paid} {money} in the purse, {name} goes out and gets {n} {things} that cost {p} {money} each.",
        "The purse of {name} holds {paid} {money}. Then {n} {things} are paid from it, {p} {money} for each.",
        "{name} takes {paid} {money} along and spends some on {n} {things}. The price of a {thing} is {p} {money}.",
    ))  # fmt: skip
    question = draw.phrase((
        "How much money is left?", "How many {money} does {name} have left?", "What is the change?",
        "How many {money} remain?", "What amount does {name} still have?", "How much change does {name} get?",
    ))  # fmt: skip
    steps = [
        f"{n} {things} at {p} {money} each cost {n} x {p} = {n * p} {money}.",
        f"{paid} {money} minus {n * p} {money} leaves {paid} - {n * p} = {amount(paid - n * p, money)}.",
    ]
    givens = f"{name} has {paid} {money} and buys {n} {things}."
    return worked(draw, "change", [facts], question, givens, steps, paid - n * p)


def sharing(draw: Draw) -> Draft:
    """Division with remainder."""
    name, things, box = draw.name(), draw.thing(), draw.choice("box", CONTAINERS)
    size, full = draw.number("size", 3, 10), draw.number("full", 2, 9)
    rest = draw.number("rest", 1, size - 1)
    total = size * full + rest
    del draw.slots["full"], draw.slots["rest"]
    draw.slots["total"] = total
    facts = draw.phrase((
        "{name} puts {total} {things} into {box} of {size}.",
        "{name} has {total} {things}. They go into {box} that hold {size} {things} each.",
        "There are {total} {things} and {name} packs {size} of them into each of the {box}.",
        "{size} {things} fit into each of the {box}. {name} fills as many as possible with {total} {things}.",
        "A total of {total} {things} is sorted by {name} so that {size} at a time go into {box}.",
        "With {total} {things}, {name} fills {box}, always {size} {things} in each.",
    ))  # fmt: skip
    question = draw.phrase((
        "How many {things} are left over?", "How many {things} remain outside?", "What is the number of {things} left over?",
        "How many {things} do not fit into full {box}?", "Find how many {things} stay behind.",
        "How many {things} does {name} have left at the end?",
    ))  # fmt: skip
    steps = [
        f"{size} fits {full} times into {total}, since {size} x {full} = {size * full}.",
        f"{full} full {box} hold {size * full} {things}.",
        f"Left over are {total} - {size * full} = {amount(rest, things)}.",
    ]
    givens = f"{name} has {total} {things} and puts {size} into each of the {box}."
    return worked(draw, "sharing", [facts], question, givens, steps, rest)


def comparing(draw: Draw) -> Draft:
    """More or fewer than another, and both together."""
    name, other, things = draw.name(), draw.name("other"), draw.thing()
    n, by = draw.number("n", 15, 90), draw.number("by", 2, 14)
    more = draw.choice("relation", ("more", "fewer")) == "more"
    second, sign = (n + by, "+") if more else (n - by, "-")
    relation = draw.slots["relation"]
    given = draw.phrase((
        "{name} has {n} {things}.", "{name} owns {n} {things}.", "There are {n} {things} on {name}'s shelf.",
        "{name} counts {n} {things}.", "The collection of {name} has {n} {things}.", "{name} keeps {n} {things} at home.",
    ))  # fmt: skip
    compared = draw.phrase((
        "{other} has {by} {relation} {things} than {name}.", "{other} has {by} {relation} than {name}.",
        "Compared with {name}, {other} has {by} {relation} {things}.", "{other} owns {by} {relation} {things} than {name} does.",
        "For {other} the count is {by} {relation} than for {name}.", "With {other} there are {by} {relation} {things} than with {name}.",
    ))  # fmt: skip
    question = draw.phrase((
        "How many {things} do they have together?", "How many {things} do {name} and {other} have in all?",
        "What is the total number of {things}?", "How many {things} are there altogether?",
        "Count all the {things} of {name} and {other}.", "How many {things} is that for both together?",
    ))  # fmt: skip
    steps = [
        f"{other} has {by} {relation} than {name}: {n} {sign} {by} = {amount(second, things)}.",
        f"Together {name} and {other} have {n} + {second} = {n + second} {things}.",
    ]
    facts = [given, compared] if draw.coin() else [compared, given]
    return worked(draw, "comparing", facts, question, f"{name} has {n} {things}.", steps, n + second)


def doubling(draw: Draw) -> Draft:
    """Twice, three times or half as many."""
    name, other, things = draw.name(), draw.name("other"), draw.thing()
    n, times = 2 * draw.number("n", 3, 25), draw.choice("times", ("twice", "half", "three times"))
    draw.slots["n"] = n
    working, second = {
        "twice": (f"2 x {n}", 2 * n), "half": (f"{n} / 2", n // 2), "three times": (f"3 x {n}", 3 * n),
    }[times]  # fmt: skip
    facts = draw.phrase((
        "{name} has {n} {things}. {other} has {times} as many {things} as {name}.",
        "{other} has {times} as many {things} as {name}, and {name} has {n}.",
        "{name} found {n} {things}, and {other} found {times} as many.",
        "{name} sold {n} {things} this week. {other} sold {times} as many.",
        "There were {n} {things} with {name} and {times} as many with {other}.",
        "{name} made {n} {things} while {other} made {times} as many {things}.",
    ))  # fmt: skip
    question = draw.phrase((
        "How many {things} is that together?", "How many {things} are there in total?", "What is the total for both?",
        "How many {things} do the two come to in all?", "Add up the {things} of the two.",
        "How many {things} do {name} and {other} make together?",
    ))  # fmt: skip
    steps = [
        f"{other} has {times} as many {things} as {name}: {working} = {second} {things}.",
        f"Together that makes {n} + {second} = {n + second} {things}.",
    ]
    return worked(draw, "doubling", [facts], question, f"{name} has {n} {things}.", steps, n + second)


def giving(draw: Draw) -> Draft:
    """Some at first, some bought in packs, some given away."""
    name, other, things = draw.name(), draw.name("other"), draw.thing()
    box = draw.choice("box", CONTAINERS[:6])
    start, packs, size = draw.number("start", 3, 30), draw.number("packs", 2, 9), draw.number("size", 2, 9)
    middle = start + packs * size
    gone = draw.number("gone", 2, min(middle - 2, 20))
    bought = draw.phrase((
        "{name} has {start} {things} and buys {packs} {box} with {size} {things} in each.",
        "{name} starts with {start} {things}. Then {name} buys {packs} {box} of {size} {things}.",
        "At first {name} has {start} {things}; later {name} gets {packs} {box} of {size} {things} each.",
        "{name} owned {start} {things} before buying {packs} more {box}, each with {size} {things}.",
        "To the {start} {things} that {name} had, {packs} {box} with {size} {things} apiece are added.",
        "{name} keeps {start} {things} and orders {packs} {box}, {size} {things} in each of them.",
    ))  # fmt: skip
    given = draw.phrase((
        "Then {name} gives {gone} {things} to {other}.", "After that, {other} gets {gone} {things} from {name}.",
        "{name} hands {gone} of them to {other}.", "Later {name} sells {gone} {things} to {other}.",
        "In the end {gone} of these go to {other}.", "Next, {name} sends {gone} {things} to {other}.",
    ))  # fmt: skip
    question = draw.phrase((
        "How many {things} does {name} have now?", "How many {things} are left?", "How many {things} does {name} keep?",
        "What number of {things} remains with {name}?", "Find how many {things} {name} still owns.",
        "How many {things} does {name} have at the end?",
    ))  # fmt: skip
    steps = [
        f"{packs} {box} of {size} {things} are {packs} x {size} = {packs * size} {things}.",
        f"With the {start} {things} from before that makes {start} + {packs * size} = {middle} {things}.",
        f"After {gone} {things} go to {other}, {name} has {middle} - {gone} = {middle - gone} {things}.",
    ]
    return worked(
        draw,
        "giving",
        [bought, given],
        question,
        f"{name} has {start} {things} at first.",
        steps,
        middle - gone,
    )


def percent(draw: Draw) -> Draft:
    """A price lowered or raised by tens of percent."""
    _, _, money = draw.name(), draw.thing(), draw.choice("money", CURRENCIES[:3])
    rate, price = 10 * draw.number("rate", 1, 9), 10 * draw.number("price", 2, 20)
    draw.slots |= {"rate": rate, "price": price}
    direction = draw.choice("way", ("lower", "higher"))
    part, tenth, thing = price * rate // 100, price // 10, draw.slots["thing"]
    result, sign = (price - part, "-") if direction == "lower" else (price + part, "+")
    facts = draw.phrase((
        "{name} sees a {thing} for {price} {money}. The next day the price is {rate} percent {way}.",
        "A {thing} that {name} wants costs {price} {money}, and then its price becomes {rate}% {way}.",
        "The price of a {thing} was {price} {money}. When {name} buys it, it is {rate} percent {way}.",
        "{name} sells a {thing} for {price} {money} and then makes the price {rate}% {way}.",
        "Last week {name} could have a {thing} at {price} {money}; this week it is {rate} percent {way}.",
        "A {thing} costs {price} {money}. For {name} the price is {rate} percent {way}.",
    ))  # fmt: skip
    question = draw.phrase((
        "What is the new price?", "How many {money} does the {thing} cost now?", "What does the {thing} cost then?",
        "Find the new price in {money}.", "Which price does {name} see in the end?", "How much is the {thing} after that?",
    ))  # fmt: skip
    steps = [
        f"10 percent of {price} is {price} / 10 = {tenth}.",
        f"{rate} percent of {price} is {rate // 10} x {tenth} = {part}.",
        f"The new price is {price} {sign} {part} = {result} {money}.",
    ]
    givens = f"The {thing} costs {price} {money} and the price gets {rate} percent {direction}."
    return worked(draw, "percent", [facts], question, givens, steps, result)


def budget(draw: Draw) -> Draft:
    """Saving every week towards a goal or spending from it."""
    name, money = draw.name(), draw.choice("money", CURRENCIES)
    draw.thing()
    thing = draw.slots["thing"]
    start, weekly = draw.number("start", 5, 60), draw.number("weekly", 2, 9)
    weeks, spent = draw.number("weeks", 2, 9), draw.number("spent", 2, 5)
    total = start + weekly * weeks
    saved = draw.phrase((
        "{name} has {start} {money} and saves {weekly} {money} every week for {weeks} weeks.",
        "Every week {name} saves {weekly} {money}. {name} began with {start} {money} and goes on for {weeks} weeks.",
        "{name} starts with {start} {money} and adds {weekly} {money} a week during {weeks} weeks.",
        "For {weeks} weeks {name} puts aside {weekly} {money} each week, with {start} {money} already there.",
        "The savings of {name} are {start} {money}; over {weeks} weeks each week brings {weekly} {money} more.",
        "{name} earns {weekly} {money} each week for {weeks} weeks and had {start} {money} before.",
    ))  # fmt: skip
    bought = draw.phrase((
        "A {thing} is then bought for {spent} {money}.", "Then {name} pays {spent} {money} for a {thing}.",
        "At the end {name} buys a {thing} for {spent} {money}.", "After that {spent} {money} go into a {thing}.",
        "Finally a {thing} takes {spent} {money} away.", "Later {name} spends {spent} {money} on a {thing}.",
    ))  # fmt: skip
    question = draw.phrase((
        "How much money does {name} have then?", "How many {money} are left?", "What does {name} have in the end?",
        "How many {money} does {name} still have?", "Find the rest of the savings.", "What amount of {money} remains?",
    ))  # fmt: skip
    steps = [
        f"In {weeks} weeks {name} saves {weeks} x {weekly} = {weeks * weekly} {money}.",
        f"With the {start} {money} from before that makes {start} + {weeks * weekly} = {total} {money}.",
        f"After the {thing} for {spent} {money}, {name} has {total} - {spent} = {total - spent} {money}.",
    ]
    return worked(
        draw,
        "budget",
        [saved, bought],
        question,
        f"{name} has {start} {money} at first.",
        steps,
        total - spent,
    )
