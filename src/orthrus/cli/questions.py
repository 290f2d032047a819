"""What `orthrus demo` asks an assistant: everyday questions, one of each kind that drafts do well or badly on."""

from dataclasses import dataclass
from itertools import cycle, islice
from typing import Final


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question and its kind."""

    kind: str
    prompt: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """The question as a chat."""
        return [{"role": "user", "content": self.prompt}]


QUESTIONS: Final = (
    Question(
        kind="arithmetic",
        prompt="A baker makes 24 rolls every morning. She sells 17 of them for 2 dollars each and gives the rest away. "
        "How much does she earn in a week, and how many rolls does she give away?",
    ),
    Question(
        kind="function",
        prompt="Write a Python function `is_palindrome(text)` that ignores spaces and capital letters, with a "
        "docstring and two examples.",
    ),
    Question(
        kind="rewrite",
        prompt="Rewrite this politely: Send me the report by Friday. The last one was full of mistakes, and I had to "
        "do half of the work again.",
    ),
    Question(
        kind="table",
        prompt="Make a table of the planets Mercury, Venus, Earth and Mars with the columns name, place from the sun "
        "and number of moons.",
    ),
    Question(kind="chat", prompt="I have a free Sunday and it is raining. What could I do with two children?"),
)


def questions(count: int) -> list[Question]:
    """So many questions, over and over."""
    return list(islice(cycle(QUESTIONS), count))
