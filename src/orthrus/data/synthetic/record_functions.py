"""Small Python functions on words, units, records and dictionaries.

One function per family; expected values come from plain Python, not from running the answer.
"""

from collections.abc import Callable
from typing import Final

from orthrus.data.synthetic.draw import Draft, Draw
from orthrus.data.synthetic.function import compared, function, named
from orthrus.data.synthetic.words import COLLECTIONS, KEYS, NOUNS, WORD_LISTS, WORDS


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
    body = [
        f"best = {noun}[0]",
        f"for text in {noun}:",
        f"    if len(text) {sign} len(best):",
        "        best = text",
        "return best",
    ]
    examples = [([given], chosen(given, key=len)) for given in (words, words[::-1], ["a", "bb", "ccc", "bb"])]
    return function(draw, task, doc=f"Return the {which} of the {noun}.", body=body, examples=examples)


def words_by_letter(draw: Draw) -> Draft:
    """Keep the words of some length or with some first letter."""
    noun = named(draw, ("keep", "filter", "select", "pick", "choose", "get"), WORD_LISTS)
    letter, words = draw.choice("letter", "abcdefghiklmoprstw"), draw.choices("w", 3, WORDS)
    draw.slots["place"] = side = draw.choice("where", ("start", "end"))
    task = draw.phrase("task")
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


def dictionary_where(draw: Draw) -> Draft:
    """The keys of a dictionary whose values pass a comparison."""
    noun = named(draw, ("keys", "names", "keep", "select", "list", "find"), NOUNS)
    sign, limit, meaning, words = compared(draw)
    names, values = draw.choices("w", 3, WORDS), draw.numbers("v", 3, max(1, limit - 20), limit + 20)
    task = draw.phrase("task")
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
    return function(draw, task, doc=doc, body=body, examples=examples)
