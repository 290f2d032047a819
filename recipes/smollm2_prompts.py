"""Make the prompts that SmolLM2's view learns from: openly licensed training sets, and chats about everyday subjects.

    python recipes/smollm2_prompts.py FOLDER OUTPUT.jsonl

FOLDER holds the training sets that docs/training.md lists. Only their prompts are used: the backbone answers them.
The records are shuffled with a fixed seed, so that any first part of the file is a sample of the whole mix.
"""

import gzip
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
STUB = (
    "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{}\n```",
    "Complete the following Python function.\n```python\n{}\n```",
    "{}",
)

SUBJECTS = """photosynthesis|inflation|the French Revolution|black holes|vaccines|the water cycle|supply and demand
machine learning|the Roman Empire|plate tectonics|compound interest|the human heart|climate change|jazz music
the Renaissance|DNA|renewable energy|the stock market|gravity|the immune system|democracy|the Silk Road|volcanoes
cooking pasta|learning a language|public speaking|time management|meditation|urban gardening|bicycle maintenance
chess|photography|budgeting for students|job interviews|remote work|healthy sleep|running a marathon|houseplants
the Industrial Revolution|impressionist painting|the periodic table|ocean currents|electric cars|solar panels
earthquakes|the moon landing|the human brain|antibiotics|coral reefs|the Great Wall of China|the Olympic Games
ancient Egypt|the printing press|coffee|bread baking|tea ceremonies|sailing|astronomy for beginners|bird watching
recycling|public libraries|artificial intelligence in medicine|self-driving cars|cryptography|the internet|databases
operating systems|sorting algorithms|recursion|version control|unit testing|web browsers|computer networks
open-source software|video games|board games|social media|online privacy|e-books|podcasts|smartphones|robots
friendship|honesty|courage|teamwork|leadership|creativity|curiosity|patience|kindness|failure|success|happiness
the seasons|rainbows|bees|whales|wolves|elephants|trees|deserts|rivers|mountains|the Amazon rainforest|penguins
the Cold War|the Great Depression|the Magna Carta|women's suffrage|the space race|the Black Death|the Vikings
Shakespeare's plays|poetry|detective novels|science fiction|fairy tales|opera|film making|the violin|the piano
yoga|swimming|football|basketball|hiking|first aid|nutrition|vitamins|stress at work|moving to a new city
small businesses|marketing|customer service|contracts|taxes|insurance|mortgages|saving for retirement|startups
probability|fractions|prime numbers|the Pythagorean theorem|statistics|calculus|geometry|Newton's laws|electricity
magnetism|sound waves|light|atoms|chemical reactions|acids and bases|evolution|ecosystems|cells|bacteria
trains|airports|bridges|skyscrapers|lighthouses|museums|markets|festivals|weddings|school uniforms|homework"""

ASKS = """Explain {} in simple terms.|What is {} and why does it matter?|Write a short essay about {}.
Give me five tips about {}.|Write a short story about {}.|Write a poem about {}.|List the advantages and
disadvantages of {}.|Imagine you are an expert on {}. Introduce the subject to a class of ten-year-olds.
Write an email to a friend in which you recommend reading about {}.|What are common misconceptions about {}?
Compare {} with {}. How are they alike, and how do they differ?|Write a dialogue between two people about {}.
Make a table with three facts about {}.|Describe the history of {}.|Write a blog post about {} with a catchy title.
Create a quiz of four questions about {}, with answers.|How would you teach {} to an adult who knows nothing about it?
Summarize what one should know about {} in three sentences.|What questions should I ask before I get into {}?
Write a product description for something related to {}.|Outline a ten-minute talk about {}.
Pretend to be a tour guide and talk about {}.|What would happen if there were no {}?
Write a letter to a newspaper about {}.|Plan a week of activities around {}."""

REWRITES = """Rewrite the following text in simpler words.|Summarize the following text in one sentence.
Correct the grammar of the following text, if it needs that.|Rewrite the following text in a formal style.
List the numbers in the following text and what each one stands for.|Turn the following text into a short poem.
Rewrite the following text as a news report.|Write three questions about the following text.
Repeat the following text, with every name replaced by another.|What is the following text about? Answer briefly."""

TALKS = """Summarize the conversation above in two sentences.|What does the user want? Answer in one sentence.
List what has been agreed on.|Rewrite the last answer so that it is more polite.
Write down the conversation's facts as JSON."""


def split(text: str) -> list[str]:
    """The entries of a list whose lines are wrapped anywhere: `|` or a line that starts with a capital ends one."""
    joined = re.sub(r"\n(?![A-Z])", " ", text) if "{}" in text or ". " in text else text
    return [entry.strip() for entry in re.split(r"[|\n]", joined) if entry.strip()]


