"""Results on disk: JSON lines, a provenance record at the head of every run, whole batches at a time."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Final, Self, TypeAlias

import torch

from orthrus.bench.race import Contender
from orthrus.data.records import Record, read_records, rewrite
from orthrus.decode.exact import Exact
from orthrus.errors import DataError
from orthrus.provenance import digest, provenance

PROVENANCE: Final = "provenance"
PASS: Final = "pass"
STEP: Final = "step"

_SAID: Final = {"id", "command", "commit", "dirty", "orthrus", "torch", "transformers", "device", "threads", "date"}

Prompt: TypeAlias = tuple[str, str, int, str, str]
"""Configuration, dtype, batch, suite, id: what is measured, by whomever."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line of a file of results: its fields, under the name of its kind."""

    kind: ClassVar[str]

    def to_record(self) -> Record:
        return {"kind": self.kind, **asdict(self)}

    @classmethod
    def of(cls, record: Record) -> Self:
        """Return the line that a record holds; raises KeyError with the fields that are missing."""
        values = cls.values(record)
        required = [one.name for one in fields(cls) if one.default is MISSING and one.default_factory is MISSING]
        if missing := [name for name in required if name not in values]:
            raise KeyError(*missing)
        return cls(**{one.name: values[one.name] for one in fields(cls) if one.name in values})

    @classmethod
    def values(cls, record: Record) -> Record:
        return record

    @classmethod
    def read(cls, records: Iterable[Record], *, where: str) -> list[Self]:
        """Return the lines of this kind among records; raises DataError for one that is not of its format."""
        try:
            return [cls.of(record) for record in records if record.get("kind") == cls.kind]
        except KeyError as error:
            missing = list(error.args)
            raise DataError(f"{where}: a {cls.kind} line must have the fields {missing}, found one without") from None
        except TypeError as error:
            raise DataError(f"{where}: a {cls.kind} line of its format is required: {error}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class OfPrompt(Line):
    """A line about one prompt.

    Attributes:
        provenance: id of the run's provenance record, in the same file.
        configuration: id of all settings that figures depend on; only lines that share it may be compared.
    """

    provenance: str
    configuration: str
    suite: str
    id: str
    domain: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Result(OfPrompt):
    """One prompt, answered by one contender at one batch size and precision.

    Attributes:
        plan: only for "orthrus", and for "llama.cpp" the name of its weights; `exact` for "ar" too, else None.
        batch: prompts decoded together, as asked for; `rows`, how many there were (a last batch is short).
        group: id of the first prompt of the batch this one was in.
        seconds: median over the rounds of the batch's seconds, divided by its rows.
        stats: the completion's statistics (`orthrus.decode.output.Stats.to_dict`).
        proposed_per_position, accepted_at_position: how often slot j was drafted, how often its draft was emitted.
        identical: whether every round's tokens equal those of mode "ar", as exact as this contender (peers:
            "distribution"), for the same batch; None where it did not run.
        right: whether the answer is right; None where nothing can tell.
    """

    kind: ClassVar[str] = "result"

    mode: str
    plan: str | None
    exact: Exact | None
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
    def contender(self) -> Contender:
        return Contender(self.mode, self.plan, self.exact)


def head(*, dtypes: Sequence[str], device: torch.device | str = "cpu", **more: Any) -> Record:
    """Return the record at the head of a run's lines, which name it by its id, with what the run was made with."""
    facts = {**provenance(dtypes=dtypes, device=device), **more}
    return {"kind": PROVENANCE, "id": digest(facts), **facts}


def provenances(records: Iterable[Record], *, where: str) -> dict[str, Record]:
    """Return the provenance records among records, by id; raises DataError for one without what reports say of it."""
    out = {}
    for record in records:
        if record.get("kind") == PROVENANCE:
            if missing := sorted(_SAID - record.keys()):
                raise DataError(f"{where}: a provenance line must have the fields {missing}, found one without")
            out[record["id"]] = record
    return out


def take_up(path: Path, configuration: str, who: Mapping[int, Set[Contender]]) -> set[Prompt]:
    """Prepare a file to be written on: drop what an interrupted run left unfinished; return the prompts done.

    A prompt is done when each contender (of `who`, by batch size) has a line for it. Lines of unfinished prompts of
    this configuration are dropped, so that all lines of a prompt come from one interleaved measurement. Every other
    line stays.
    """
    if not path.exists():
        return set()
    records = read_records(path)
    answered_by: dict[Prompt, set[Contender]] = {}
    for line in Result.read(records, where=str(path)):
        if line.configuration == configuration:
            answered_by.setdefault(line.prompt, set()).add(line.contender)
    done = {prompt for prompt, answered in answered_by.items() if answered >= who.get(prompt[2], set())}
    stale = answered_by.keys() - done
    rewrite(path, [r for r in records if r.get("kind") != Result.kind or Result.of(r).prompt not in stale])
    return done
