"""Small Python functions on numbers, words, units, records and dictionaries.

One public function per family, in the order of drawing; expected values come from plain Python, not from running the
answer.
"""

from collections.abc import Callable
from typing import Final

from orthrus.data.synthetic.draw import Draft, Draw
from orthrus.data.synthetic.function import added, collecting, compared, function, named, number_lists
from orthrus.data.synthetic.words import COLLECTIONS, KEYS, NOUNS, WORD_LISTS, WORDS


def count_where(draw: Draw) -> Draft:
    """Count the values that pass a comparison."""
    noun = named(draw, ("count", "count_some", "number_of", "how_many", "count_these", "tally"), NOUNS)
    sign, limit, meaning, words = compared(draw)
    task = draw.phrase("task")
    body = collecting("count", "0", f"value in {noun}", f"value {sign} {limit}", "count += 1")
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
    body = collecting("total", "0", f"value in {noun}", f"value {sign} {limit}", "total += value")
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
    body = collecting("total", "0", f"number in range(1, {letter} + 1)", f"number % {k} == 0", "total += number")
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


def pick_word(draw: Draw) -> Draft:
    """The longest or shortest word of a list."""
    which = draw.choice("which", ("longest", "shortest"))
    noun = named(
        draw, (which, f"find_{which}", f"get_{which}", f"{which}_of", f"pick_{which}", f"{which}_in"), WORD_LISTS
    )
    words = draw.choices("w", 3, WORDS)
    while len(set(map(len, words))) < 3:
        words = draw.choices("w", 3, WORDS)
    task = draw.phrase("task")
    chosen, sign = (max, ">") if which == "longest" else (min, "<")
    body = collecting("best", f"{noun}[0]", f"text in {noun}", f"len(text) {sign} len(best)", "best = text")
    examples = [([given], chosen(given, key=len)) for given in (words, words[::-1], ["a", "bb", "ccc", "bb"])]
    return function(draw, task, doc=f"Return the {which} of the {noun}.", body=body, examples=examples)


def words_by_letter(draw: Draw) -> Draft:
    """Keep the words of some length or with some first letter."""
    noun = named(draw, ("keep", "filter", "select", "pick", "choose", "get"), WORD_LISTS)
    letter, words = draw.choice("letter", "abcdefghiklmoprstw"), draw.choices("w", 3, WORDS)
    draw.slots["place"] = side = draw.choice("where", ("start", "end"))
    task = draw.phrase("task")
    body = collecting("result", "[]", f"text in {noun}", f'text.{side}swith("{letter}")', "result.append(text)")
    passes: Callable[[str], bool] = (
        (lambda text: text[:1] == letter) if side == "start" else (lambda text: text[-1:] == letter)
    )
    lists = [words, [f"{letter}ab", f"ba{letter}", letter, "q"], []]
    examples = [([given], [text for text in given if passes(text)]) for given in lists]
    doc = f'Return the {noun} that {side} with "{letter}".'
    return function(draw, task, doc=doc, body=body, examples=examples)


def tally(draw: Draw) -> Draft:
    """Count how often each value occurs, in a dictionary."""
    noun = named(
        draw,
        ("count", "tally", "group", "count_all", "histogram_of", "frequency_of"),
        (*WORD_LISTS, "votes", "orders", "items"),
    )
    words, result = (
        draw.choices("w", 2, WORDS),
        draw.choice("result", ("counts", "tally", "totals", "result", "seen")),
    )
    given = [words[0], words[1], words[0]] if draw.choice("order", ("aba", "abb")) == "aba" else [*words, words[1]]
    task = draw.phrase("task")
    body = [
        f"{result} = {{}}",
        f"for value in {noun}:",
        f"    {result}[value] = {result}.get(value, 0) + 1",
        f"return {result}",
    ]
    examples = [
        ([values], {value: values.count(value) for value in values}) for values in (given, [], ["x", "y", "x", "x"])
    ]
    return function(draw, task, doc=f"Count how often each of the {noun} occurs.", body=body, examples=examples)


