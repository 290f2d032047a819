"""Packed rows: whole documents side by side in rows of a fixed length, kept as memory-mapped arrays.

A document is cut only where it is longer than a row. Each token says whether it belongs to an answer.
"""

import bisect
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from orthrus.data.documents import Document
from orthrus.decode.text import check_template
from orthrus.errors import DataError, PromptError
from orthrus.writing import replacing

ARRAYS = ("token_ids", "document", "position", "answer")
BATCH = 2_000  # documents whose segments are encoded in one call of the tokenizer
NO_DOCUMENT = -1  # what `PackedRows.document` holds at padding


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedDocument:
    """Token ids [T] int32 of one document, and whether each belongs to an answer, [T] bool."""

    token_ids: NDArray[np.int32]
    answer: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRows:
    """N rows of T tokens.

    `token_ids` [N, T] int32; `document` [N, T] int32, the index of a document in its row, `NO_DOCUMENT` at
    padding; `position` [N, T] int32, from 0 in every document; `answer` [N, T] bool, true on the tokens of
    assistant turns and on the tokens that end them.
    """

    token_ids: NDArray[np.int32]
    document: NDArray[np.int32]
    position: NDArray[np.int32]
    answer: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.token_ids)


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: Iterable[Document]) -> Iterator[EncodedDocument]:
    """Encode chats through the tokenizer's chat template, and texts with the end-of-sequence token.

    Segments (prompt, answer, prompt, …) are encoded apart, as they are at decoding, where an answer starts
    after the encoded prompt.

    Raises DataError: the template changes earlier turns when later ones are added, or does not read what a chat holds.
    """
    iterator = iter(documents)
    while batch := list(islice(iterator, BATCH)):
        segmented = [_segments(tokenizer, document) for document in batch]
        texts = [text for segments in segmented for text, _ in segments]
        encodings = iter(tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        for segments in segmented:
            ids = [(next(encodings).ids, is_answer) for _, is_answer in segments]
            yield EncodedDocument(
                token_ids=np.concatenate([np.asarray(i, dtype=np.int32) for i, _ in ids]),
                answer=np.repeat([is_answer for _, is_answer in ids], [len(i) for i, _ in ids]),
            )


def _segments(tokenizer: PreTrainedTokenizerFast, document: Document) -> list[tuple[str, bool]]:
    """The document's rendered text in pieces, each an answer (with its end-of-turn token) or not."""
    end = str(tokenizer.eos_token)
    if not document.messages:
        return [(document.text + end, False)]
    try:
        check_template(tokenizer, document.messages, document.tools, {})
    except PromptError as error:
        raise DataError(f"{document.origin or document.source}: {error}") from None
    segments: list[tuple[str, bool]] = []
    done = ""
    for turn, message in enumerate(document.messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, document, turn, add_generation_prompt=True)
        whole = _render(tokenizer, document, turn + 1, add_generation_prompt=False)
        if not (prompt.startswith(done) and whole.startswith(prompt)):
            raise DataError(
                f"{document.source}: turn {turn} of a chat must leave the text of earlier turns as it was, "
                "but the tokenizer's chat template rewrites it; use another template or single turns"
            )
        stop = whole.find(end, len(prompt))
        stop = len(whole) if stop < 0 else stop + len(end)
        segments += [(prompt[len(done) :], False), (whole[len(prompt) : stop], True)]
        done = whole[:stop]
    if not segments:
        return [(_render(tokenizer, document, len(document.messages), add_generation_prompt=False), False)]
    return segments


def _render(tokenizer: PreTrainedTokenizerFast, document: Document, count: int, *, add_generation_prompt: bool) -> str:
    text = tokenizer.apply_chat_template(
        list(document.messages[:count]),
        tools=list(document.tools) or None,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    return str(text)


def pack(documents: Iterable[EncodedDocument], *, row_tokens: int, pad_id: int, window: int = 4_096) -> PackedRows:
    """Pack documents into rows of `row_tokens`, best fit, longest first within windows of documents.

    Raises DataError: there is no document with a token in it.
    """
    iterator = (document for document in documents if len(document.token_ids))
    rows: list[list[EncodedDocument]] = []
    while batch := list(islice(iterator, window)):
        rows += _best_fit(batch, row_tokens)
    if not rows:
        raise DataError("at least one document with text is required to pack rows; found none")
    return _lay_out(rows, row_tokens=row_tokens, pad_id=pad_id)


def _best_fit(documents: list[EncodedDocument], row_tokens: int) -> list[list[EncodedDocument]]:
    rows: list[list[EncodedDocument]] = []
    room: list[tuple[int, int]] = []  # free tokens and row, sorted
    for document in sorted(documents, key=lambda d: len(d.token_ids), reverse=True):
        length = min(len(document.token_ids), row_tokens)
        at = bisect.bisect_left(room, (length, 0))
        free, row = room.pop(at) if at < len(room) else (row_tokens, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(document)
        if free > length:
            bisect.insort(room, (free - length, row))
    return rows


def _lay_out(rows: list[list[EncodedDocument]], *, row_tokens: int, pad_id: int) -> PackedRows:
    shape = (len(rows), row_tokens)
    packed = PackedRows(
        token_ids=np.full(shape, pad_id, dtype=np.int32),
        document=np.full(shape, NO_DOCUMENT, dtype=np.int32),
        position=np.zeros(shape, dtype=np.int32),
        answer=np.zeros(shape, dtype=np.bool_),
    )
    for row, documents in enumerate(rows):
        start = 0
        for index, document in enumerate(documents):
            stop = min(start + len(document.token_ids), row_tokens)
            packed.token_ids[row, start:stop] = document.token_ids[: stop - start]
            packed.answer[row, start:stop] = document.answer[: stop - start]
            packed.document[row, start:stop] = index
            packed.position[row, start:stop] = np.arange(stop - start)
            start = stop
    return packed


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """A sha256 over vocabulary, merges and chat template: equal for tokenizers that encode alike."""
    text = tokenizer.backend_tokenizer.to_str() + "\0" + str(tokenizer.chat_template)
    return hashlib.sha256(text.encode()).hexdigest()


def save_rows(
    rows: PackedRows,
    path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerFast,
    about: Mapping[str, Any],
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write rows as a directory of `.npy` files and a `manifest.json`; complete, or not there at all.

    `about` is kept in the manifest and must equal what `load_rows` is given; `notes` are for readers.
    """
    path = Path(path)
    with replacing(path) as temporary:
        temporary.mkdir()
        for name in ARRAYS:
            np.save(temporary / f"{name}.npy", getattr(rows, name))
        manifest = {
            "rows": len(rows),
            "row_tokens": rows.token_ids.shape[1],
            "documents": int((rows.document.max(axis=1) + 1).sum()),
            "tokens": int((rows.document != NO_DOCUMENT).sum()),
            "answer_tokens": int(rows.answer.sum()),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "sha256": {name: _sha256(temporary / f"{name}.npy") for name in ARRAYS},
            "about": about,
            **(notes or {}),
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def are_about(path: str | Path, about: Mapping[str, Any]) -> bool:
    """Tell whether a packed set is there and was made from `about`; a damaged manifest is for `load_rows` to name."""
    file = Path(path) / "manifest.json"
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))["about"]
    except FileNotFoundError:
        return Path(path).exists()
    except (OSError, ValueError, KeyError):
        return True
    return bool(kept == json.loads(json.dumps(about)))


def load_rows(
    path: str | Path, *, tokenizer: PreTrainedTokenizerFast, about: Mapping[str, Any] | None = None
) -> PackedRows:
    """Open a packed set, memory-mapped.

    Raises DataError: files are missing or damaged, or the set was made with another tokenizer or from other data.
    """
    path = Path(path)
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        damaged = [name for name in ARRAYS if _sha256(path / f"{name}.npy") != manifest["sha256"][name]]
        arrays = {name: np.load(path / f"{name}.npy", mmap_mode="r") for name in ARRAYS if name not in damaged}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: a complete packed set is required; {error}; pack it again") from None
    if damaged:
        raise DataError(f"{path}: damaged (sha256 differs): {', '.join(damaged)}; pack it again")
    if manifest["tokenizer"] != tokenizer_fingerprint(tokenizer):
        raise DataError(f"{path}: packed with another tokenizer; pack it again")
    if about is not None and manifest["about"] != json.loads(json.dumps(about)):
        raise DataError(f"{path}: packed from other data than the recipe names; delete it to pack it again")
    return PackedRows(**arrays)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
