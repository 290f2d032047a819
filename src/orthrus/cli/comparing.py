"""Texts that two modes wrote to the same prompts: whether they are the same, and how many times as fast one came.

One form for `demo`, `generate --compare` and `doctor`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orthrus.cli.common import rate

if TYPE_CHECKING:
    from orthrus.decode.output import Stats


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What one mode wrote: the tokens of each text, what all of them cost, and the seconds they took (0: not timed)."""

    texts: list[list[int]]
    stats: "Stats"
    seconds: float = 0.0

    @classmethod
    def total(cls, parts: "Sequence[Written]") -> "Written":
        from orthrus.decode.output import Stats

        return cls(
            texts=[text for part in parts for text in part.texts],
            stats=Stats.total(part.stats for part in parts),
            seconds=sum(part.seconds for part in parts),
        )

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all texts per second, prefill included."""
        return rate(self.stats.emitted, self.seconds)

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds,
            "stats": self.stats.to_dict(),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Plain decoding and Orthrus over the same prompts."""

    plain: Written
    made: Written

    @classmethod
    def total(cls, parts: "Sequence[Comparison]") -> "Comparison":
        return cls(
            plain=Written.total([part.plain for part in parts]), made=Written.total([part.made for part in parts])
        )

    @property
    def each(self) -> list[bool]:
        """For each text, whether both modes wrote the same tokens."""
        return [made == plain for made, plain in zip(self.made.texts, self.plain.texts, strict=True)]

    @property
    def identical(self) -> bool:
        return all(self.each)

    @property
    def speedup(self) -> float:
        """Orthrus's tokens per second over plain decoding's."""
        return self.made.tokens_per_second / self.plain.tokens_per_second
