"""Lines of text files, gzipped or not, with their numbers."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from orthrus.errors import DataError


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file that are not blank, with their numbers; gzipped when its name ends in `.gz`.

    A byte order mark at the start, as Windows' editors write one, is left out.

    Raises:
        DataError: the file is missing, damaged or not in UTF-8.
    """
    try:
        zipped = path.suffix == ".gz"
        with gzip.open(path, "rt", encoding="utf-8-sig") if zipped else path.open(encoding="utf-8-sig") as lines:
            yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: a readable text file in UTF-8 is required, found: {error}") from error
