"""Which step comes next, decided from what was accepted lately and from what steps were measured to cost.

Decisions are a pure function of those numbers: the clock is the engine's, and no decision ever changes a text.

Shapes: B rows, W ways to draft, M slots, S steps.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from orthrus.decode.experience import Decision, Experience
from orthrus.decode.worth import (
    AHEAD,
    CHAIN,
    COPY,
    WAYS,
    Record,
    Rescue,
    Way,
    cell,
    expected,
    rate,
    usually_met,
)
from orthrus.policy.lookup import Copy
from orthrus.policy.steps import Kind, Plan, Step


class Look(NamedTuple):
    """A step taken to see what it costs by now.

    Attributes:
        step: the step.
        worth: seconds in which the best known step is expected to write as much, less what is thrown away for this one.
        least, most: seconds that are taken from the allowance for it, whatever it took.
    """

    step: Step
    worth: float
    least: float
    most: float

    def cost(self, seconds: float) -> float:
        """Return the seconds lost by it, having taken so many: what a bad moment of the machine adds is not its own."""
        return max(min(seconds - self.worth, self.most), self.least)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a plan's steps stand among each other, and what of them never changes.

    Attributes:
        kinds: each step's kind.
        drafts_S: and drafts.
        slots: the most drafts, and
        widest: the most scratch that one of them takes.
        place_S: its place in a table of expected tokens, way after way.
        chains, trees, fused: where the steps of a kind stand, one after another.
        longest: where the longest chain stands.
        hit_F: of one-pass steps, the cell of a record that counts them,
        certain_F: whether they draft for all stops,
        positions_F: positions of the cache they take, and
        forked_F: whether they verify a tree.
        grown: the trees that some of them verify, fused or not, and
        grown_T, grown_F: which of these a tree and a one-pass step verifies, the last place for none.
        ends: those measured first of all one-pass steps: of chains the widest's drafts with two stops, and the widest.
    """

    kinds: list[Kind]
    drafts_S: NDArray[np.int64]
    slots: int
    widest: int
    place_S: NDArray[np.int64]
    chains: slice
    trees: slice
    fused: slice
    longest: int
    hit_F: NDArray[np.int64]
    certain_F: NDArray[np.bool_]
    positions_F: NDArray[np.int64]
    forked_F: NDArray[np.bool_]
    grown: list[Step]
    grown_T: NDArray[np.int64]
    grown_F: NDArray[np.int64]
    ends: list[int]


@lru_cache
def layout(steps: tuple[Step, ...]) -> Layout:
    """Lay out a plan's steps, once for all engines that take them."""
    kinds: list[Kind] = [step.kind for step in steps]

    def all_of(kind: Kind) -> slice:
        first = kinds.index(kind) if kind in kinds else 0
        return slice(first, first + kinds.count(kind))

    drafts_S = np.array([step.drafts for step in steps])
    slots = int(drafts_S.max())
    way_S = np.array([COPY if step.lookup else CHAIN for step in steps])
    fused = steps[all_of("onepass")]
    chains = [step for step in fused if not step.nodes]
    widest = max(chains, key=lambda step: step.scratch, default=Step())
    few = [step for step in chains if step.drafts == widest.drafts and step.stops <= 2]
    trees = steps[all_of("tree")]
    grown = sorted({step._replace(stops=0) for step in (*trees, *fused) if step.nodes})
    return Layout(
        kinds=kinds,
        drafts_S=drafts_S,
        slots=slots,
        widest=max(step.scratch for step in steps),
        place_S=way_S * (slots + 1) + drafts_S,
        chains=all_of("chain"),
        trees=all_of("tree"),
        fused=all_of("onepass"),
        longest=max(all_of("chain").stop - 1, 0),
        hit_F=np.array([cell(step) for step in fused], dtype=int),
        certain_F=np.array([step.stops > (step.nodes or step.drafts) for step in fused], dtype=bool),
        positions_F=np.array([step.scratch for step in fused], dtype=int),
        forked_F=np.array([step.nodes > 0 for step in fused], dtype=bool),
        grown=grown,
        grown_T=np.array([grown.index(step) for step in trees], dtype=int),
        grown_F=np.array(
            [grown.index(step._replace(stops=0)) if step.nodes else len(grown) for step in fused], dtype=int
        ),
        ends=[steps.index(step) for step in (*few[-1:], widest) if step.stops],
    )