def join_text(draw: Draw) -> Draft:
    """Build one string with a separator and brackets."""
    noun = named(draw, ("join", "format", "show", "print_out", "combine", "render"), WORD_LISTS)
    separator = draw.choice("separator", (", ", " - ", "; ", " / ", " + ", "|", ":", " and ", " or ", "."))
    left, right = draw.choice("brackets", ("[ ]", "( )", "< >", "* *", "# #", "= =", "{ }")).split()
    draw.slots |= {"left": left, "right": right}
    words = draw.choices("w", 3, WORDS)
    task = draw.phrase("task")
    body = [f'joined = "{separator}".join({noun})', f'return "{left}" + joined + "{right}"']
    examples = [([given], left + separator.join(given) + right) for given in (words, words[:1], ["x", "y"])]
    doc = f"Join the {noun} into one string in brackets."
    return function(draw, task, doc=doc, body=body, examples=examples)


_UNITS: Final = {
    ("weeks", "days"): 7, ("days", "hours"): 24, ("hours", "minutes"): 60, ("minutes", "seconds"): 60,
    ("years", "months"): 12, ("feet", "inches"): 12, ("yards", "feet"): 3, ("metres", "centimetres"): 100,
    ("kilometres", "metres"): 1000, ("dozens", "pieces"): 12, ("kilograms", "grams"): 1000, ("euros", "cents"): 100,
}  # fmt: skip


def convert(draw: Draw) -> Draft:
    """A larger and a smaller unit, all in the smaller."""
    pairs = {f"{large} {small}": factor for (large, small), factor in _UNITS.items()}
    pair = draw.choice("pair", tuple(pairs))
    (large, small), factor = pair.split(), pairs[pair]
    verb = draw.choice("verb", ("to", "convert_to", "total", "all_in", "into", "as"))
    draw.slots |= {"large": large, "small": small, "f": f"{verb}_{small}", "params": f"{large}, {small}"}
    n, extra = draw.number("n", 1, 9), draw.number("extra", 1, 30)
    task = draw.phrase("task")
    body = [f"return {factor} * {large} + {small}"]
    calls = [(n, extra), (0, 5), tuple(draw.unseen(2, 1, 50))]
    examples = [(call, factor * call[0] + call[1]) for call in calls]
    doc = f"Return the number of {small} in {large} and {small}."
    return function(draw, task, doc=doc, body=body, examples=examples)


def best_record(draw: Draw) -> Draft:
    """The name of the record with the largest or smallest value under a key."""
    which = draw.choice("which", ("highest", "lowest"))
    noun = named(
        draw, (which, f"find_{which}", f"get_{which}", f"name_of_{which}", f"{which}_of", f"{which}_in"), COLLECTIONS
    )
    key, names = draw.choice("key", KEYS), draw.choices("w", 2, WORDS)
    values = draw.numbers("v", 2, 1, 99)
    task = draw.phrase("task")
    chosen, word = (max, "max") if which == "highest" else (min, "min")
    body = [f'best = {word}({noun}, key=lambda record: record["{key}"])', 'return best["name"]']
    shown: list[dict[str, str | int]] = [{"name": name, key: value} for name, value in zip(names, values, strict=True)]
    hidden: list[dict[str, str | int]] = [{"name": name, key: index} for index, name in enumerate(("b", "a", "c"))]
    examples = [
        ([records], chosen(records, key=lambda record: int(record[key]))["name"]) for records in (shown, hidden)
    ]
    doc = f"Return the name of the one with the {which} {key}."
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


def dictionary_where(draw: Draw) -> Draft:
    """The keys of a dictionary whose values pass a comparison."""
    noun = named(draw, ("keys", "names", "keep", "select", "list", "find"), NOUNS)
    sign, limit, meaning, words = compared(draw)
    names, values = draw.choices("w", 3, WORDS), draw.numbers("v", 3, max(1, limit - 20), limit + 20)
    task = draw.phrase("task")
    body = collecting("result", "[]", f"key, value in {noun}.items()", f"value {sign} {limit}", "result.append(key)")
    mappings = [dict(zip(names, values, strict=True)), {"a": limit, "b": limit + 1, "c": limit - 1}, {}]
    examples = [([mapping], [key for key, value in mapping.items() if meaning(value, limit)]) for mapping in mappings]
    doc = f"Return the keys whose value is {words}."
    return function(draw, task, doc=doc, body=body, examples=examples)
