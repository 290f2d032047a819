"""Encoded answers on disk, shard by shard, so that writing them can be interrupted, resumed and shared out.

Knows files and which shard belongs to which process; knows neither who writes answers nor what they are for.
"""

import json
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orthrus.data.packing import EncodedDocument
from orthrus.data.responses import Prompt
from orthrus.errors import DataError
from orthrus.writing import replacing, writing

SHARD = 512  # prompts whose answers are written to disk together

Writer = Callable[[Sequence[Prompt]], Iterable[EncodedDocument]]
Progress = Callable[[int, int], None]


def write_shards(
    folder: Path,
    prompts: Sequence[Prompt],
    write: Writer,
    *,
    about: dict[str, Any],
    share: tuple[int, int] = (0, 1),
    size: int = SHARD,
    on_progress: Progress | None = None,
) -> None:
    """Write the shards that are missing from a folder, each whole or not at all.

    Args:
        about: what the answers are made from; a folder made from anything else is refused.
        share: this process's index and the number of processes; shards are dealt out in turn.
        on_progress: called with prompts done and all prompts, of this process's share.

    Raises:
        DataError: the folder's shards are of other prompts, another backbone or other settings.
    """
    _claim(folder, about)
    index, count = share
    mine = range(index * size, len(prompts), count * size)
    whole = sum(len(prompts[start : start + size]) for start in mine)
    done = 0
    for start in mine:
        path = folder / f"{start // size:05d}.npz"
        part = prompts[start : start + size]
        if not path.exists():
            _write(path, list(_told(write(part), done, whole, on_progress)))
        done += len(part)
        if on_progress is not None:
            on_progress(done, whole)


def read_shards(folder: Path, prompts: int, *, size: int = SHARD) -> list[EncodedDocument]:
    """Read all shards of so many prompts, in order. Raises DataError when one is missing or damaged."""
    return [document for number in range(-(-prompts // size)) for document in _read(folder / f"{number:05d}.npz")]


def _told(
    documents: Iterable[EncodedDocument], before: int, whole: int, on_progress: Progress | None
) -> Iterable[EncodedDocument]:
    for number, document in enumerate(documents, start=1):
        if on_progress is not None:
            on_progress(before + number, whole)
        yield document


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """Mark a folder as made from `about`, or check that it is; processes may do so at the same time."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    note = folder / "about.json"
    if not note.exists():
        if any(folder.glob("*.npz")):
            raise DataError(f"{folder}: shards with an about.json are required, found none; delete the folder")
        with replacing(note, folder / f"about.{os.getpid()}.tmp") as temporary:
            temporary.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    found = json.loads(note.read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(about))
    if found != wanted:
        changed = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        raise DataError(
            f"{folder}: answers made with the same settings are required, but these differ: {', '.join(changed)} "
            "(thinking on and off must not be mixed, nor backbones); delete the folder or take another run.output"
        )


def _write(path: Path, documents: Sequence[EncodedDocument]) -> None:
    lengths = np.array([len(d.token_ids) for d in documents], dtype=np.int64)
    empty: list[NDArray[Any]] = [np.empty(0, dtype=np.int32)]
    with replacing(path, path.with_suffix(".tmp")) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            lengths=lengths,
            token_ids=np.concatenate([d.token_ids for d in documents] or empty),
            answer=np.concatenate([d.answer for d in documents] or empty).astype(np.bool_),
        )


def _read(path: Path) -> list[EncodedDocument]:
    try:
        with np.load(path) as arrays:
            cuts = np.cumsum(arrays["lengths"])[:-1]
            ids, answers = np.split(arrays["token_ids"], cuts), np.split(arrays["answer"], cuts)
            count = len(arrays["lengths"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: a shard of answers is required, found {error}; delete it to write it again") from None
    return [EncodedDocument(token_ids=i, answer=a) for i, a in zip(ids[:count], answers[:count], strict=False)]
