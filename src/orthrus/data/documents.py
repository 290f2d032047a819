"""Documents for training: chats and texts from JSONL files, Hugging Face datasets and the procedural generator.

The record format is `{"source", "id", "messages": [{"role", "content"}, …], "tools": […]}` or
`{"source", "id", "text"}`, one object a line.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orthrus.data.hub import dataset_rows
from orthrus.data.lines import objects_of
from orthrus.data.prompts import tools_of
from orthrus.data.synthetic import Domain, Split, problem
from orthrus.decode.text import checked_message
from orthrus.errors import DataError, PromptError

Message = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One chat (`messages` not empty, `tools` as JSON schemas) or one plain text; `origin` is its file and line."""

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
    """Documents of a JSONL file, in its order; longer texts are cut at blank lines where possible.

    Raises DataError: the file cannot be read, or a record is not of the format; with file and line.
    """
    for _, origin, record in objects_of(Path(path)):
        yield from _pieces(_parse(record, origin), split_characters)


def dataset_documents(
    name: str,
    *,
    split: str,
    columns: Mapping[str, str],
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = True,
) -> Iterator[Document]:
    """Yield a dataset's rows as documents, in its order.

    `columns` names those that hold whole chats ("messages"), a question and its answer ("prompt", "answer"), or a
    "text". Raises DataError: no such dataset, a column is missing, or a row is not what `columns` says; with the row's
    number.
    """
    where = f"{name} ({split})"
    rows = dataset_rows(name, config=config, split=split, revision=revision, streaming=streaming)
    for number, row in enumerate(rows):
        missing = [column for column in columns.values() if column not in row]
        if missing:
            raise DataError(f"{where}: the columns {', '.join(missing)} are required, found {', '.join(row)}")
        yield _document(row, columns, source=name, origin=f"{where}, row {number}")


def _parse(record: Mapping[str, Any], origin: str) -> Document:
    source = str(record.get("source", ""))
    match record:
        case {"messages": list(messages)} if messages:
            return _chat(messages, record, source=source, origin=origin)
        case {"text": str(text)} if text:
            return Document(source=source, text=text, origin=origin)
    raise DataError(
        f"{origin}: expected 'messages' (a list of objects with the strings 'role' and 'content') or 'text' "
        f"(a string that is not empty), found the keys {sorted(record)}"
    )


def _document(row: Mapping[str, Any], columns: Mapping[str, str], *, source: str, origin: str) -> Document:
    if "text" in columns:
        return Document(source=source, text=_text(row[columns["text"]], origin), origin=origin)
    if "messages" in columns:
        return _chat(row[columns["messages"]], row, source=source, origin=origin)
    messages = [{"role": "user", "content": _text(row[columns["prompt"]], origin)}]
    if "answer" in columns:
        messages.append({"role": "assistant", "content": _text(row[columns["answer"]], origin)})
    return Document(source=source, messages=tuple(messages), origin=origin)


def _chat(messages: Any, record: Mapping[str, Any], *, source: str, origin: str) -> Document:
    """Return a chat with the tools that its record offers."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{origin}: a list of messages is required, found {messages!r}")
    try:
        chat = tuple(map(checked_message, messages))
    except PromptError as error:
        raise DataError(f"{origin}: messages: {error}") from None
    return Document(source=source, messages=chat, tools=tools_of(record, where=origin), origin=origin)


def _text(value: Any, origin: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{origin}: a text is required, found {value!r}")
    return value


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
