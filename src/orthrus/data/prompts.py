"""Prompt sets: records of JSONL files, lines of text files or rows of Hugging Face datasets, as one type."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from orthrus.data.hub import dataset_rows
from orthrus.data.lines import lines_of, objects_of
from orthrus.decode.text import checked_message
from orthrus.errors import ConfigError, DataError, PromptError

Message: TypeAlias = dict[str, Any]
Turn: TypeAlias = tuple[Message, ...]

PROMPT_COLUMNS: Final = ("messages", "turns", "prompt", "question", "problem", "instruction")
REFERENCE_COLUMNS: Final = ("reference", "answer", "solution", "canonical_solution", "response", "output")
ID_COLUMNS: Final = ("id", "task_id", "unique_id", "question_id", "prompt_id")

_ASKING: Final = ("user", "tool")  # after messages of these an answer is due
_FILE_ENDINGS = (".jsonl", ".json", ".txt", ".md", ".csv", ".tsv", ".parquet", ".gz")
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.-]+))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRecord:
    """One prompt of a set.

    Attributes:
        id: the record's own id, or the set's name and the record's number.
        task: the set it is from.
        turns: what is said before each answer. A turn ends with a message of the user or of a tool; a system message,
            and answers and tool calls that the set gives, may come before it.
        tools: the tools that the set offers the model, as JSON schemas.
        reference: what the set says of right answers; None when it says nothing.
    """

    id: str
    task: str
    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    reference: Any = None
    meta: Mapping[str, Any] = field(default_factory=dict)


def read_prompts(source: str | Path, limit: int | None = None) -> list[PromptRecord]:
    """Read a prompt set, the first `limit` prompts of it.

    `source` is a JSONL file (`.jsonl`, `.jsonl.gz`: an object a line with "prompt" or "messages"), any other file
    (plain text, one prompt a line, `.gz` too), or a Hugging Face dataset as `name[:config][@split]` (needs the package
    `datasets`; the split is `test` unless there is none).

    Raises:
        DataError: a missing or unreadable file, a broken record (named by file and line), or an empty set.
        ConfigError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, found {limit}")
    records = list(itertools.islice(_records(source), limit))
    if not records:
        raise DataError(f"{source}: at least one prompt is required, found none")
    return records


def user_prompt(text: str, *, id: str = "", task: str = "") -> PromptRecord:
    """Make a record of one text: one turn with one message of the user."""
    return PromptRecord(id=id, task=task, turns=(({"role": "user", "content": text},),))


def _records(source: str | Path) -> Iterator[PromptRecord]:
    path = Path(source)
    if path.is_file():
        names = path.name.removesuffix(".gz")
        task = names.rpartition(".")[0] or path.name
        if names.endswith((".jsonl", ".json")):
            return (_record(fields, where=at, task=task, number=number) for number, at, fields in objects_of(path))
        return (user_prompt(line.strip(), id=f"{task}/{number}", task=task) for number, line in lines_of(path))
    if path.exists():
        raise DataError(f"{path}: a prompt set is a file, found a directory: name one of its files")
    named = _HUB_NAME.fullmatch(str(source))
    if named is None or str(source).startswith(".") or str(source).endswith(_FILE_ENDINGS):
        raise DataError(f"{source}: a prompt set is a file or a Hugging Face dataset, found no such file")
    return _from_hub(**named.groupdict())


def _from_hub(name: str, config: str | None, split: str | None) -> Iterator[PromptRecord]:
    where = name + (f":{config}" if config else "") + (f"@{split}" if split else "")
    try:
        rows = dataset_rows(name, config=config, split=split)
    except DataError as error:
        raise DataError(f"{where}: there is no such file, and no such dataset: {error}") from error
    for number, fields in enumerate(rows, start=1):
        yield _record(fields, where=f"{where}, row {number}", task=name.rpartition("/")[2], number=number)


def _record(fields: Mapping[str, Any], *, where: str, task: str, number: int) -> PromptRecord:
    column = _first(fields, PROMPT_COLUMNS)
    if column is None:
        raise DataError(
            f"{where}: one of the fields {', '.join(PROMPT_COLUMNS)} is required, found {', '.join(fields) or 'none'}"
        )
    turns, answers = _turns(_messages(fields[column], where=f"{where}: {column}"), where=f"{where}: {column}")
    id_column, reference_column = _first(fields, ID_COLUMNS), _first(fields, REFERENCE_COLUMNS)
    meta = fields.get("meta")
    return PromptRecord(
        id=str(fields[id_column]) if id_column else f"{task}/{number}",
        task=str(fields.get("task") or task),
        turns=turns,
        tools=tools_of(fields, where=where),
        reference=fields[reference_column] if reference_column else (answers or None),
        meta=meta if isinstance(meta, Mapping) else {},
    )


def tools_of(fields: Mapping[str, Any], *, where: str) -> tuple[Mapping[str, Any], ...]:
    """Return a record's "tools": a list of objects, or JSON text of one, as datasets keep it; empty where none are.

    Raises DataError: anything else.
    """
    tools = fields.get("tools") or []
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            raise DataError(f"{where}: tools must be a list of JSON schemas, found {_shown(tools)}") from None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"{where}: tools must be a list of JSON schemas, found {_shown(tools)}")
    return tuple(tools)


def _messages(value: Any, *, where: str) -> list[Message]:
    """Return messages from a text, a list of the user's texts, or a list of messages."""
    items = [value] if isinstance(value, str) else value
    required = 'a text that is not empty or a list of {"role": …, "content": …}'
    if not isinstance(items, list) or not items:
        raise DataError(f"{where} must be {required}, found {_shown(value)}")
    messages = [{"role": "user", "content": item} if isinstance(item, str) else item for item in items]
    try:
        messages = [checked_message(message) for message in messages]
    except PromptError as error:
        raise DataError(f"{where} must be {required}: {error}") from None
    if any(m["role"] == "user" and not m["content"].strip() for m in messages):
        raise DataError(f"{where} must be {required}, found {_shown(value)}")
    return messages


def _turns(messages: list[Message], *, where: str) -> tuple[tuple[Turn, ...], str]:
    """Cut a chat wherever an answer is left to write; return the turns and the answer after the last."""
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise DataError(f"{where} must hold a message of the user, found the roles {roles}")
    last = max(index for index, role in enumerate(roles) if role in _ASKING)
    turns: list[Turn] = []
    said: list[Message] = []
    for index, message in enumerate(messages[: last + 1]):
        said.append(message)
        if message["role"] in _ASKING and (index == last or roles[index + 1] == "user"):
            turns.append(tuple(said))
            said = []
    return tuple(turns), "\n".join(m["content"] for m in messages[last + 1 :] if m.get("content"))


def _first(fields: Mapping[str, Any], columns: Sequence[str]) -> str | None:
    return next((column for column in columns if fields.get(column) is not None), None)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
