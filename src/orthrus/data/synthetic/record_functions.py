"""Small Python functions on words, units, records and dictionaries.

One function here a family; expected values come from plain Python, not from running the answer.
"""

# ruff: noqa: E501 - a phrasing stays on one line, so that it can be read and counted

from collections.abc import Callable
from typing import Final

from orthrus.data.synthetic.draw import Draft, Draw
from orthrus.data.synthetic.function import NOUNS, WORD_LISTS, WORDS, compared, function, named

_KEYS: Final = (
    "age", "cost", "height", "level", "price", "rank",
    "score", "size", "speed", "stock", "weight", "year",
)  # fmt: skip


def pick_word(draw: Draw) -> Draft:
    """The longest or shortest word of a list."""
    which = draw.choice("which", ("longest", "shortest"))
    noun = named(
        draw,
        (which, f"find_{which}", f"get_{which}", f"{which}_of", f"pick_{which}", f"{which}_in"),
        WORD_LISTS,
    )
    words = draw.choices("w", 3, WORDS)
    while len(set(map(len, words))) < 3:
        words = draw.choices("w", 3, WORDS)
    task = draw.phrase((
        "returns the {which} of the {noun}", "finds the {which} string in the list {noun}", "takes a list {noun} and returns the {which} one",
        "gives back the {which} element of {noun}", "searches {noun} for its {which} string", "picks the {which} one out of the {noun}",
    ))  # fmt: skip
    chosen, sign = (max, ">") if which == "longest" else (min, "<")
    body = [
        f"best = {noun}[0]",
        f"for text in {noun}:",
        f"    if len(text) {sign} len(best):",
        "        best = text",
        "return best",
    ]
    examples = [([given], chosen(given, key=len)) for given in (words, words[::-1], ["a", "bb", "ccc", "bb"])]
    return function(draw, "pick_word", task, doc=f"Return the {which} of the {noun}.", body=body, examples=examples)


def words_by_length(draw: Draw) -> Draft:
    """Keep the words of some length or with some first letter."""
    noun = named(draw, ("keep", "filter", "select", "pick", "choose", "get"), WORD_LISTS)
    letter, words = draw.choice("letter", "abcdefghiklmoprstw"), draw.choices("w", 3, WORDS)
    draw.slots["place"] = side = draw.choice("where", ("start", "end"))
    task = draw.phrase((
        'returns the {noun} that {place} with "{letter}"', 'keeps only those {noun} that {place} with the letter "{letter}"',
        'takes a list {noun} and returns all that {place} with "{letter}"', 'selects the strings in {noun} that {place} with "{letter}"',
        'makes a list of all {noun} that {place} with the character "{letter}"', 'filters the {noun} to those that {place} with "{letter}"',
    ))  # fmt: skip
    method = f"{side}swith"
    body = [
        "result = []",
        f"for text in {noun}:",
        f'    if text.{method}("{letter}"):',
        "        result.append(text)",
        "return result",
    ]
    passes: Callable[[str], bool] = (
        (lambda text: text[:1] == letter) if side == "start" else (lambda text: text[-1:] == letter)
    )
    lists = [words, [f"{letter}ab", f"ba{letter}", letter, "q"], []]
    examples = [([given], [text for text in given if passes(text)]) for given in lists]
    doc = f'Return the {noun} that {side} with "{letter}".'
    return function(draw, "words_by_letter", task, doc=doc, body=body, examples=examples)


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
    task = draw.phrase((
        "counts how often each of the {noun} occurs, in a dictionary `{result}`", "returns a dictionary `{result}` with the count of each of the {noun}",
        "builds a dictionary `{result}` from each of the {noun} to its number of occurrences",
        "takes a list {noun} and counts every different value in a dictionary `{result}`",
        "tells with a dictionary `{result}` how many times each value appears in {noun}",
        "maps each value in {noun} to how many times it occurs, using a dictionary `{result}`",
    ))  # fmt: skip
    body = [
        f"{result} = {{}}",
        f"for value in {noun}:",
        f"    {result}[value] = {result}.get(value, 0) + 1",
        f"return {result}",
    ]
    examples = [
        ([values], {value: values.count(value) for value in values}) for values in (given, [], ["x", "y", "x", "x"])
    ]
    return function(
        draw, "tally", task, doc=f"Count how often each of the {noun} occurs.", body=body, examples=examples
    )


