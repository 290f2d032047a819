"""Lines of text files, gzipped or not: as they are with their numbers, or as JSON objects with their origin."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orthrus.errors import DataError


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file that are not blank, with their numbers; gzipped when its name ends in `.gz`.

    A byte order mark is left out. Raises DataError: the file is missing, damaged or not in UTF-8.
    """
    try:
        zipped = path.suffix == ".gz"
        with gzip.open(path, "rt", encoding="utf-8-sig") if zipped else path.open(encoding="utf-8-sig") as lines:
            yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: a readable text file in UTF-8 is required, found: {error}") from error


def objects_of(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield the JSON objects of a file, one a line: the line's number, its origin for error messages, the object.

    Raises DataError: the file cannot be read, or a line holds anything else.
    """
    for number, line in lines_of(path):
        origin = f"{path}:{number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{origin}: one JSON object a line is required, found {error}") from None
        if not isinstance(fields, dict):
            raise DataError(f"{origin}: a JSON object is required, found {type(fields).__name__}")
        yield number, origin, fields
