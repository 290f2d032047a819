"""Results on disk: JSON lines, a provenance record at the head of every run, whole batches at a time.

Knows what a line holds and how a file that an interrupted run left is taken up again; knows no model and no
clock.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, TypeAlias

from orthrus.errors import DataError

PROVENANCE: Final = "provenance"
RESULT: Final = "result"
PASS: Final = "pass"
STEP: Final = "step"

_SAID: Final = {"id", "command", "commit", "dirty", "orthrus", "torch", "transformers", "device", "threads", "date"}

Record: TypeAlias = dict[str, Any]
Prompt: TypeAlias = tuple[str, str, int, str, str]
"""Configuration, dtype, batch, suite, id: what is measured, by whomever."""
Who: TypeAlias = tuple[str, str | None, str | None]
"""Mode, plan and exactness: who answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One prompt, answered by one contender at one batch size and precision.

    Attributes:
        provenance: id of the run's provenance record, in the same file.
        configuration: id of all settings that figures depend on; only lines that share it may be compared.
        suite, id, domain: the prompt.
        mode, plan, exact: the contender; `plan` is only for "orthrus", `exact` for "ar" too, else None.
        dtype: precision by name.
        batch: prompts decoded together, as asked for; `rows`, how many there were (a last batch is short).
        group: id of the first prompt of the batch this one was in.
        prompt_tokens: length of the prompt, chat template included.
        seconds: median over the rounds of the batch's seconds, divided by its rows.
        rounds_seconds: the same for each round.
        stats: the completion's statistics (`orthrus.decode.output.Stats.to_dict`).
        proposed_per_position: how often slot j was drafted.
        accepted_at_position: how often slot j's draft was emitted.
        token_hash: digest of the tokens; equal texts have equal digests.
        identical: whether every round's tokens equal those of mode "ar", as exact as this contender (peers:
            "distribution"), for the same batch; None where it did not run.
        diverges_at: position of the first token that differs; None where there is none.
        right: whether the answer is right; None where nothing can tell.
    """

    provenance: str
    configuration: str
    suite: str
    id: str
    domain: str
    mode: str
    plan: str | None
    exact: str | None
    dtype: str
    batch: int
    rows: int
    group: str
    prompt_tokens: int
    seconds: float
    rounds_seconds: list[float]
    stats: dict[str, Any]
    proposed_per_position: list[int] = field(default_factory=list)
    accepted_at_position: list[int] = field(default_factory=list)
    token_hash: str
    identical: bool | None
    diverges_at: int | None
    right: bool | None

    @property
    def prompt(self) -> Prompt:
        """What is measured, by whomever: configuration, precision, batch, suite, prompt."""
        return self.configuration, self.dtype, self.batch, self.suite, self.id

    @property
    def contender(self) -> Who:
        """Who answered."""
        return self.mode, self.plan, self.exact

    def to_record(self) -> Record:
        """Return the line as plain JSON values."""
        return {"kind": RESULT, **asdict(self)}


def results(records: Iterable[Record], *, where: str) -> list[Result]:
    """Return the result lines among records; raises DataError for one that is not of this format."""
    known = {f.name for f in fields(Result)}
    out = []
    for record in records:
        if record.get("kind") == RESULT:
            try:
                out.append(Result(**{name: value for name, value in record.items() if name in known}))
            except TypeError as error:
                raise DataError(f"{where}: a result line must have the fields {sorted(known)}: {error}") from None
    return out


def provenances(records: Iterable[Record], *, where: str) -> dict[str, Record]:
    """Return the provenance records among records, by id; raises DataError for one without what reports say of it."""
    out = {}
    for record in records:
        if record.get("kind") == PROVENANCE:
            if missing := sorted(_SAID - record.keys()):
                raise DataError(
                    f"{where}: a provenance line must have the fields {sorted(_SAID)}, found none of {missing}"
                )
            out[record["id"]] = record
    return out


def read_records(path: Path) -> list[Record]:
    """Read a file of results; half a line at its end, as a killed run leaves one, is left out.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object, nor the beginning of one at the end.
    """
    try:
        # As bytes, since half a line may end within a character.
        lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: a readable file of results is required; {error}") from None
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


def take_up(path: Path, configuration: str, who: Mapping[int, set[Who]]) -> set[Prompt]:
    """Prepare a file to be written on: drop what an interrupted run left unfinished; return the prompts done.

    A prompt is done when each contender (of `who`, by batch size) has a line for it. Lines of unfinished
    prompts of this configuration are dropped, so that all lines of a prompt come from one interleaved
    measurement; every other line stays. A file that does not exist is fine.
    """
    if not path.exists():
        return set()
    records = read_records(path)
    found: dict[Prompt, set[Who]] = {}
    for line in results(records, where=str(path)):
        if line.configuration == configuration:
            found.setdefault(line.prompt, set()).add(line.contender)
    done = {prompt for prompt, answered in found.items() if answered >= who.get(prompt[2], set())}
    stale = found.keys() - done
    kept = [record for record in records if record.get("kind") != RESULT or _prompt_of(record) not in stale]
    _rewrite(path, kept)
    return done


def append(path: Path, records: Sequence[Record]) -> None:
    """Write records at the end of a file, in one piece; folders are made as needed.

    Half a line at the end, as a killed run leaves one, is cut off first. Raises DataError where a file that does not
    end with its line is not one of results.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and not _ends_with_its_line(path):
        _rewrite(path, read_records(path))
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(map(_text, records)))


def _ends_with_its_line(path: Path) -> bool:
    """Tell whether nothing follows a file's last line break; so it is in an empty file."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() in (b"", b"\n")


def _rewrite(path: Path, records: Iterable[Record]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(map(_text, records)), encoding="utf-8")
    temporary.replace(path)


def _prompt_of(record: Record) -> Prompt:
    return record["configuration"], record["dtype"], record["batch"], record["suite"], record["id"]


def _text(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
