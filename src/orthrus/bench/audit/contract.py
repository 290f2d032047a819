"""The audit's contract: what is promised of texts and passes, and whether the verdicts meet it."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

from orthrus.bench.audit.verdicts import Verdict

EPSILON: Final = 1e-3
COUNTED: Final = "full"
"""The plan whose cycles each write at least as many tokens as they take passes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contract:
    """The promises, and the texts that break them.

    Attributes:
        epsilon: mixtures of experts may part where the reference's two best logits are at most this far apart.
        ties: promised texts that part within epsilon, experts only.
        counted: texts under `full`, whose passes are promised to be no more than plain decoding's: one per token. Not
            those of exact="token" where the probe found that first tokens have to be verified.
    """

    epsilon: float
    experts: bool
    texts: int
    ties: list[Verdict]
    broken: list[Verdict]
    counted: int
    wasteful: list[Verdict]

    @property
    def holds(self) -> bool:
        return not self.broken and not self.wasteful

    def to_dict(self) -> dict[str, Any]:
        return {
            "holds": self.holds,
            **asdict(self),
            "ties": [_text(v) | {"at": v.diverges_at, "gap": v.gap} for v in self.ties],
            "broken": [_text(v) | {"at": v.diverges_at, "gap": v.gap} for v in self.broken],
            "wasteful": [_text(v) | {"tokens": v.tokens, "passes": v.passes} for v in self.wasteful],
        }


def contract(verdicts: Iterable[Verdict], *, epsilon: float = EPSILON, experts: bool = False) -> Contract:
    """Compare texts with the promises: all texts in float32, and with exact="token" at any precision."""
    every = list(verdicts)
    promised = [verdict for verdict in every if verdict.setting.claimed]
    parted = [verdict for verdict in promised if verdict.parting is not None]
    ties = [v for v in parted if experts and v.gap is not None and v.gap <= epsilon]
    counted = [v for v in every if v.setting.plan == COUNTED and _trusts_first(v)]
    return Contract(
        epsilon=epsilon,
        experts=experts,
        texts=len(promised),
        ties=ties,
        broken=[verdict for verdict in parted if verdict not in ties],
        counted=len(counted),
        wasteful=[verdict for verdict in counted if verdict.passes > verdict.tokens],
    )


def _trusts_first(verdict: Verdict) -> bool:
    finding = verdict.conditions.get("finding")
    return finding is None or bool(finding["drafts_exact"])


def _text(verdict: Verdict) -> dict[str, Any]:
    return {**asdict(verdict.setting), "suite": verdict.suite, "id": verdict.id}
