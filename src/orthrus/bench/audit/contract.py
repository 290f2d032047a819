"""The audit's contract: what is promised of texts and passes, and whether the verdicts meet it.

Pure functions of verdicts.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

from orthrus.bench.audit.verdicts import Parting, Verdict

EPSILON: Final = 1e-3
COUNTED: Final = "full"
"""The plan whose cycles each write at least as many tokens as they take passes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Mode, plan, batch, precision and exactness of a text."""

    dtype: str
    exact: str
    mode: str
    plan: str | None
    batch: int

    @classmethod
    def of(cls, verdict: Verdict) -> "Setting":
        """Return the setting of one text."""
        r = verdict.result
        return cls(dtype=r.dtype, exact=str(r.exact), mode=r.mode, plan=r.plan, batch=r.batch)

    @property
    def claimed(self) -> bool:
        """Whether these texts are promised to be plain decoding's own, token for token."""
        return self.exact == "token" or self.dtype == "float32"

    @property
    def label(self) -> str:
        """Mode and plan in words."""
        return " ".join(filter(None, (self.mode, self.plan)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """One text that is not the reference."""

    setting: Setting
    suite: str
    id: str
    parting: Parting

    def to_dict(self) -> dict[str, Any]:
        """Return the mismatch as plain JSON values."""
        return {**asdict(self.setting), "suite": self.suite, "id": self.id, **asdict(self.parting)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """The tokens of one text, and the passes that they took."""

    setting: Setting
    suite: str
    id: str
    tokens: int
    passes: int

    @property
    def wasteful(self) -> bool:
        """Whether plain decoding takes fewer: one for the prompt and one per token.

        A text that ends on a first token may have one pass more, whose drafts are not needed.
        """
        return self.passes > 1 + self.tokens + 1

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as plain JSON values."""
        return {
            **asdict(self.setting),
            "suite": self.suite,
            "id": self.id,
            "tokens": self.tokens,
            "passes": self.passes,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Contract:
    """The promises, and the texts that break them.

    Attributes:
        epsilon: mixtures of experts may part where the reference's two best logits are at most this far apart.
        experts: whether the backbone is one; of a dense backbone every mismatch breaks the contract.
        texts: how many texts were promised to equal their reference.
        ties: promised texts that part within epsilon, experts only.
        broken: promised texts that part otherwise.
        counted: texts under `full`, whose passes are promised to be no more than plain decoding's.
        wasteful: of them, those that took more.
    """

    epsilon: float
    experts: bool
    texts: int
    ties: list[Mismatch]
    broken: list[Mismatch]
    counted: int
    wasteful: list[Passes]

    @property
    def holds(self) -> bool:
        """Whether no text breaks it."""
        return not self.broken and not self.wasteful

    def to_dict(self) -> dict[str, Any]:
        """Return the contract as plain JSON values."""
        return {
            "holds": self.holds,
            "epsilon": self.epsilon,
            "experts": self.experts,
            "texts": self.texts,
            "ties": [mismatch.to_dict() for mismatch in self.ties],
            "broken": [mismatch.to_dict() for mismatch in self.broken],
            "counted": self.counted,
            "wasteful": [text.to_dict() for text in self.wasteful],
        }


def contract(verdicts: Iterable[Verdict], *, epsilon: float = EPSILON, experts: bool = False) -> Contract:
    """Compare texts with the promises: all texts in float32, and with exact="token" at any precision.

    Under the plan `full` passes are counted too, at any precision.
    """
    texts = counted = 0
    wasteful: list[Passes] = []
    ties: list[Mismatch] = []
    broken: list[Mismatch] = []
    for verdict in verdicts:
        setting, at = Setting.of(verdict), verdict.result.diverges_at
        texts += setting.claimed
        if setting.plan == COUNTED:
            counted += 1
            tokens, passes = (verdict.result.stats[name] for name in ("emitted", "forwards"))
            text = Passes(
                setting=setting, suite=verdict.result.suite, id=verdict.result.id, tokens=tokens, passes=passes
            )
            wasteful += [text] if text.wasteful else []
        if setting.claimed and at is not None:
            tied = experts and verdict.gap is not None and verdict.gap <= epsilon
            parting = Parting(at, verdict.gap)
            mismatch = Mismatch(setting=setting, suite=verdict.result.suite, id=verdict.result.id, parting=parting)
            (ties if tied else broken).append(mismatch)
    return Contract(
        epsilon=epsilon,
        experts=experts,
        texts=texts,
        ties=ties,
        broken=broken,
        counted=counted,
        wasteful=wasteful,
    )
