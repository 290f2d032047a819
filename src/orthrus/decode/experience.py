"""What planners of one model have learned together, and how it is kept from one process to the next.

What steps cost and what drafts are worth is learned while decoding. It stays with the model while that is loaded, and
goes to a small file then, so that only the first process on a machine begins with nothing. A file that is missing,
damaged or of another version costs that beginning and nothing else; no text depends on any of this.
"""

import json
import logging
import os
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from orthrus.decode.costs import Costs
from orthrus.decode.plan import Kind, Plan, Step, step_of
from orthrus.decode.worth import Record, Rescue, usually_met
from orthrus.model.checkpoint import weights_digest
from orthrus.model.compiled import is_compiled
from orthrus.model.packed import kernels_of
from orthrus.provenance import device_name, digest

FOLDER: Final = "ORTHRUS_CACHE"
"""Environment variable that names the folder of what is kept; empty: nothing is."""

_LEARNED_HERE: Final = "_orthrus_experience"
_ANEW: Final = "_orthrus_begins_anew"
_FORMAT: Final = 1
_WORTH_KEEPING: Final = 64
"""Turns after which there is something to keep."""

_log = logging.getLogger(__name__)


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
        costs: seconds per step.
        worth: the record over all rows: a new row's prior.
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

    costs: Costs = field(default_factory=Costs)
    worth: Record = field(default_factory=lambda: Record(fade=0.99))
    rescues: dict[Step, Rescue] = field(default_factory=dict)
    allowance: float | None = None
    turn: int = 0
    used: dict[Kind, int] = field(default_factory=dict)
    longest: int = 0
    last: Step | None = None
    standing: dict[tuple[int, ...], Decision] = field(default_factory=dict)
    look_from: float = 0.0
    vain: int = 0
    usual_met: NDArray[np.float64] = field(default_factory=lambda: usually_met(Record()))
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
    def from_record(cls, record: Mapping[str, Any]) -> "Experience":
        """Take up what an earlier process learned; raises KeyError, TypeError or ValueError for anything else.

        What a plain step takes, which all others are weighed against, is to be seen anew: the machine may have another
        pace by now.
        """
        known = cls(
            costs=Costs.from_record(record["costs"]),
            rescues={},
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
    known: dict[object, Experience] = model.__dict__.setdefault(_LEARNED_HERE, {})
    state = (str(model.device), model.dtype, torch.get_num_threads(), exact, plan.kinds)
    if state not in known:
        place = None if model.__dict__.get(_ANEW) else folder()
        if place is None:
            known[state] = Experience()
        else:
            about = _about(model, exact, plan)
            file = place / f"{digest(about)}.json"
            known[state] = _recalled(file, about)
            weakref.finalize(model, _keep, file, about, known[state], known[state].turn)
    return known[state]


def begin_anew(model: PreTrainedModel) -> None:
    """Let planners of a model begin with nothing, whatever was learned before, and keep nothing of what they learn."""
    model.__dict__[_LEARNED_HERE], model.__dict__[_ANEW] = {}, True


def folder() -> Path | None:
    """Return where what planners learn is kept; None where nothing is."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    named = os.environ.get(FOLDER, f"{caches}/orthrus")
    return Path(named, "experience").expanduser() if named else None


def _about(model: PreTrainedModel, exact: str, plan: Plan) -> dict[str, Any]:
    """Return all that what is learned depends on."""
    return {
        "format": _FORMAT,
        "weights": weights_digest(model),
        "device": device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "attention": model.config._attn_implementation,
        "compiled": is_compiled(model),
        "packed": sorted(str(kernels) for kernels in kernels_of(model)),
        "torch": torch.__version__,
        "exact": exact,
        "kinds": sorted(plan.kinds),
    }


def _recalled(file: Path, about: Mapping[str, Any]) -> Experience:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["about"] == about:
            return Experience.from_record(record["learned"])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.info("%s is not what planners keep (%s): they begin with nothing", file, error)
    return Experience()


def _keep(file: Path, about: Mapping[str, Any], known: Experience, before: int) -> None:
    """Write what was learned, if there is more than before; of several processes the last one's stays."""
    if known.turn < max(before + 1, _WORTH_KEEPING):
        return
    text = json.dumps({"about": about, "learned": known.to_record()})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, suffix=".tmp", delete=False) as new:
            new.write(text)
        Path(new.name).replace(file)
    except OSError as error:
        _log.info("what planners learned is not kept in %s: %s", file, error)
