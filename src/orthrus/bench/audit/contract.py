"""What is promised of texts and passes, and a yes or no: does it hold?

Pure functions of verdicts. Knows what is claimed at which precision and under which plan; knows no model.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

from orthrus.bench.audit.verdicts import Parting, Verdict

EPSILON: Final = 1e-3
COUNTED: Final = "full"
"""The plan whose every cycle advances a text by at least as many tokens as it takes passes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Who wrote, how many rows at once, at which precision, under which promise."""

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
    """How many passes one text took for its tokens."""

    setting: Setting
    suite: str
    id: str
    tokens: int
    passes: int

    @property
    def wasteful(self) -> bool:
        """Whether plain decoding takes fewer: one for the prompt and one a token.

        A text that ends on a first token has one pass more, whose drafts nobody wants.
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
    """What was promised, and what broke it.

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
        """Whether nothing broke it."""
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
    """Hold texts against what is promised: all of float32's, and at any precision those of exact="token".

    Under the plan `full`, at any precision, passes are counted too.
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
