"""The generator of problems: purity, disjoint splits, right answers judged right and wrong ones wrong."""

import json
import re
from collections import Counter
from functools import cache
from hashlib import sha256
from typing import Any

import pytest

from orthrus.data.synthetic import DOMAINS, Domain, Problem, Split, draft, is_right, problem, problems
from orthrus.data.synthetic.draw import Draw, with_articles
from orthrus.errors import DataError

SPLITS: tuple[Split, ...] = ("train", "heldout", "phrasing")


drawn_of = cache(draft.drawn)


def drawn(domain: Domain, split: Split, count: int) -> list[Draw]:
    return [drawn_of(domain, index, split, 0)[0] for index in range(count)]


def defined(text: str) -> dict[str, Any]:
    """The names that the first Python block of the text defines, run here: only for our own answers."""
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    exec(found.group(1), names)
    return names


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("split", SPLITS)
def test_a_problem_is_a_function_of_its_arguments(domain: Domain, split: Split) -> None:
    """The same arguments give the same problem in any order; another index or seed gives another."""
    forwards = [problem(domain, index, split=split, seed=3) for index in range(40)]
    backwards = [problem(domain, index, split=split, seed=3) for index in reversed(range(40))]
    assert forwards == backwards[::-1]
    assert len({made.prompt for made in forwards}) == 40
    assert problem(domain, 0, split=split, seed=4).prompt != forwards[0].prompt


def test_texts_stay_what_models_were_trained_on() -> None:
    """A pinned digest: any change of the texts, even of the drawing order, must be made knowingly."""
    made = problem("maths", 12)
    assert made.id == "synthetic/maths/train/12"
    assert made.kind == "maths.equation"
    assert made.prompt == "For which m is 4m + 10 = 38? Work it out step by step."
    assert made.answer.splitlines()[1] == "Step 1: Subtract 10 on both sides: 4m = 38 - 10 = 28."
    assert made.check == ("7",)
    texts = [each.prompt + each.answer for split in SPLITS for each in problems(120, split=split)]
    assert sha256("\0".join(texts).encode()).hexdigest()[:16] == "716cf622678d89cb"


def test_problems_take_the_domains_in_turn() -> None:
    """Round robin over the chosen domains, each with its own running index."""
    made = list(problems(6, split="heldout", domains=("json", "maths")))
    assert made == [problem(domain, index, split="heldout") for index in range(3) for domain in ("json", "maths")]


def test_messages_are_one_turn() -> None:
    """Prompt and answer, as the user's and the assistant's message."""
    made = problem("table", 1)
    assert made.messages == [
        {"role": "user", "content": made.prompt},
        {"role": "assistant", "content": made.answer},
    ]


@pytest.mark.parametrize("domain", DOMAINS)
def test_combinations_are_disjoint_by_their_hash(domain: Domain) -> None:
    """Every training draw is on one side of the rule and every other draw on the other side."""
    for split in SPLITS:
        for index in range(200):
            draw, _ = drawn_of(domain, index, split, 0)
            assert draw.held_out() == (split != "train")


@pytest.mark.parametrize("domain", DOMAINS)
def test_observed_prompts_and_slots_are_disjoint(domain: Domain) -> None:
    """No held-out prompt, and no held-out combination in whatever phrasing, occurs in training."""
    seen = {split: drawn(domain, split, 800 if split == "train" else 400) for split in SPLITS}
    slots = {split: {str(sorted(draw.slots.items())) for draw in draws} for split, draws in seen.items()}
    prompts = {split: {drawn_of(domain, index, split, 0)[1].prompt for index in range(400)} for split in SPLITS}
    for split in ("heldout", "phrasing"):
        assert not slots["train"] & slots[split]
        assert not prompts["train"] & prompts[split]


def test_training_lacks_whole_pairs_and_number_tuples() -> None:
    """A held-out pair of words, or tuple of numbers, puts any combination around it on the held-out side."""
    draw = Draw("maths.change", "train", key="any")
    sides: dict[bool, set[str]] = {True: set(), False: set()}
    for thing in ("apple", "ball", "cap", "drum", "egg", "fan", "hat", "jar", "kite", "lamp", "map", "nut"):
        verdicts = set()
        for number in range(200):
            draw.slots = {"name": "Ada", "thing": thing, "n": number, "p": 3}
            verdicts.add(draw.held_out())
        sides[verdicts == {True}].add(thing)
    assert sides[True]
    assert sides[False]
    by_numbers: dict[int, set[bool]] = {number: set() for number in range(40)}
    for number, verdicts in by_numbers.items():
        for thing in sides[False]:
            draw.slots = {"name": "Ada", "thing": thing, "n": number, "p": 3}
            verdicts.add(draw.held_out())
    assert {True} in by_numbers.values()


@pytest.mark.parametrize("domain", DOMAINS)
def test_phrasings_are_disjoint(domain: Domain) -> None:
    """Training and held-out problems share their phrasings; the phrasing split uses none of them."""
    used = {split: {phrasing for draw in drawn(domain, split, 800) for phrasing in draw.phrasings} for split in SPLITS}
    assert used["phrasing"]
    assert not used["phrasing"] & (used["train"] | used["heldout"])
    assert used["heldout"] == used["train"]


