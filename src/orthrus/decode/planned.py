"""The planner behind the protocol of `policy`, until that takes its place."""

from collections.abc import Sequence
from dataclasses import dataclass

from orthrus.decode.experience import Experience
from orthrus.decode.planner import Planner
from orthrus.decode.worth import Record
from orthrus.policy.acceptance import Acceptance, RowOutcome, RowState
from orthrus.policy.lookup import Copy, Match
from orthrus.policy.steps import Plan, Step

_KINDS: dict[Match | None, Copy | None] = {"short": "lookup", "long": "echo", None: None}


@dataclass(slots=True, kw_only=True)
class _State(RowState):
    record: Record


class Planned:
    """Choose steps by a `Planner`, asked and told as a `Policy` is."""

    def __init__(self, plan: Plan, *, block: int, experience: Experience | None = None) -> None:
        self.planner = Planner(plan, block=block, experience=experience)
        self.steps, self.scratch, self.copies = self.planner.steps, self.planner.scratch, self.planner.copies
        self._slots = block - 1
        self._records: list[Record] = []
        self._matches: list[Copy | None] | None = None

    @property
    def prefill_drafts(self) -> int:
        """How many drafts the pass that reads a prompt should make for the first step; 0 for none."""
        return self.planner.first_drafts

    def new_row(self) -> RowState:
        """Return the state of a row of which nothing is known yet."""
        return _State(Acceptance(self._slots), record=Record(slots=self._slots))

    def choose(self, rows: Sequence[RowState], room: int | None = None) -> Step:
        """Return the next step, the same for all rows."""
        self._records = [row.record for row in rows if isinstance(row, _State)]
        self._matches = [_KINDS[row.match] for row in rows] if self.copies else None
        ready, blind = min(row.ready for row in rows), any(row.blind for row in rows)
        return self.planner.choose(self._records, self._matches, ready=ready, blind=blind, room=room)

    def learn(self, step: Step, outcomes: Sequence[RowOutcome], seconds: float) -> None:
        """Learn from a step that was taken."""
        drew = {outcome.drew for outcome in outcomes}
        chains = [outcome.chain for outcome in outcomes if outcome.chain is not None]
        exits = [outcome.exit for outcome in outcomes if outcome.exit is not None]
        self.planner.observe(
            step,
            self._records,
            [outcome.kept for outcome in outcomes],
            seconds,
            self._matches,
            drew=drew.pop() if len(drew) == 1 else None,
            blind=[outcome.source == "ahead" for outcome in outcomes],
            copied=[outcome.source == "text" for outcome in outcomes],
            foreseen=[outcome.copy_kept for outcome in outcomes],
            ranks=exits if len(exits) == len(outcomes) else None,
            inside=chains if len(chains) == len(outcomes) else None,
        )
