"""What planners of one model have learned together, and how it is kept from one process to the next.

What steps cost and what drafts are worth is learned while decoding. It stays with the model while that is loaded, and
goes to a small file then (`orthrus.memory`), so that only the first process on a machine begins with nothing. No text
depends on any of this.
"""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, get_args

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from orthrus import memory
from orthrus.decode.costs import Costs
from orthrus.decode.worth import Record, Rescue, usually_met
from orthrus.model.attachment import attachment_of, config_of
from orthrus.model.fingerprint import key_of, state_of
from orthrus.policy.steps import Kind, Plan, Step, step_of

KIND: Final = "experience"
"""Under which `orthrus.memory` keeps it."""

_FORMAT: Final = 3
_WORTH_KEEPING: Final = 64
"""Turns after which there is something to keep."""


@dataclass(slots=True)
class Decision:
    """The best known step of a situation, what it promised, and for how many more cycles it stands.

    Attributes:
        step: the step.
        tokens: tokens it is expected to give each time.
        speed: and per second.
        uses: cycles for which it still stands.
        owed: tokens it has given less than promised, never below none.
    """

    step: Step
    tokens: float = 0.0
    speed: float = 0.0
    uses: int = 0
    owed: float = 0.0

    def settle(self, tokens: int, seconds: float) -> None:
        """Hold what a cycle gave against what was promised: it falls when it owes what it gives in one cycle."""
        self.owed = max(self.owed + seconds * self.speed - tokens, 0.0)
        if self.owed > self.tokens:
            self.uses = 0


@dataclass(slots=True)
class Experience:
    """What engines of one model have learned together: costs, what drafts were worth lately, what may be spent.

    Attributes:
        worth: the record over all rows: a new row's prior.
        costs: seconds per step.
        rescues: what trees keep more than chains that break off.
        allowance: seconds that may be lost by looking at steps other than the best known one.
        turn: steps seen so far.
        used: the turn at which each kind was last used,
        longest: and the longest chain.
        last: what was decided last.
        standing: the latest decision in each situation.
        look_from: the allowance from which on looks are to be thought of again.
        vain: looks since another kind of step became the best somewhere.
        usual_met: `usually_met` of the record over all rows.
        hopeless: the turn until which one-pass steps are not weighed, since none came near the best.
    """

    worth: Record
    costs: Costs = field(default_factory=Costs)
    rescues: dict[Step, Rescue] = field(default_factory=dict)
    allowance: float | None = None
    turn: int = 0
    used: dict[Kind, int] = field(default_factory=dict)
    longest: int = 0
    last: Step | None = None
    standing: dict[tuple[object, ...], Decision] = field(default_factory=dict)
    look_from: float = 0.0
    vain: int = 0
    usual_met: NDArray[np.float64] = field(default_factory=lambda: usually_met(Record(slots=0)))
    hopeless: int = 0

    def to_record(self) -> dict[str, Any]:
        """Return what holds beyond this process, as JSON values; what was decided is to be decided anew."""
        return {
            "costs": self.costs.to_record(),
            "worth": self.worth.to_record(),
            "rescues": [[*step, *rescue.to_record()] for step, rescue in self.rescues.items()],
            "allowance": self.allowance,
            "turn": self.turn,
            "used": self.used,
            "longest": self.longest,
            "last": None if self.last is None else [*self.last],
            "vain": self.vain,
            "hopeless": self.hopeless,
        }

    @classmethod
    def of(cls, block: int) -> "Experience":
        """Begin with nothing, for a view of so long blocks."""
        return cls(worth=Record(slots=block - 1, fade=0.99))

    @classmethod
    def from_record(cls, record: Mapping[str, Any], *, block: int) -> "Experience":
        """Take up what an earlier process learned; raises KeyError, TypeError or ValueError for anything else.

        What a plain step takes, which all others are weighed against, is to be seen anew: on another day it may be
        another share of theirs.
        """
        known = cls(
            costs=Costs.from_record(record["costs"]),
            worth=Record(slots=block - 1, fade=0.99),
            allowance=None if record["allowance"] is None else float(record["allowance"]),
            turn=int(record["turn"]),
            used={kind: int(record["used"][kind]) for kind in get_args(Kind)[1:] if kind in record["used"]},
            longest=int(record["longest"]),
            last=None if record["last"] is None else step_of(record["last"]),
            vain=int(record["vain"]),
            hopeless=int(record["hopeless"]),
        )
        known.worth.restore(record["worth"])
        known.usual_met = usually_met(known.worth)
        for *shape, more, breaks in record["rescues"]:
            step = step_of(shape)
            known.rescues[step] = Rescue(step)
            known.rescues[step].restore(more, breaks)
        return known


def experience_of(model: PreTrainedModel, exact: str, plan: Plan) -> Experience:
    """Return what is known of this model's steps on its device; engines that weigh the same kinds learn together.

    Those of one kind of step weigh nothing, and would only teach others what to make of texts they decode otherwise.
    """
    known: dict[object, Experience] = attachment_of(model).memo(KIND)
    view = config_of(model)
    state = (view, exact, plan.kinds, *key_of(model))
    if state not in known:
        if not attachment_of(model).remembers:
            known[state] = Experience.of(view.block_size)
        else:
            about = {"format": _FORMAT, **state_of(model), "exact": exact, "kinds": sorted(plan.kinds)}
            about |= {"block": view.block_size, "attention_in_blocks": view.block_attention}
            known[state] = _recalled(about, view.block_size)
            weakref.finalize(model, _keep, about, known[state], known[state].turn)
    return known[state]


def begin_anew(model: PreTrainedModel) -> None:
    """Let planners of a model begin with nothing, whatever was learned before, and let nothing about it outlive it."""
    attachment_of(model).memo(KIND).clear()
    attachment_of(model).remembers = False


def _recalled(about: Mapping[str, Any], block: int) -> Experience:
    record = memory.recall(KIND, about)
    if record is None:
        return Experience.of(block)
    try:
        return Experience.from_record(record, block=block)
    except (KeyError, TypeError, ValueError):
        return Experience.of(block)


def _keep(about: Mapping[str, Any], known: Experience, before: int) -> None:
    """Keep what was learned, if there is more than before."""
    if known.turn >= max(before + 1, _WORTH_KEEPING):
        memory.keep(KIND, about, known.to_record())