@pytest.mark.parametrize("domain", [domain for domain in DOMAINS if domain != "code"])
@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_right(domain: Domain, split: Split) -> None:
    """Every generated answer passes its own problem's check."""
    for index in range(300):
        made = problem(domain, index, split=split)
        assert is_right(made, made.answer), made


@pytest.mark.parametrize("split", SPLITS)
def test_functions_pass_their_assertions_and_examples(split: Split) -> None:
    """Every function does what its assertions say, run in this process; the told example is the first."""
    for index in range(160):
        made = problem("code", index, split=split)
        names = defined(made.answer)
        for assertion in made.check:
            exec(assertion, names)
        told = made.answer.rsplit("returns ", 1)[-1].rstrip(".")
        assert made.check[0].endswith(f"== {told}")


def test_some_functions_are_judged_in_a_process_of_their_own() -> None:
    """`is_right` for code: right answers, a changed one, none, one that fails, and one that only exits."""
    for index in (0, 6, 14):
        made = problem("code", index)
        assert is_right(made, made.answer)
    assert not is_right(made, made.answer.replace("return ", "return not "))
    assert not is_right(made, "No block here.")
    assert not is_right(made, "```python\nraise SystemExit(0)\n```")


def test_steps_are_true() -> None:
    """All sides of every equation in a worked step are equal, and the final number stands in one."""
    number_chain = re.compile(r"\d+(?: [x+/-] \d+)*(?: = \d+(?: [x+/-] \d+)*)+")
    for index in range(600):
        made = problem("maths", index)
        steps = "\n".join(line for line in made.answer.splitlines() if line.startswith("Step"))
        chains = [chain.split(" = ") for chain in number_chain.findall(steps)]
        assert made.check[0] in (chain[-1] for chain in chains), made
        for chain in chains:
            assert len({eval(side.replace("x", "*")) for side in chain}) == 1, made


def test_articles_fit() -> None:
    """`an` stands before a drawn word that begins with a vowel's sound, and only there."""
    words = {"first": "onion", "second": "pear", "third": "hour"}
    assert with_articles("A {first}, a {second} and a {third}.", words).format_map(words) == (
        "An onion, a pear and an hour."
    )


def corrupted(made: Problem) -> str:
    """The answer with its last digit (maths), a cell (table) or a value (json) changed."""
    if made.domain == "maths":
        return made.answer.replace(f"answer is {made.check[0]}", f"answer is {int(made.check[0]) + 1}")
    if made.domain == "table":
        return made.answer[:-2] + "9 |"
    value = json.loads(made.check[0])
    key = sorted(value)[0]
    return f"```json\n{json.dumps(value | {key: 'other'})}\n```"


@pytest.mark.parametrize("domain", ["maths", "table", "json"])
def test_corrupted_answers_are_not_right(domain: Domain) -> None:
    """A wrong number, cell or value, a cut answer and an empty one are all wrong."""
    for index in range(60):
        made = problem(domain, index)
        assert not is_right(made, corrupted(made)), made
        assert not is_right(made, made.answer[: len(made.answer) // 2])
        assert not is_right(made, "")


def test_layout_does_not_matter() -> None:
    """Spaces in table cells and the order of JSON keys do not make an answer wrong; row order does."""
    table = problem("table", 0)
    assert is_right(table, table.answer.replace(" | ", "|").replace("| ", "|   "))
    lines = table.answer.splitlines()
    assert not is_right(table, "\n".join([*lines[:-2], lines[-1], lines[-2]]))
    order = problem("json", 0)
    value = dict(reversed(json.loads(order.check[0]).items()))
    assert is_right(order, f"```json\n{json.dumps(value)}\n```")


@pytest.mark.parametrize("text", ["```json\n{\n```", "```json\n" + "[" * 100_000 + "\n```", "```json\n```"])
def test_broken_json_is_not_right(text: str) -> None:
    """Text that is no JSON, or nests without end, is a wrong answer and no error."""
    assert not is_right(problem("json", 0), text)


def test_families_and_lengths() -> None:
    """At least twelve families of maths and of code, five of the others; answers of 100 to 500 letters."""
    made = list(problems(800))
    kinds = Counter(kind.split(".")[0] for kind in {each.kind for each in made})
    assert kinds["maths"] >= 12
    assert kinds["code"] >= 12
    assert min(kinds["table"], kinds["json"]) >= 5
    assert all(100 <= len(each.answer) <= 500 for each in made)
    assert not any(re.search(r"[{}]", each.prompt + each.answer) for each in made if each.domain == "maths")


def test_unknown_names_are_refused() -> None:
    """A domain or a split that does not exist is an error that names the ones that do."""
    with pytest.raises(DataError, match="maths, code, table, json"):
        problem("poetry", 0)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="train, heldout or phrasing"):
        problem("maths", 0, split="test")  # type: ignore[arg-type]
