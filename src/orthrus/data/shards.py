"""Encoded answers on disk, looked up by their prompts. Writing can be interrupted, resumed, shared and extended.

A folder holds shards of `SHARD` answers, in the order of writing, and `about.json`: the settings that made all of them.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orthrus.data.packing import EncodedDocument
from orthrus.data.responses import Prompt
from orthrus.errors import DataError
from orthrus.progress import Progress
from orthrus.writing import replacing, writing

SHARD = 64
"""Answers written to disk together. An interrupted process loses at most so many."""

Writer = Callable[[Sequence[Prompt]], Iterable[EncodedDocument]]


def write_answers(
    folder: Path,
    prompts: Sequence[Prompt],
    write: Writer,
    *,
    about: dict[str, Any],
    share: tuple[int, int] = (0, 1),
    size: int = SHARD,
    label: str = "",
) -> None:
    """Answer each prompt that has no answer in the folder yet; existing answers stay.

    Args:
        write: turns prompts into encoded answers, in any order.
        about: the settings that answers depend on, as JSON values.
        share: index of this process and number of processes; prompts are dealt out in turn.
        size: answers per shard.

    Raises DataError: another backbone or other settings wrote the folder's answers.
    """
    _claim(folder, about)
    answered = {_key(document) for document in _all(folder)}
    index, count = share
    mine = list({_key(prompt): prompt for prompt in prompts}.items())[index::count]
    lacking = [prompt for key, prompt in mine if key not in answered]
    answers = iter(write(lacking)) if lacking else iter(())
    number = max((int(path.stem[4:]) + 1 for path in folder.glob(f"{index:03d}-*.npz")), default=0)
    with Progress(f"{label} prompts", len(mine), done=len(mine) - len(lacking)) as progress:
        while shard := list(islice(answers, size)):
            _write(folder / f"{index:03d}-{number:05d}.npz", shard)
            number += 1
            progress.advance(len(shard))


def read_answers(folder: Path, prompts: Sequence[Prompt]) -> list[EncodedDocument]:
    """Return the answers of prompts, in the prompts' order; prompts without an answer are left out.

    Raises DataError: a shard is damaged.
    """
    answers = {_key(document): document for document in _all(folder)}
    return [answers[key] for key in map(_key, prompts) if key in answers]


def _key(asked: Prompt | EncodedDocument) -> bytes:
    ids = asked.token_ids if isinstance(asked, Prompt) else asked.token_ids[~asked.answer]
    return hashlib.blake2b(np.asarray(ids, dtype=np.int32).tobytes(), digest_size=16).digest()


def _all(folder: Path) -> Iterator[EncodedDocument]:
    return (document for path in sorted(folder.glob("*.npz")) for document in _read(path))


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """Write a folder's settings, or check that they are these; safe for processes that start together."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    note = folder / "about.json"
    if not note.exists():
        if any(folder.glob("*.npz")):
            raise DataError(f"{folder}: shards with an about.json are required, found none; delete the folder")
        with replacing(note, folder / f"about.{os.getpid()}.tmp") as temporary:
            temporary.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    before = json.loads(note.read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(about))
    if before != wanted:
        changed = sorted(key for key in before.keys() | wanted.keys() if before.get(key) != wanted.get(key))
        differences = ", ".join(f"{key} ({before.get(key)!r} there, {wanted.get(key)!r} here)" for key in changed)
        raise DataError(
            f"{folder}: answers made with the same settings are required, but these differ: {differences}; take "
            "another run.output, or delete the folder"
        )


def _write(path: Path, documents: Sequence[EncodedDocument]) -> None:
    with replacing(path, path.with_suffix(".tmp")) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            lengths=np.array([len(d.token_ids) for d in documents], dtype=np.int64),
            token_ids=np.concatenate([d.token_ids for d in documents]),
            answer=np.concatenate([d.answer for d in documents]),
        )


def _read(path: Path) -> list[EncodedDocument]:
    try:
        with np.load(path) as arrays:
            cuts: NDArray[np.int64] = np.cumsum(arrays["lengths"])[:-1]
            ids, answers = np.split(arrays["token_ids"], cuts), np.split(arrays["answer"], cuts)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: a shard of answers is required, found {error}; delete it to write it again") from None
    return [EncodedDocument(token_ids=i, answer=a) for i, a in zip(ids, answers, strict=True)]
