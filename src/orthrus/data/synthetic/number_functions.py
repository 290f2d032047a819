"""Small Python functions on numbers and lists of numbers.

One function per family; expected values come from plain Python, not from running the answer.
"""

from orthrus.data.synthetic.draw import Draft, Draw
from orthrus.data.synthetic.function import added, compared, function, named, number_lists
from orthrus.data.synthetic.words import NOUNS


def count_where(draw: Draw) -> Draft:
    """Count the values that pass a comparison."""
    noun = named(draw, ("count", "count_some", "number_of", "how_many", "count_these", "tally"), NOUNS)
    sign, limit, meaning, words = compared(draw)
    task = draw.phrase("task")
    body = [
        "count = 0",
        f"for value in {noun}:",
        f"    if value {sign} {limit}:",
        "        count += 1",
        "return count",
    ]
    lists = number_lists(draw, limit)
    examples = [([values], sum(meaning(value, limit) for value in values)) for values in lists]
    working = f"it counts {[value for value in lists[0] if meaning(value, limit)]}, so "
    return function(
        draw, task, doc=f"Count the {noun} that are {words}.", body=body, examples=examples, working=working
    )


def keep_where(draw: Draw) -> Draft:
    """Keep the values that pass a comparison."""
    noun = named(draw, ("keep", "filter", "select", "pick", "choose", "retain"), NOUNS)
    sign, limit, meaning, words = compared(draw)
    task = draw.phrase("task")
    body = [f"return [value for value in {noun} if value {sign} {limit}]"]
    examples = [
        ([values], [value for value in values if meaning(value, limit)]) for values in number_lists(draw, limit)
    ]
    return function(draw, task, doc=f"Return the {noun} that are {words}.", body=body, examples=examples)


def sum_where(draw: Draw) -> Draft:
    """Add up the values that pass a comparison."""
    noun = named(draw, ("sum", "add", "total", "add_up", "sum_some", "total_of"), NOUNS)
    sign, limit, meaning, words = compared(draw)
    task = draw.phrase("task")
    body = [
        "total = 0",
        f"for value in {noun}:",
        f"    if value {sign} {limit}:",
        "        total += value",
        "return total",
    ]
    lists = number_lists(draw, limit)
    examples = [([values], sum(value for value in values if meaning(value, limit))) for values in lists]
    working = added([value for value in lists[0] if meaning(value, limit)])
    return function(
        draw, task, doc=f"Add up the {noun} that are {words}.", body=body, examples=examples, working=working
    )


def first_where(draw: Draw) -> Draft:
    """The position of the first value that passes a comparison."""
    noun = named(draw, ("find", "first", "locate", "find_in", "search", "index_of"), NOUNS)
    sign, limit, meaning, words = compared(draw)
    task = draw.phrase("task")
    body = [
        f"for index, value in enumerate({noun}):",
        f"    if value {sign} {limit}:",
        "        return index",
        "return None",
    ]
    examples = [
        ([values], next((index for index, value in enumerate(values) if meaning(value, limit)), None))
        for values in number_lists(draw, limit)
    ]
    doc = f"Return the index of the first value that is {words}."
    return function(draw, task, doc=doc, body=body, examples=examples)


def sum_multiples(draw: Draw) -> Draft:
    """A loop over a range with a divisibility test."""
    named(draw, ("sum", "add", "total", "add_up", "sum_all", "collect"), ("multiples", "numbers", "terms", "range"))
    draw.slots["params"] = letter = draw.choice("letter", ("n", "end", "limit", "top", "last", "stop"))
    k = draw.number("k", 2, 12)
    task = draw.phrase("task")
    body = [
        "total = 0", f"for number in range(1, {letter} + 1):", f"    if number % {k} == 0:",
        "        total += number", "return total",
    ]  # fmt: skip
    ends = [draw.number("end", k, 3 * k + k - 1), *draw.unseen(2, 1, 90)]
    examples = [([end], sum(range(k, end + 1, k))) for end in ends]
    working = added(list(range(k, ends[0] + 1, k)))
    doc = f"Return the sum of the multiples of {k} up to {letter}."
    return function(draw, task, doc=doc, body=body, examples=examples, working=working)


def first_multiples(draw: Draw) -> Draft:
    """A list of multiples after an offset."""
    named(draw, ("list", "first", "make", "build", "get", "give"), ("multiples", "steps", "terms", "series", "table"))
    draw.slots["params"] = letter = draw.choice("letter", ("n", "count", "size", "amount", "length", "many"))
    k, start = draw.number("k", 2, 12), draw.number("start", 1, 30)
    task = draw.phrase("task")
    body = [f"return [{start} + {k} * index for index in range({letter})]"]
    counts = [draw.number("end", 2, 5), 0, *draw.unseen(1, 1, 12)]
    examples = [([count], [start + k * index for index in range(count)]) for count in counts]
    doc = f"Return {letter} numbers from {start} in steps of {k}."
    return function(draw, task, doc=doc, body=body, examples=examples)


def clamp(draw: Draw) -> Draft:
    """Bring a value between two limits."""
    noun = named(
        draw, ("clamp", "limit", "bound", "cap", "restrict", "keep"), tuple(noun.removesuffix("s") for noun in NOUNS)
    )
    low = draw.number("low", 0, 30)
    high = draw.number("high", low + 2, low + 60)
    task = draw.phrase("task")
    body = [
        f"if {noun} < {low}:",
        f"    return {low}",
        f"if {noun} > {high}:",
        f"    return {high}",
        f"return {noun}",
    ]
    values = [draw.number("v", 0, high + 20), low - 1, high + 1, *draw.unseen(1, low, high)]
    examples = [([value], min(max(value, low), high)) for value in values]
    doc = f"Return {noun} limited to the range {low} to {high}."
    return function(draw, task, doc=doc, body=body, examples=examples)


def rescale(draw: Draw) -> Draft:
    """Multiply every value and shift it."""
    noun = named(draw, ("scale", "change", "update", "adjust", "convert", "map"), NOUNS)
    a, b = draw.number("a", 2, 9), draw.number("b", 1, 9)
    task = draw.phrase("task")
    body = ["result = []", f"for value in {noun}:", f"    result.append({a} * value + {b})", "return result"]
    lists = [draw.numbers("v", 3, 1, 10), draw.unseen(4, 0, 90), []]
    examples = [([values], [a * value + b for value in values]) for values in lists]
    doc = f"Multiply each of the {noun} by {a} and add {b}."
    return function(draw, task, doc=doc, body=body, examples=examples)


def discount(draw: Draw) -> Draft:
    """A reduction or a fee on one side of a limit."""
    noun = named(
        draw, ("final", "adjusted", "new", "actual", "checked", "real"), tuple(noun.removesuffix("s") for noun in NOUNS)
    )
    sign, limit, meaning, words = compared(draw)
    operation, by = draw.choice("way", ("minus", "plus")), draw.number("by", 1, 20)
    task = draw.phrase("task")
    step, symbol = (-by, "-") if operation == "minus" else (by, "+")
    body = [f"if {noun} {sign} {limit}:", f"    return {noun} {symbol} {by}", f"return {noun}"]
    values = [draw.number("v", max(1, limit - 20), limit + 20), limit, limit + 1, limit - 1]
    examples = [([value], value + step if meaning(value, limit) else value) for value in values]
    doc = f"Return {noun} {operation} {by} if it is {words}, else {noun}."
    return function(draw, task, doc=doc, body=body, examples=examples)