def records(path: Path) -> Iterator[Record]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def asked(record: Record, text: str, kind: str) -> Record:
    """A record that asks one thing; its id says from what."""
    return {"source": record["source"], "id": f"{record['id']}#{kind}", "messages": [{"role": "user", "content": text}]}


def question(record: Record) -> str:
    return str(record["messages"][0]["content"])


def stub_of(record: Record) -> str | None:
    """A function's head and docstring, as benchmarks of code completion show them."""
    answer = record["messages"][1]["content"]
    found = re.match(r'```python\n((?:@.*\n|async )*def [^\n]*:\n\s+"""(?:.|\n)*?"""\n)', answer)
    return found.group(1) if found and len(found.group(1)) < 900 else None


def maths(folder: Path, draw: random.Random) -> Iterator[Record]:
    for name in ("math_gsm8k_train.jsonl.gz", "math_hendrycks_rest4500.jsonl.gz", "math_svamp.jsonl"):
        for record in records(folder / name):
            boxed = draw.random() < (0.7 if "hendrycks" in name else 0.3)
            yield asked(record, question(record) + BOXED * boxed, "boxed" if boxed else "plain")


def code(folder: Path, draw: random.Random) -> Iterator[Record]:
    for record in records(folder / "code_mbpp_train.jsonl"):
        yield asked(record, question(record), "tests")
        yield asked(record, question(record).split("\nYour code")[0], "plain")
    for record in records(folder / "code_python_stdlib_functions.jsonl.gz"):
        if (stub := stub_of(record)) is not None and draw.random() < 0.7:
            number = draw.choices(range(3), (4, 2, 4))[0]
            yield asked(record, STUB[number].format(stub), f"stub{number}")
        elif len(question(record)) < 600:
            yield asked(record, question(record), "plain")


def chats(folder: Path, draw: random.Random) -> Iterator[Record]:
    for record in records(folder / "instruct_selfinstruct_human.jsonl"):
        yield asked(record, question(record), "plain")
    subjects, asks = split(SUBJECTS), split(ASKS)
    for subject in subjects:
        for ask in asks:
            second = draw.choice([other for other in subjects if other != subject])
            source = {"source": "subjects", "id": f"{subject}/{second}" if ask.count("{}") == 2 else subject}
            yield asked(source, ask.format(*[subject, second][: ask.count("{}")]), str(asks.index(ask)))


def dialogues(folder: Path, draw: random.Random) -> Iterator[Record]:
    for record in records(folder / "dialogue_sgd.jsonl.gz"):
        messages = record["messages"]
        end = draw.randrange(1, min(len(messages), 12) + 1) // 2 * 2 + 1  # ends with a user's turn
        if draw.random() < 0.3:
            text = "\n".join(f"{'User' if m['role'] == 'user' else 'Assistant'}: {m['content']}" for m in messages[:10])
            yield asked(record, f"{text}\n\n{draw.choice(split(TALKS))}", "about")
        elif end <= len(messages):
            yield {"source": record["source"], "id": f"{record['id']}#{end}", "messages": messages[:end]}


def rewriting(folder: Path, draw: random.Random) -> Iterator[Record]:
    for record in records(folder / "math_gsm8k_train.jsonl.gz"):
        yield asked(record, f"{draw.choice(split(REWRITES))}\n\n{question(record)}", "rewrite")
    for record in records(folder / "text_python_docs_topics.jsonl"):
        for number, paragraph in enumerate(record["text"].split("\n\n")):
            if 200 < len(paragraph) < 900 and not paragraph.startswith(" "):
                yield asked(record, f"{draw.choice(split(REWRITES))}\n\n{paragraph}", f"rewrite{number}")


KINDS = {maths: 0.40, code: 0.22, chats: 0.24, rewriting: 0.08, dialogues: 0.06}
"""Shares of the first tokens of the mix; what a kind lacks at the end, the others make up for."""


def mix(folder: Path, seed: int = 0) -> list[Record]:
    """All prompts in an order whose every part has the shares of `KINDS`, as long as there are enough."""
    dated: list[tuple[float, Record]] = []
    for number, (kind, share) in enumerate(KINDS.items()):
        draw = random.Random(f"{seed}/{number}")
        found = list(kind(folder, draw))
        draw.shuffle(found)
        dated += [((place + draw.random()) / share, record) for place, record in enumerate(found)]
    return [record for _, record in sorted(dated, key=lambda pair: pair[0])]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    lines = [json.dumps(record, ensure_ascii=False) for record in mix(Path(sys.argv[1]))]
    output = Path(sys.argv[2])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")
