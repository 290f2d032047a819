"""Files of JSON objects, one a line, that grow while a process runs and stay readable when it is killed.

Half a line at the end, left by a killed process, is ignored when read and removed before the next record is written.
"""

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from orthrus.errors import DataError
from orthrus.writing import replacing, writing

Record: TypeAlias = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """Read a file; half a line at its end is left out.

    Raises DataError: the file cannot be read, or a line is not a JSON object, nor the beginning of one at the end.
    """
    try:
        # As bytes, since half a line may end within a character.
        lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: a readable file of JSON lines is required; {error}") from None
    out: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines) and line[:1] in (b"", b"{"):
                break
            raise DataError(f"{path}:{number}: expected one JSON object a line; {error}") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: expected a JSON object, found {type(record).__name__}")
        out.append(record)
    return out


def append(path: Path, records: Sequence[Record]) -> None:
    """Write records at the end of a file, all or none; folders are made, and half a line at the end is cut off first.

    Raises:
        DataError: a file that does not end with its line is none of JSON lines.
        WriteError: the file cannot be written; it is as it was.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.stat().st_size if path.is_file() else None
        if before is not None and not _ends_with_its_line(path):
            rewrite(path, read_records(path))
            before = path.stat().st_size
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(map(_text, records)))
        except OSError:
            with suppress(OSError):
                path.unlink() if before is None else os.truncate(path, before)
            raise


def rewrite(path: Path, records: Iterable[Record]) -> None:
    """Let a file hold these records and no others: all of them, or, with a WriteError, what was there."""
    with replacing(path) as temporary:
        temporary.write_text("".join(map(_text, records)), encoding="utf-8")


def _ends_with_its_line(path: Path) -> bool:
    """Tell whether nothing follows a file's last line break; so it is in an empty file."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() in (b"", b"\n")


def _text(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