class Planner:
    """Choose each step. Engines of one model share costs, what stands, and, as a prior, what drafts were worth.

    `auto` maximises expected tokens per second over the live rows. A one-pass step counts as what taking it for good
    gives: where acceptance stops at a place that it has drafted for, the next one needs no draft pass, but has to do
    with drafts made ahead. Kinds of step that are not in use are looked at again from an allowance, a small share of
    the time spent, less what looks have lost, so that looking for better costs a bounded part; of a quarter of that
    share in the end, while looks change nothing. Deciding takes time as well: a decision that has been confirmed stands
    in its situation while it keeps its promise, for some cycles at most or until there is something to spend on a look.

    One-pass steps, the dearest to try, are looked at only where they could come near what is best: at what they were
    measured to cost, or else at the least that they can. Where none does, they are not weighed for some turns either.
    """

    STANDS = 16
    PROBE_SHARE = 0.02
    VAIN = 8
    RARER = 4
    FIRST_PROBES = 4
    FIRST_TURNS = 64
    MARGIN = 0.05
    FORKED = 0.032
    HOPE = 0.8
    HOPELESS = 16
    SITUATIONS = 64
    RENEWED = 256

    def __init__(self, plan: Plan, *, block: int, experience: Experience | None = None) -> None:
        self.plan = plan
        self.steps = plan.steps(block)
        self.scratch = plan.scratch(block)
        self.known = experience or Experience.of(block)
        self.copies = any(step.lookup for step in self.steps)
        self.look: Look | None = None
        self._decision: Decision | None = None  # under which the step chosen last is taken
        self._at = layout(self.steps)

    @property
    def first_drafts(self) -> int:
        """How many drafts the pass that reads a prompt should make for the first step, as far as can be told.

        0 where the step may need none, and under plans that ask for a draft pass in every cycle.
        """
        if len(self.steps) == 1:
            return self.steps[0].drafts if self.steps[0].stops else 0
        last = self.known.last
        return self._at.slots if last is None or last.kind in ("chain", "tree", "onepass") else 0

    @property
    def draws(self) -> bool:
        """Whether the step chosen last is to draft anew, whatever was drafted before: to see what all of it costs."""
        return self.look is not None and self.look.step.kind != "onepass"

    def choose(
        self,
        rows: Sequence[Record],
        found: Sequence[Copy | None] | None = None,
        *,
        ready: int = 0,
        blind: bool = False,
        room: int | None = None,
    ) -> Step:
        """Return the next step for rows with these records.

        Args:
            rows: their records.
            found: what a copy of each text would be of; None where there is nothing to copy.
            ready: drafts that the pass before has made for every row, for the step to use.
            blind: whether these were made without knowing the token before them.
            room: cache positions left in every row, `scratch` at least; None for as many as may be.
        """
        self.look = None
        if len(self.steps) == 1:
            return self.steps[0]
        known, situation = self.known, (len(rows), ready, blind, *_kinds(found or ()))
        room = self._at.widest if room is None else room
        before = known.standing.get(situation)
        can_look = known.allowance is not None and known.allowance >= known.look_from
        if before is not None and before.uses and before.step.scratch <= room and not can_look:
            before.uses -= 1
            known.last, self._decision = before.step, before
            return before.step
        decided, self.look = self._decide(rows, found, ready, blind, room)
        self._decision = None
        if self.look is not None:
            known.vain += 1
            if before is not None:
                before.uses = 0
            return self.look.step
        changed = before is not None and before.step.kind != decided.step.kind
        known.vain = 0 if changed else known.vain
        if changed or len(known.standing) >= self.SITUATIONS:
            known.standing.clear()  # what was better than the other kind is to be seen anew
        if before is not None and before.step == decided.step and known.turn >= self.FIRST_TURNS:
            decided.uses = self.STANDS
        known.standing[situation] = self._decision = decided
        known.last = decided.step
        return decided.step

    def copying(self, step: Step, rows: Sequence[Record], found: Sequence[Copy | None] | None) -> list[bool]:
        """Return which rows' drafts are copies: in a chain, of those that found any, where copies promise more.

        None where the chain is taken to see what it costs; a single row's would have been a step of their own.
        """
        found = [None] * len(rows) if found is None else found
        if step.kind != "chain" or self.draws or len(rows) == 1 or not any(found):
            return [step.lookup] * len(rows)
        token_BWM = self._expected(rows, found, slots=step.drafts)
        better = token_BWM[:, COPY, -1] > token_BWM[:, CHAIN, -1]
        return [copy is not None and bool(more) for copy, more in zip(found, better, strict=True)]

    def _expected(self, rows: Sequence[Record], found: Sequence[Copy | None], *, slots: int) -> NDArray[np.float64]:
        """Return `expected`, under `COPY` what each row's own copy is worth; one token where there is none."""
        token_BWM = expected(rows, self.known.worth, slots=slots)
        own_BM = [
            token_M[WAYS.index(copy)] if copy else np.ones(slots + 1)
            for token_M, copy in zip(token_BWM, found, strict=True)
        ]
        token_BWM[:, COPY] = own_BM
        return token_BWM

    def _decide(
        self, rows: Sequence[Record], found: Sequence[Copy | None] | None, ready: int, blind: bool, room: int
    ) -> tuple[Decision, Look | None]:
        """Return the best known step, and the look to take instead, if any."""
        known = self.known
        costs = known.costs.over(known.costs.basis(len(rows)))
        cost_S, draft_S, verify_S, least_S = costs.pace * costs.estimates.table(self.steps)
        for needed in (self._at.longest, 0):
            if np.isnan(cost_S[needed]):
                return Decision(self.steps[needed]), None
            if known.allowance is None:
                known.allowance = self.FIRST_PROBES * float(cost_S[needed])
        found = [None] * len(rows) if found is None else found
        token_BWM = self._expected(rows, found, slots=self._at.slots)
        nothing = found.count(None)
        token_WM = token_BWM.sum(axis=0)
        token_S = token_WM.take(self._at.place_S)
        if len(rows) > 1 and nothing < len(rows):  # in a chain, those that found more to copy than to draft copy
            mixed_M = token_BWM[:, [CHAIN, COPY]].max(axis=1).sum(axis=0)
            token_S[self._at.chains] = mixed_M[self._at.drafts_S[self._at.chains]]
        token_S[self._at.trees] = self._of_trees(token_BWM[:, CHAIN])
        speed_S = token_S / np.maximum(cost_S, 1e-9)
        fused, ahead = self._at.fused, ready > 0 and blind
        weighed = ahead or known.turn >= known.hopeless
        hoped_F = np.zeros(fused.stop - fused.start)
        if weighed:
            cost_F = np.where(np.isnan(cost_S[fused]), least_S[fused], cost_S[fused])
            # What these promise rests on more guesses than the others do, over trees on most: a tie is not enough.
            margin = 0.0 if ahead else self.MARGIN  # but to go on with them
            hoped_F = (
                (1.0 - margin)
                * np.where(self._at.forked_F, 1.0 - self.FORKED, 1.0)
                * self._lasting(rows, token_WM, cost_F, draft_S[fused])
            )
            hoped_F[self._at.positions_F > room] = 0.0
        speed_S[fused] = np.where(np.isnan(cost_S[fused]), 0.0, hoped_F) if weighed else 0.0
        speed_S[np.isnan(speed_S)] = 0.0
        best = int(speed_S.argmax())
        if ready and self._at.kinds[best] != "onepass":
            usable = self._from_ready(ready, blind, token_WM, token_S, cost_S, draft_S, verify_S)
            if usable.speed > speed_S[best]:
                return usable, None
        barred: set[Kind] = set() if nothing < len(rows) else {"lookup"}
        ends: list[int] = []
        if weighed:
            hope = speed_S[best] * self.HOPE
            unseen = [i for i in self._at.ends if not costs.measured(self.steps[i])]
            ends = [i for i in unseen if hoped_F[i - fused.start] >= hope]
            weighed = bool(ends) or bool((speed_S[fused] >= hope).any())
            known.hopeless = known.hopeless if weighed else known.turn + self.HOPELESS
        if not weighed:
            barred.add("onepass")
        look = self._probe(best, speed_S, cost_S, least_S, draft_S, barred, ends)
        speed = float(speed_S[best])
        return Decision(self.steps[best], speed * float(cost_S[best]), speed), look

    def _of_trees(self, token_BM: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the tokens expected of each tree, from those of chains: a tree goes on where its chain breaks off."""
        more_T = self._rescued()[self._at.grown_T]
        whole_B = token_BM[:, -1] - token_BM[:, -2]  # how likely every draft is kept
        token_T: NDArray[np.float64] = token_BM[:, -1].sum() + (1 - whole_B).sum() * more_T
        return token_T

    def _rescue(self, step: Step) -> Rescue:
        tree = step._replace(stops=0)  # fused or not
        return self.known.rescues.setdefault(tree, Rescue(tree))

    def _rescued(self) -> NDArray[np.float64]:
        """Return the drafts that each tree keeps beyond a chain that breaks off; last of all those of no tree."""
        return np.array([*(self._rescue(tree).drafts for tree in self._at.grown), 0.0])

    def _from_ready(
        self,
        ready: int,
        blind: bool,
        token_WM: NDArray[np.float64],
        token_S: NDArray[np.float64],
        cost_S: NDArray[np.float64],
        draft_S: NDArray[np.float64],
        verify_S: NDArray[np.float64],
    ) -> Decision:
        """Return the best step that needs no draft pass, having so many drafts."""
        chains, trees = self._at.chains, self._at.trees
        token_R, cost_R = token_S.copy(), np.full(len(self.steps), np.nan)
        if blind:
            token_R[chains] = token_WM[AHEAD, self._at.drafts_S[chains]]
        cost_R[chains] = verify_S[chains]
        if not blind:
            cost_R[trees] = np.maximum(cost_S[trees] - draft_S[trees], verify_S[trees])
        speed_R = token_R / np.maximum(cost_R, 1e-9)
        speed_R[(self._at.drafts_S > ready) | np.isnan(speed_R)] = 0.0
        best = int(speed_R.argmax())
        return Decision(self.steps[best], float(token_R[best]), float(speed_R[best]))

    def _lasting(
        self,
        rows: Sequence[Record],
        token_WM: NDArray[np.float64],
        cost_F: NDArray[np.float64],
        draft_F: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Return tokens per second of each one-pass step, taken again and again."""
        tried, met = (
            np.array([record.hits for record in rows]).reshape(len(rows), 2, -1)[:, :, self._at.hit_F].swapaxes(0, 1)
        )
        met_F = rate(met, tried, self.known.usual_met.take(self._at.hit_F)).prod(axis=0)
        miss_F = np.where(self._at.certain_F, 0.0, 1 - met_F)
        ahead_F, known_F = (self._of_fused(token_WM[way], len(rows)) for way in (AHEAD, CHAIN))
        cycle_F = np.maximum(cost_F + miss_F * draft_F, 1e-9)
        speed_F: NDArray[np.float64] = (ahead_F + miss_F * (known_F - ahead_F)) / cycle_F
        return speed_F

    def _of_fused(self, token_M: NDArray[np.float64], rows: int) -> NDArray[np.float64]:
        """Return the tokens expected of each one-pass step, from those of chains over all rows; of trees as above."""
        drafts_F = self._at.drafts_S[self._at.fused]
        more_F = self._rescued()[self._at.grown_F]
        whole_F = token_M[drafts_F] - token_M[drafts_F - 1]
        token_F: NDArray[np.float64] = token_M[drafts_F] + (rows - whole_F) * more_F
        return token_F

    def observe(
        self,
        step: Step,
        rows: Sequence[Record],
        accepted: Sequence[int],
        seconds: float,
        found: Sequence[Copy | None] | None = None,
        *,
        drew: bool | None = True,
        blind: Sequence[bool] | None = None,
        copied: Sequence[bool] | None = None,
        foreseen: Sequence[int | None] | None = None,
        ranks: Sequence[int] | None = None,
        inside: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """Learn from a finished step: what each row's drafts were worth and what it cost.

        Args:
            step: what was done.
            rows: the records of the rows it was done to.
            accepted: drafts that each row kept.
            seconds: how long it took.
            found: as in `choose`; without, all copies are lookups.
            drew: whether its drafts took a pass of their own; None where that was over some of the rows only, which
                tells nothing of what the step costs.
            blind: whose drafts were made without knowing the token before them; without, all of those not drawn.
            copied: whose drafts were copies; without, all of a lookup's.
            foreseen: how many of the tokens written a copy would have had right; None where there was nothing to copy.
            ranks: after a fused pass, at which of its stops by likelihood each row stopped; `stops` for none of them.
            inside: after a tree, how many drafts of the chain inside were kept, and how many there are.
        """
        if len(self.steps) == 1:
            return  # there is nothing to decide
        known = self.known
        if drew is not None:
            known.costs.observe(*self._priced(step, len(rows), seconds, drew=drew))
        known.turn += 1
        known.used[step.kind] = known.turn
        if step == self.steps[self._at.longest]:
            known.longest = known.turn
        if known.allowance is not None:
            known.allowance += seconds * self.PROBE_SHARE / (1 + min(known.vain // self.VAIN, self.RARER - 1))
            known.allowance -= 0.0 if self.look is None else self.look.cost(seconds)
            self.look = None
        if self._decision is not None:
            self._decision.settle(sum(accepted) + len(rows), seconds)
        blind = blind or [drew is False] * len(rows)
        copied = copied or [step.lookup] * len(rows)
        found = ["lookup"] * len(rows) if found is None else found
        for place, (record, kept) in enumerate(zip(rows, accepted, strict=True)):
            drafts = step.drafts
            if step.nodes and inside is not None:
                self._rescue(step).add(kept, *inside[place])
                kept, drafts = inside[place]
            copy = found[place]
            way: Way | None = copy if copied[place] else "ahead" if blind[place] else "chain"
            if step.kind == "plain" or way is None:
                record.relax()
            else:
                for one in (record, known.worth):
                    one.add(way, drafts=drafts, accepted=kept)
            right = None if foreseen is None or copied[place] else foreseen[place]
            if copy is not None and right is not None:
                # What a copy would have been worth, as far as the text went on, comes for nothing.
                for one in (record, known.worth):
                    one.add(copy, drafts=accepted[place] + 1, accepted=right)
        if step.kind == "onepass":
            for record, rank in zip(rows, ranks or [step.stops] * len(rows), strict=True):
                record.stopped(step, rank)
                known.worth.stopped(step, rank)
            known.usual_met = usually_met(known.worth)

    def _priced(self, step: Step, rows: int, seconds: float, *, drew: bool) -> tuple[Step, int, float]:
        """Return what a measured time tells the cost of: a chain that did not draw is a verification, as a copy is."""
        if step.kind == "chain" and not drew:
            return Step(step.drafts, lookup=True), rows, seconds
        if (step.kind == "tree" and not drew) or (step.kind == "onepass" and drew):
            costs = self.known.costs.over(rows)
            draft = costs.pace * (costs.estimates.draft(step.drafts) or 0.0)
            # A fused pass holds both the verification and a draft, so it is never the smaller half.
            seconds = seconds + draft if step.kind == "tree" else max(seconds - draft, seconds / 2)
        return step, rows, seconds

    def _probe(
        self,
        best: int,
        speed_S: NDArray[np.float64],
        cost_S: NDArray[np.float64],
        least_S: NDArray[np.float64],
        draft_S: NDArray[np.float64],
        barred: Set[Kind],
        ends: Sequence[int],
    ) -> Look | None:
        """Return another kind of step at its best length, when the allowance covers the least that a look may take.

        Those barred could not win as things stand: copies where there is nothing to copy, one-pass steps where not even
        the least that they can cost would do. Kinds never measured come first; from plain decoding the most promising
        one is looked at every other time. Two are looked at though others of their kind are best: one-pass steps, while
        there are `ends` to be measured (the others lie between), and the longest chain, which a pause may have driven
        out. Plain steps, which all others are weighed against, are looked at for what they cost by now when none was
        taken for `RENEWED` steps.
        """
        known = self.known
        if known.allowance is None or known.allowance < cost_S[0]:
            known.look_from = float(cost_S[0])
            return None
        cost_S = np.where(np.isnan(cost_S), least_S, cost_S)
        known.look_from = np.inf  # unless one is taken, there is nothing to look at as things stand
        kinds = {*self._at.kinds} - barred
        if known.turn - known.used.get("plain", 0) <= self.RENEWED:
            kinds -= {"plain"}
        shorter = self._at.chains.start <= best < self._at.longest
        if not shorter and not (ends and self._at.kinds[best] == "onepass"):
            kinds -= {self._at.kinds[best]}
        if not kinds:
            return None
        speed = {kind: max((speed_S[i], i) for i, k in enumerate(self._at.kinds) if k == kind) for kind in kinds}
        last = dict(known.used)
        if shorter:
            speed["chain"], last["chain"] = (speed_S[self._at.longest], self._at.longest), known.longest
        order = sorted(kinds, key=lambda kind: (last.get(kind, 0), kind))
        kind = order[0]
        if self._at.kinds[best] == "plain" and speed[kind][0] and known.turn % 2:
            kind = max(speed, key=lambda kind: speed[kind])
        index = ends[0] if kind == "onepass" and ends else speed[kind][1]
        cost = float(3 * cost_S[0] if np.isnan(cost_S[index]) else cost_S[index])
        tokens, lost = speed_S[index] * cost, 0.0
        if kind == "onepass":
            # It drafts and verifies what a chain would have; what it costs beyond that is only what it drafts ahead.
            step = self.steps[index]
            chain = self._at.chains.start + int((self._at.drafts_S[self._at.chains] <= step.drafts).sum()) - 1
            cost, tokens = float(draft_S[index] + cost_S[index]), speed_S[chain] * cost_S[chain]
        elif self._at.kinds[best] == "onepass":
            lost = float(draft_S[best])  # what was drafted ahead
        worth = float(tokens / speed_S[best]) - lost
        return Look(self.steps[index], worth=worth, least=float(cost_S[0]), most=cost - worth)


def _kinds(found: Sequence[Copy | None]) -> list[str]:
    """Return what tells situations apart; in a batch, where too many would never be met again, quotes are lookups."""
    alike = len(found) > 1
    return sorted("lookup" if alike and copy == "quote" else str(copy) for copy in found)
