"""What decoding returns: completions, stream chunks, and the statistics, defined here and nowhere else.

Knows no model and no tokenizer.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Final, Literal

from orthrus.decode.text import Prompt

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(kw_only=True, slots=True)
class Stats:
    """Count what a completion cost and what its drafts were worth.

    Attributes:
        cycles: draft + verify cycles.
        plain_steps: forward passes that carried no draft.
        forwards: passes of the backbone up to the one that wrote the last token: the prompt's (however many it
            took), which gives a token, two per cycle (one where a pass before has drafted ahead), one per plain step
            (the paper's denominator, equation 9).
        draft_passes: passes of other drafters than the model's own view, by their names.
        first_tokens: tokens that passes which draft gave before their drafts: the backbone's own, no drafts. A prompt's
            pass counts with the cycle that takes its drafts.
        drafted: draft tokens proposed.
        accepted: draft tokens emitted. Drafts the backbone agreed with past the end of the text do not count.
        emitted: tokens of the completion.
        proposed_per_position: how often slot j was drafted.
        accepted_at_position: how often slot j's draft was emitted.
    """

    cycles: int = 0
    plain_steps: int = 0
    first_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    emitted: int = 0
    forwards: int = 1
    draft_passes: dict[str, int] = field(default_factory=dict)
    proposed_per_position: list[int] = field(default_factory=list)
    accepted_at_position: list[int] = field(default_factory=list)

    def record(
        self,
        *,
        drafted: int,
        accepted: int,
        emitted: int,
        forwards: int,
        first: bool = False,
        drafter: str | None = None,
        draft_passes: int = 0,
    ) -> None:
        """Add one step.

        Args:
            drafted: drafts proposed; of them the text got those `accepted`, and so many tokens were `emitted` in all.
            forwards: passes it took; none where the prompt's own, which is counted, has given a token.
            first: whether the pass that drafted gave a first token. A plain step has neither this nor drafts.
            drafter: another drafter than the model's own view, where one has made the drafts, and
            draft_passes: how many passes of its own it took.
        """
        self.emitted += emitted
        self.forwards += forwards
        if drafter is not None:
            self.draft_passes[drafter] = self.draft_passes.get(drafter, 0) + draft_passes
        if not (drafted or first):
            self.plain_steps += forwards
            return
        self.cycles += forwards > 0
        self.first_tokens += first
        self.drafted += drafted
        self.accepted += accepted
        for slots, count in ((self.proposed_per_position, drafted), (self.accepted_at_position, accepted)):
            slots += [0] * (drafted - len(slots))
            slots[:count] = [times + 1 for times in slots[:count]]

    def add(self, part: "Stats") -> None:
        """Add another completion's counts."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(part, name))
        for drafter, passes in part.draft_passes.items():
            self.draft_passes[drafter] = self.draft_passes.get(drafter, 0) + passes
        for name in ("proposed_per_position", "accepted_at_position"):
            pairs = zip_longest(getattr(self, name), getattr(part, name), fillvalue=0)
            setattr(self, name, list(map(sum, pairs)))

    @property
    def tokens_per_forward(self) -> float:
        """Emitted tokens per forward pass (the paper's TPF)."""
        return self.emitted / self.forwards if self.forwards else 0.0

    @property
    def acceptance_length(self) -> float:
        """Accepted drafts per cycle, without the bonus token (the paper's figure 4)."""
        return self.accepted / self.cycles if self.cycles else 0.0

    @property
    def tokens_per_cycle(self) -> float:
        """First token, accepted drafts and bonus token per cycle; 0 without cycles.

        Others call it acceptance length.
        """
        return (self.first_tokens + self.accepted) / self.cycles + 1 if self.cycles else 0.0

    @property
    def accepted_per_position(self) -> list[float]:
        """How often slot j's draft was accepted, given that it was proposed."""
        pairs = zip(self.accepted_at_position, self.proposed_per_position, strict=True)
        return [accepted / proposed for accepted, proposed in pairs]

    @classmethod
    def total(cls, parts: Iterable["Stats"]) -> "Stats":
        """Sum statistics over completions; ratios of the sum are the pooled figures."""
        out = cls(forwards=0)
        for part in parts:
            out.add(part)
        return out

    def to_dict(self) -> dict[str, Any]:
        """Return counts and ratios under the names used in every JSON this package writes."""
        counts = {name: getattr(self, name) for name in (*_COUNTS, *_RATIOS)}
        return counts | ({"draft_passes": dict(self.draft_passes)} if self.draft_passes else {})


_COUNTS: Final = ("cycles", "forwards", "plain_steps", "first_tokens", "drafted", "accepted", "emitted")
_RATIOS: Final = ("tokens_per_forward", "acceptance_length", "tokens_per_cycle", "accepted_per_position")


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One finished text.

    Attributes:
        prompt: the prompt as given; tensors as lists.
        text: the decoded completion, special tokens left out.
        token_ids: its tokens, the end-of-text token included where one was written.
        finish_reason: "stop" (end-of-text token or stop string), "length", "abort", or "error".
        stats: what it cost.
        error: what went wrong where it ends with "error"; the text is what was written before.
    """

    prompt: Prompt
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: Stats
    error: Exception | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the completion as plain JSON values."""
        return {
            "prompt": self.prompt,
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "stats": self.stats.to_dict(),
        } | ({} if self.error is None else {"error": str(self.error)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """What one cycle added to a streamed text.

    Attributes:
        first_text: text of the backbone's own token before the drafts, where the draft pass gave one.
        draft_text: text of the accepted drafts.
        bonus_text: text of the backbone's own token after them.
        token_ids: the cycle's tokens.
        accepted: how many of them were drafts.
        finish_reason: set on the last chunk only.
        stats: the completion's statistics so far.
    """

    first_text: str = ""
    draft_text: str
    bonus_text: str
    token_ids: list[int]
    accepted: int
    finish_reason: FinishReason | None
    stats: Stats

    @property
    def text(self) -> str:
        """The text this cycle added."""
        return self.first_text + self.draft_text + self.bonus_text
