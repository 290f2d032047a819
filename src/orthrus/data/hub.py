"""Hugging Face datasets as documents: by name or local directory, revision, split and a mapping of columns."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from orthrus.data.documents import Document
from orthrus.data.prompts import tools_of
from orthrus.decode.text import checked_message
from orthrus.errors import DataError, PromptError


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Which column holds what: whole chats (`messages`), a question with an answer (`prompt`, `answer`) or a `text`."""

    messages: str | None = None
    prompt: str | None = None
    answer: str | None = None
    text: str | None = None

    @property
    def names(self) -> list[str]:
        """The columns asked for."""
        return [name for name in (self.messages, self.prompt, self.answer, self.text) if name is not None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """One split of one dataset at one revision; `streaming` reads it as it comes, without a copy on disk."""

    name: str
    split: str
    columns: Columns
    config: str | None = None
    revision: str | None = None
    streaming: bool = True


def dataset_documents(dataset: Dataset) -> Iterator[Document]:
    """Yield a dataset's rows as documents, in its order.

    Raises:
        DataError: `datasets` is not installed, there is no such dataset, a column is missing, or a row is not what
            the mapping says; with the row's number.
    """
    where = f"{dataset.name} ({dataset.split})"
    for number, row in enumerate(_rows(dataset, where)):
        missing = [name for name in dataset.columns.names if name not in row]
        if missing:
            raise DataError(f"{where}: the columns {', '.join(missing)} are required, found {', '.join(row)}")
        yield _document(row, dataset.columns, source=dataset.name, where=f"{where}, row {number}")


def _rows(dataset: Dataset, where: str) -> Iterable[Mapping[str, Any]]:
    try:
        import datasets  # lazily: optional, and slow to import
    except ImportError as error:
        raise DataError(
            f"{where}: the package datasets is required, found none: pip install 'orthrus-lm[train]'"
        ) from error
    try:
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(
            dataset.name, dataset.config, split=dataset.split, revision=dataset.revision, streaming=dataset.streaming
        )
    except Exception as error:  # datasets raises its own, huggingface_hub's and httpx's
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise DataError(f"{where}: a dataset that can be read is required; {type(error).__name__}: {reason}") from error
    return rows


def _document(row: Mapping[str, Any], columns: Columns, *, source: str, where: str) -> Document:
    if columns.text is not None:
        return Document(source=source, text=_text(row[columns.text], where), origin=where)
    if columns.messages is not None:
        messages = row[columns.messages]
        if not isinstance(messages, list) or not messages:
            raise DataError(f"{where}: {columns.messages} must be a list of messages, found {messages!r}")
        try:
            chat = tuple(map(checked_message, messages))
        except PromptError as error:
            raise DataError(f"{where}: {error}") from None
        return Document(source=source, messages=chat, tools=tools_of(row, where=where), origin=where)
    assert columns.prompt is not None
    asked = {"role": "user", "content": _text(row[columns.prompt], where)}
    if columns.answer is None:
        return Document(source=source, messages=(asked,), origin=where)
    answer = {"role": "assistant", "content": _text(row[columns.answer], where)}
    return Document(source=source, messages=(asked, answer), origin=where)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: a text is required, found {value!r}")
    return value