def join_text(draw: Draw) -> Draft:
    """Build one string with a separator and brackets."""
    noun = named(draw, ("join", "format", "show", "print_out", "combine", "render"), WORD_LISTS)
    separator = draw.choice("separator", (", ", " - ", "; ", " / ", " + ", "|", ":", " and ", " or ", "."))
    left, right = draw.choice("brackets", ("[ ]", "( )", "< >", "* *", "# #", "= =", "{ }")).split()
    draw.slots |= {"left": left, "right": right}
    words = draw.choices("w", 3, WORDS)
    task = draw.phrase((
        'joins the {noun} with "{separator}" and puts "{left}" before and "{right}" after the result',
        'returns one string: "{left}", then the {noun} with "{separator}" between them, then "{right}"',
        'combines the list {noun} into a string with "{separator}" between the parts, "{left}" in front and "{right}" at the end',
        'glues the {noun} together using "{separator}" and encloses them in "{left}" and "{right}"',
        'makes a text that opens with "{left}", has all {noun} parted by "{separator}" and closes with "{right}"',
        'writes the {noun} as one string, separated by "{separator}" and wrapped in "{left}" and "{right}"',
    ))  # fmt: skip
    body = [f'joined = "{separator}".join({noun})', f'return "{left}" + joined + "{right}"']
    examples = [([given], left + separator.join(given) + right) for given in (words, words[:1], ["x", "y"])]
    doc = f"Join the {noun} into one string in brackets."
    return function(draw, "join_text", task, doc=doc, body=body, examples=examples)


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
    task = draw.phrase((
        "converts {large} and {small} to {small}", "returns the total number of {small} in the given {large} and {small}",
        "takes {large} and {small} and returns everything in {small}", "turns {large} and some more {small} into {small} only",
        "expresses {large} plus {small} as one number of {small}", "computes how many {small} the {large} and {small} are together",
    ))  # fmt: skip
    body = [f"return {factor} * {large} + {small}"]
    calls = [(n, extra), (0, 5), tuple(draw.unseen(2, 1, 50))]
    examples = [(call, factor * call[0] + call[1]) for call in calls]
    doc = f"Return the number of {small} in {large} and {small}."
    return function(draw, "convert", task, doc=doc, body=body, examples=examples)


def best_record(draw: Draw) -> Draft:
    """The name of the record with the largest or smallest value under a key."""
    which = draw.choice("which", ("highest", "lowest"))
    noun = named(
        draw,
        (which, f"find_{which}", f"get_{which}", f"name_of_{which}", f"{which}_of", f"{which}_in"),
        (
            "animals",
            "books",
            "boats",
            "cars",
            "cities",
            "games",
            "items",
            "players",
            "plants",
            "rooms",
            "shops",
            "teams",
            "tools",
        ),
    )
    key, names = draw.choice("key", _KEYS), draw.choices("w", 2, WORDS)
    values = draw.numbers("v", 2, 1, 99)
    task = draw.phrase((
        'returns the "name" of the one with the {which} "{key}" in a list of dictionaries {noun}',
        'gets a list of dictionaries {noun} and returns the "name" of the one with the {which} "{key}"',
        'finds the dictionary with the {which} "{key}" in {noun} and returns its "name"',
        'gives the "name" of whichever of the {noun} has the {which} "{key}", each being a dictionary',
        'looks at the "{key}" of every dictionary in {noun} and answers with the "name" where it is {which}',
        'picks from the dictionaries {noun} the one whose "{key}" is {which} and returns its "name"',
    ))  # fmt: skip
    chosen, word = (max, "max") if which == "highest" else (min, "min")
    body = [f'best = {word}({noun}, key=lambda record: record["{key}"])', 'return best["name"]']
    shown: list[dict[str, str | int]] = [{"name": name, key: value} for name, value in zip(names, values, strict=True)]
    hidden: list[dict[str, str | int]] = [{"name": name, key: index} for index, name in enumerate(("b", "a", "c"))]
    examples = [
        ([records], chosen(records, key=lambda record: int(record[key]))["name"]) for records in (shown, hidden)
    ]
    doc = f"Return the name of the one with the {which} {key}."
    return function(draw, "best_record", task, doc=doc, body=body, examples=examples)


def dictionary_where(draw: Draw) -> Draft:
    """The keys of a dictionary whose values pass a comparison."""
    noun = named(draw, ("keys", "names", "keep", "select", "list", "find"), NOUNS)
    sign, limit, meaning, words = compared(draw)
    names, values = draw.choices("w", 3, WORDS), draw.numbers("v", 3, max(1, limit - 20), limit + 20)
    task = draw.phrase((
        "returns the keys of the dictionary {noun} whose values are {test}", "lists the names in the dictionary {noun} with a value {test}",
        "takes a dictionary {noun} and returns a list of the keys with values {test}", "gives a list of all keys in {noun} whose value is {test}",
        "collects each key that the dictionary {noun} maps to a value {test}", "finds the keys in the dictionary {noun} that have a value {test}",
    ))  # fmt: skip
    body = [
        "result = []",
        f"for key, value in {noun}.items():",
        f"    if value {sign} {limit}:",
        "        result.append(key)",
        "return result",
    ]
    mappings = [dict(zip(names, values, strict=True)), {"a": limit, "b": limit + 1, "c": limit - 1}, {}]
    examples = [([mapping], [key for key, value in mapping.items() if meaning(value, limit)]) for mapping in mappings]
    doc = f"Return the keys whose value is {words}."
    return function(draw, "dictionary_where", task, doc=doc, body=body, examples=examples)
