"""Problems with worked answers, made from a seed: word problems, small functions, tables and JSON.

Families of templates are filled with drawn names, things and numbers, and answers are computed.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from orthrus.data.synthetic.draft import drawn
from orthrus.data.synthetic.draw import DOMAINS, FAMILIES, Domain, Split
from orthrus.errors import DataError

__all__ = ["DOMAINS", "FAMILIES", "Domain", "Problem", "Split", "is_right", "problem", "problems"]

_CODE_SECONDS: Final = 5.0
_ALL_PASSED: Final = 43  # an exit code that Python itself does not use


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A question, its worked answer and what makes an answer right.

    `check` holds the final number (maths), assertions in Python (code), the rows of the table (table) or
    the canonical JSON text (json).
    """

    id: str
    domain: Domain
    kind: str
    prompt: str
    answer: str
    check: tuple[str, ...]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The problem as a chat of one turn."""
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.answer}]


def problem(domain: Domain, index: int, *, split: Split = "train", seed: int = 0) -> Problem:
    """The problem of that number: a pure function of its arguments.

    `train` and `heldout` share families and phrasings but no combination of slot values; `phrasing` has held-out
    combinations in phrasings of its own. Raises `DataError` for an unknown domain or split.
    """
    if domain not in DOMAINS:
        raise DataError(f"a domain must be one of {', '.join(DOMAINS)}; found {domain!r}: choose one of those")
    if split not in ("train", "heldout", "phrasing"):
        raise DataError(f"a split must be train, heldout or phrasing; found {split!r}: choose one of those")
    draw, draft = drawn(domain, index, split, seed)
    return Problem(
        id=f"synthetic/{domain}/{split}/{index}" + (f"?seed={seed}" if seed else ""),
        domain=domain,
        kind=draw.kind,
        prompt=draft.prompt,
        answer=draft.answer,
        check=draft.check,
    )


def problems(
    count: int, *, split: Split = "train", seed: int = 0, domains: Sequence[Domain] = DOMAINS
) -> Iterator[Problem]:
    """`count` problems, taking the domains in turn."""
    for number in range(count):
        yield problem(domains[number % len(domains)], number // len(domains), split=split, seed=seed)


def is_right(problem: Problem, text: str) -> bool:
    """Whether `text` answers the problem rightly.

    For code this EXECUTES the first Python block of `text`, with the problem's assertions, in a separate isolated
    interpreter that is ended after five seconds. That is no sandbox: it can do whatever the user who runs this can do.
    """
    if problem.domain == "maths":
        numbers = re.findall(r"answer is (-?\d+)", text)
        return bool(numbers) and numbers[-1] == problem.check[0]
    if problem.domain == "code":
        block = _block(text, "python")
        return block is not None and _passes(block, problem.check)
    if problem.domain == "table":
        return _cells(text.splitlines()) == _cells(problem.check)
    return _canonical(_block(text, "json")) == problem.check[0]


def _block(text: str, language: str) -> str | None:
    block = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return block.group(1) if block else None


def _passes(block: str, assertions: Sequence[str]) -> bool:
    # A code of its own for reaching the end: a block that exits early must not count as right.
    program = "\n".join((block, *assertions, f"raise SystemExit({_ALL_PASSED})"))
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-"],
            input=program.encode(errors="replace"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_CODE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == _ALL_PASSED


def _cells(lines: Sequence[str]) -> list[list[str]]:
    """The cells of all table lines but the rule under the header."""
    rows = (line.strip() for line in lines)
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row.startswith("|")]
    return [row for row in cells if any(cell.strip("-: ") for cell in row)]


def _canonical(block: str | None) -> str | None:
    try:
        return None if block is None else json.dumps(json.loads(block), sort_keys=True)
    except (ValueError, RecursionError):  # RecursionError: brackets nested without end
        return None
