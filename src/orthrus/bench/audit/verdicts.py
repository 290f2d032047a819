"""The reference text of each prompt, and how every other text compares with it: result lines with an "audit" beside."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Final, TypeAlias

from orthrus.bench.lines import OfPrompt, Result
from orthrus.bench.race import Contender, first_difference
from orthrus.data.records import Record

MARGINS: Final = (0.001, 0.01, 0.1, 0.5)
"""Gaps between the two best logits below which a recheck might look at a position again."""

Key: TypeAlias = tuple[str, str, str, str]
"""Precision, exactness, suite, id: the text that others are compared with."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a text leaves the reference: `at` the first token that differs, an end counting as one.

    `gap` is best logit minus second best in the pass that wrote the reference's token there; None where the reference
    has no token there, or the two texts do not share what comes before.
    """

    at: int
    gap: float | None

    @classmethod
    def of(cls, text: Sequence[int], reference: Sequence[int], gaps: Sequence[float]) -> "Divergence | None":
        """Compare a text with the reference, whose gaps are one a token; None where the two are equal."""
        at = first_difference(text, reference)
        return None if at is None else cls(at, gaps[at] if at < len(gaps) else None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference(OfPrompt):
    """Plain decoding of one prompt, alone, by this engine; other fields are as of `Result`.

    Attributes:
        perplexity: of the text under the backbone in float32, all of it read at once.
        close: for each of `MARGINS`, the positions whose gap is below it.
        hf: where Hugging Face's `generate` of the untouched backbone leaves it; None where the texts are equal.
    """

    kind: ClassVar[str] = "reference"

    dtype: str
    exact: str
    tokens: int
    token_hash: str
    perplexity: float
    close: list[int]
    hf: Divergence | None

    @property
    def key(self) -> Key:
        return self.dtype, self.exact, self.suite, self.id

    @classmethod
    def values(cls, record: Record) -> Record:
        """Return a record's values by the names of fields."""
        return {**record, "hf": _parting(record["hf"])}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Mode, plan, batch, precision and exactness of a text."""

    dtype: str
    exact: str
    mode: str
    plan: str | None
    batch: int

    @property
    def claimed(self) -> bool:
        """Whether these texts are promised to be plain decoding's own, token for token."""
        return self.exact == "token" or self.dtype == "float32"

    @property
    def label(self) -> str:
        return Contender(self.mode, self.plan).name


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict(Result):
    """One measured text, compared; "identical" and "diverges_at" of its line compare with the reference.

    Attributes:
        gap: the reference's gap where the texts part (`Divergence`).
        hf: where the text leaves Hugging Face's; gaps are the reference's, where it says the same up to there.
    """

    gap: float | None
    hf: Divergence | None
    conditions: Mapping[str, Any]

    @property
    def key(self) -> Key:
        return self.dtype, str(self.exact), self.suite, self.id

    @property
    def setting(self) -> Setting:
        return Setting(dtype=self.dtype, exact=str(self.exact), mode=self.mode, plan=self.plan, batch=self.batch)

    @property
    def parting(self) -> Divergence | None:
        """Where the text leaves the reference; None where the two are equal."""
        return None if self.diverges_at is None else Divergence(self.diverges_at, self.gap)

    @property
    def tokens(self) -> int:
        return int(self.stats["emitted"])

    @property
    def passes(self) -> int:
        """Passes that it took, the prompt's included."""
        return int(self.stats["forwards"])

    def to_record(self) -> Record:
        record = {"kind": self.kind, **asdict(self)}
        added = {name: record.pop(name) for name in ("gap", "hf", "conditions")}
        return {**record, "audit": added}

    @classmethod
    def values(cls, record: Record) -> Record:
        """Return a record's values by the names of fields."""
        return {**record, **record["audit"], "hf": _parting(record["audit"]["hf"])}


def close(gaps: Sequence[float]) -> list[int]:
    """Count the gaps below each of `MARGINS`."""
    return [sum(gap < margin for gap in gaps) for margin in MARGINS]


def from_hf(
    text: Sequence[int], hf: Sequence[int], reference: Sequence[int], gaps: Sequence[float]
) -> Divergence | None:
    """Say where a text leaves Hugging Face's, with the reference's gap there as long as it says the same."""
    at, parted = first_difference(text, hf), first_difference(text, reference)
    if at is None:
        return None
    return Divergence(at, gaps[at] if at < len(gaps) and (parted is None or at <= parted) else None)


def read(records: Iterable[Record], configuration: str, *, where: str) -> tuple[list[Reference], list[Verdict]]:
    """Return an audit's references and verdicts among records, those of one configuration.

    Raises DataError for a line of a result or reference that no audit wrote.
    """
    mine = [record for record in records if record.get("configuration") == configuration]
    references = {reference.key: reference for reference in Reference.read(mine, where=where)}
    return list(references.values()), Verdict.read(mine, where=where)


def _parting(value: Mapping[str, Any] | None) -> Divergence | None:
    return None if value is None else Divergence(**value)
