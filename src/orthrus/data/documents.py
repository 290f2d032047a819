"""Documents for training: chats and texts from JSONL files and from the procedural generator.

The record format is `{"source", "id", "messages": [{"role", "content"}, …], "tools": […]}` or
`{"source", "id", "text"}`, one object a line.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orthrus.data.lines import lines_of
from orthrus.data.prompts import tools_of
from orthrus.data.synthetic import Domain, Split, problem
from orthrus.decode.text import checked_message
from orthrus.errors import DataError, PromptError

Message = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One chat (`messages` not empty) or one plain text; `origin` is its file and line, for error messages.

    `tools` are JSON schemas that the chat's template presents to the model.
    """

    source: str
    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    text: str = ""
    origin: str = field(default="", compare=False)


def synthetic_documents(domain: Domain, *, split: Split = "train", seed: int = 0) -> Iterator[Document]:
    """Endless problems of one domain of `orthrus.data.synthetic`, from index 0 on."""
    for index in itertools.count():
        messages = tuple(problem(domain, index, split=split, seed=seed).messages)
        yield Document(source=domain, messages=messages, origin=f"{domain}, {split} problem {index}")


def jsonl_documents(path: str | Path, *, split_characters: int | None = None) -> Iterator[Document]:
    """Documents of a JSONL file, gzipped when its name ends in `.gz`, in the order of the file.

    Texts longer than `split_characters` are cut at blank lines where possible.

    Raises:
        DataError: the file cannot be read, or a record is not of the format; with file and line.
    """
    for number, line in lines_of(Path(path)):
        yield from _pieces(_parse(line, f"{path}:{number}"), split_characters)


def _parse(line: str, where: str) -> Document:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected one JSON object a line; {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(record).__name__}")
    source = str(record.get("source", ""))
    match record:
        case {"messages": list(messages)} if messages:
            try:
                chat = tuple(map(checked_message, messages))
            except PromptError as error:
                raise DataError(f"{where}: 'messages': {error}") from None
            return Document(source=source, messages=chat, tools=tools_of(record, where=where), origin=where)
        case {"text": str(text)} if text:
            return Document(source=source, text=text, origin=where)
    raise DataError(
        f"{where}: expected 'messages' (a list of objects with the strings 'role' and 'content') or 'text' "
        f"(a string that is not empty), found the keys {sorted(record)}"
    )


def _pieces(document: Document, split_characters: int | None) -> Iterator[Document]:
    if split_characters is None or len(document.text) <= split_characters:
        yield document
        return
    piece = ""
    for paragraph in document.text.split("\n\n"):
        if piece and len(piece) + len(paragraph) > split_characters:
            yield replace(document, text=piece.rstrip())
            piece = ""
        piece += paragraph + "\n\n"
    if piece.strip():
        yield replace(document, text=piece.rstrip())
