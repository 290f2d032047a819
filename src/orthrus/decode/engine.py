"""Rows in flight: admission, prefill, cycles, endings. Generation, streaming, serving and measuring all drive this.

Knows token ids, never text; a completion's `Stopper` says where it ends. Live rows stand at the front of the cache,
so that a cycle runs over exactly them; a row that ends is replaced by the last one.
"""

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Final, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.decode.cycle import Batch, Drafter, Outcome, cycle, twin
from orthrus.decode.exact import Exact, can_fuse, finding_for
from orthrus.decode.experience import experience_of
from orthrus.decode.noise import stream_of
from orthrus.decode.options import Options, Sampling
from orthrus.decode.output import FinishReason, Stats
from orthrus.decode.passes import Geometry, Passes
from orthrus.decode.planner import Planner
from orthrus.decode.processing import Kept, Processing
from orthrus.decode.processors import Request
from orthrus.decode.sampling import Chooser, Context
from orthrus.decode.stop import Stopper
from orthrus.decode.worth import Record
from orthrus.errors import CacheFull, DecodingError, PromptError
from orthrus.model.attach import config_of, evaluating
from orthrus.model.cache import ScratchCache
from orthrus.model.graphs import lend
from orthrus.policy import steps as plans
from orthrus.policy.lookup import Copy, Lookup
from orthrus.policy.steps import Plan, Step

PREFILL_CHUNK: Final = {"cpu": 512, "cuda": 2048}
"""Prompt positions per prefill pass by kind of device, where nothing else is asked for."""


@dataclass(kw_only=True, slots=True)
class Row:
    """One completion in the making: its tokens so far, what it was asked for, what it cost.

    A row that fails ends with the reason "error" and the exception as its `error`; the others go on.
    """

    id: int
    prompt_ids: list[int]
    options: Options
    stopper: Stopper
    stream: int
    record: Record
    token_ids: list[int] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    lookup: Lookup = field(default_factory=Lookup)
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    processing: Processing | None = None
    seen: dict[int, None] = field(default_factory=dict)  # what a penalised row contains, each token once

    @property
    def penalised(self) -> bool:
        """True where tokens that the row contains already are penalised."""
        return self.options.sampling.repetition_penalty != 1.0

    def text(self) -> list[int]:
        """Return the prompt and the tokens so far."""
        return self.prompt_ids + self.token_ids

    def fail(self, error: Exception) -> None:
        """End this completion with an error; the first one counts."""
        self.finish_reason, self.error = "error", self.error or error

    @property
    def anchor(self) -> int:
        """The last token of the text, whose keys the next pass writes."""
        return self.token_ids[-1] if self.token_ids else self.prompt_ids[-1]


@dataclass(frozen=True, slots=True)
class Progress:
    """What one step added to one row; `kept` holds its logits where the options ask for them."""

    row: Row
    token_ids: list[int]
    accepted: int
    kept: Kept | None = None


class Ready(NamedTuple):
    """Draft logits `[M, V]` that an earlier pass has made for a row, and whether it did not know the anchor."""

    logits_MV: Tensor
    blind: bool


def _in_evaluation(step: "Callable[[Engine], list[Progress]]") -> "Callable[[Engine], list[Progress]]":
    """Take a step in evaluation mode, whatever mode the model is in."""

    @wraps(step)
    def wrapped(engine: "Engine") -> list[Progress]:
        with evaluating(engine.passes.model):
            return step(engine)

    return wrapped


class Engine:
    """Decode many completions at once over one cache that is never copied.

    Args:
        model: a dual-view model.
        rows: completions in flight at most.
        capacity: positions per row, scratch for one block included (`Engine.room` says how many a request needs).
        plan: how many drafts each cycle proposes.
        prefill_chunk: prompt positions per prefill pass at most; `PREFILL_CHUNK` unless given.
        admit_free: rows that must be free before waiting completions join (more of them share a prefill pass).
        exact: "distribution" (the method's guarantee: the same text in float32, the same distribution always) or
            "token" (the same tokens as plain decoding with `exact="token"`, at any precision, bit for bit; where the
            device's kernels forbid it, decodes plainly and warns).
        drafter: who proposes; the model's own diffusion view unless a test says otherwise.
        passes: what runs the model over the cache, from `(model, cache, geometry)`.
        clock: seconds, for a plan that weighs steps by what they cost.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rows: int,
        capacity: int,
        plan: Plan,
        prefill_chunk: int | None = None,
        admit_free: int = 1,
        exact: Exact = "distribution",
        drafter: Drafter = twin,
        passes: Callable[[PreTrainedModel, ScratchCache, Geometry | None], Passes] = Passes,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        block = self.block = config_of(model).block_size
        if exact == "token":
            # A tree's path is verified once more, and each shape of a fused pass would have to be probed first: both
            # take longer than `auto` could gain by them.
            plan = plan.without("onepass", "tree")
        experience = experience_of(model, exact, plan) if len(plan.steps(block)) > 1 else None
        self.planner = Planner(plan, block=block, experience=experience)
        self.capacity = capacity
        with evaluating(model):
            self.finding = None if exact == "distribution" else finding_for(model, width=block, rows=rows)
        geometry = None if self.finding is None else self.finding.geometry
        if self.finding is not None and not self.finding.holds:
            self.planner = Planner(plans.parse("ar"), block=block)
            warnings.warn(
                f"exact='token' cannot verify drafts here ({'; '.join(self.finding.broken)}): decoding plainly",
                stacklevel=2,
            )
        room = capacity if geometry is None else geometry.capacity(capacity)
        self.cache = lend(model, rows=rows, capacity=room, borrower=self)
        self.passes = passes(model, self.cache, geometry)
        # Chains of one length keep the most drafts by rejection. Under any other plan a row's cycles depend on the
        # clock, on the rows beside it, or (trees) on noise still to come; none of them may decide what a seed gives, so
        # these texts are what plain sampling draws with the same noise, and trees find far more of them that way.
        chains = {step.kind for step in self.planner.steps} == {"chain"}
        self.coupled = exact == "token" or not chains
        self.prefill_chunk = prefill_chunk or PREFILL_CHUNK.get(model.device.type, PREFILL_CHUNK["cpu"])
        self.admit_free = admit_free
        self.drafter = drafter
        self.context_length: int = model.config.get_text_config().max_position_embeddings
        self.vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self.clock = clock
        self.live: list[Row] = []
        self._ready: list[Ready | None] = [None] * rows
        self.waiting: deque[Row] = deque()
        self._cached_ids: list[list[int]] = [[] for _ in range(rows)]
        self._next_id = 0

    @staticmethod
    def room(prompt: int, max_new_tokens: int, scratch: int) -> int:
        """Return the cache positions a completion needs: prompt, text, and the scratch of one step."""
        return prompt + max_new_tokens + scratch

    @property
    def busy(self) -> bool:
        """True while a completion is waiting or in flight."""
        return bool(self.live or self.waiting)

    def run(self) -> Iterator[Progress]:
        """Step until no completion is left; yields what each step adds to each row."""
        while self.busy:
            yield from self.step()

    def finish(
        self,
        prompts: Sequence[Sequence[int]],
        options: Options | Sequence[Options],
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> list[Row]:
        """Complete prompts, each with its own options or all with the same; returns their rows in order.

        Raises:
            PromptError, CacheFull, ConfigError: as `add`.
            Exception: the error of the first row that has one, when all have ended.
        """
        each = [options] * len(prompts) if isinstance(options, Options) else options
        pairs = enumerate(zip(prompts, each, strict=True))
        ids = [self.add(prompt, own, tokenizer=tokenizer, index=index) for index, (prompt, own) in pairs]
        done = {progress.row.id: progress.row for progress in self.run()}
        rows = [done[id] for id in ids]
        for row in rows:
            if row.error is not None:
                raise row.error
        return rows

    def add(
        self,
        prompt_ids: Sequence[int],
        options: Options,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        index: int = 0,
    ) -> int:
        """Queue a completion and return its id; nothing runs before `step`.

        Args:
            prompt_ids: the prompt.
            options: what is asked for.
            tokenizer: the model's tokenizer, which stop strings need.
            index: tells prompts of one call apart, so that each draws noise of its own under one seed.

        Raises:
            PromptError: the prompt is empty, holds ids outside the vocabulary, or leaves no room in the context.
            CacheFull: it needs more positions than a row has.
            ConfigError: it has stop strings, but no tokenizer.
        """
        limit = self._limit(prompt_ids, options)
        row = Row(
            id=self._next_id,
            prompt_ids=list(prompt_ids),
            options=options,
            stopper=Stopper(options, tokenizer, limit=limit, prompt_ids=prompt_ids),
            stream=stream_of(options.seed, index),
            record=Record(slots=self.block - 1),
        )
        row.seen.update(dict.fromkeys(row.prompt_ids if row.penalised else ()))
        if options.processors is not None or options.keep_logits:
            ends, device = options.eos_token_id, self.cache.device
            request = Request(len(prompt_ids), index, options.max_new_tokens, ends, self.vocabulary, device)
            made = None if options.processors is None else options.processors(request)
            row.processing = Processing(made, row.text, keeps=options.keep_logits)
        self._next_id += 1
        self.waiting.append(row)
        return row.id

    @torch.inference_mode()
    def abort(self, id: int) -> bool:
        """End a completion, waiting or in flight; returns False when there is none of that id."""
        for row in self.waiting:
            if row.id == id:
                self.waiting.remove(row)
                row.finish_reason = "abort"
                return True
        for place, row in enumerate(self.live):
            if row.id == id:
                row.finish_reason = "abort"
                self._remove(place)
                return True
        return False

    @torch.inference_mode()
    @_in_evaluation
    def step(self) -> list[Progress]:
        """Admit what fits, run one cycle over all live rows, and return what each of them gained.

        An exception of one row's own (logits that are no numbers, a stopper that raises) ends that row with an error.
        Any other leaves all rows as they were.
        """
        self._admit()
        if not self.live:
            return []
        rows = slice(0, len(self.live))
        records = [row.record for row in self.live]
        found = self._look_up() if self.planner.copies else None
        ready = min(0 if r is None else len(r.logits_MV) for r in self._ready[rows])
        blind = [r is not None and r.blind for r in self._ready[rows]]
        room = self.cache.capacity - max(self.cache.lengths[rows])
        step = self._allowed(self.planner.choose(records, found, ready=ready, blind=any(blind), room=room))
        copied = self.planner.copying(step, records, found)
        started = self.clock()
        batch = self._batch(rows, step, copied)
        outcome = cycle(self.passes, batch, step, drafter=self.drafter)
        drawn = range(*batch.drawing.indices(len(self.live)))
        self.planner.observe(
            step,
            records,
            [max(len(tokens) - 1, 0) for tokens in outcome.tokens],
            self.clock() - started,
            found,
            drew=None if 0 < len(drawn) < len(self.live) else len(drawn) > 0,
            blind=[unknowing and place not in drawn for place, unknowing in enumerate(blind)],
            copied=copied,
            foreseen=None if found is None else self._foreseen(found, outcome.tokens),
            ranks=outcome.ranks,
            inside=outcome.inside,
        )
        progress = [self._keep(place, tokens, step, outcome) for place, tokens in enumerate(outcome.tokens)]
        for place in reversed(range(len(self.live))):
            if self.live[place].finish_reason is not None:
                self._remove(place)
        return progress

    def _allowed(self, step: Step) -> Step:
        """Return the step, or the chain that takes its place where passes must not be fused."""
        if self.finding is None or step.kind != "onepass":
            return step
        chain = step._replace(nodes=0, stops=min(step.stops, step.drafts + 1))  # a tree's path would be verified again
        shape = {"rows": len(self.live), "drafts": chain.drafts, "stops": chain.stops}
        return chain if can_fuse(self.passes.model, self.finding, **shape) else Step(step.drafts)

    def _look_up(self) -> list[Copy | None]:
        """Bring the live rows' lookups up to their texts; returns what each one's copy would be of."""
        for row in self.live:
            row.lookup.extend(row.prompt_ids[len(row.lookup) :])
            row.lookup.extend(row.token_ids[len(row.lookup) - len(row.prompt_ids) :])
        return [row.lookup.kind(len(row.prompt_ids)) for row in self.live]

    def _foreseen(self, found: list[Copy | None], tokens: list[list[int]]) -> list[int | None]:
        """Return how many of the tokens just written a copy would have had right, in rows that could have copied."""
        triples = zip(self.live, found, tokens, strict=True)
        return [row.lookup.foresaw(written) if copy else None for row, copy, written in triples]

    def _limit(self, prompt_ids: Sequence[int], options: Options) -> int:
        """Check a request against vocabulary, context and cache; return how many tokens it may write."""
        if not prompt_ids:
            raise PromptError("the prompt must hold at least one token, found none: give it some text")
        if not (min(prompt_ids) >= 0 and max(prompt_ids) < self.vocabulary):
            raise PromptError(
                f"prompt tokens must be ids from 0 to {self.vocabulary - 1}, found {min(prompt_ids)} to "
                f"{max(prompt_ids)}: encode it with the model's own tokenizer"
            )
        limit = min(options.max_new_tokens, self.context_length - len(prompt_ids))
        if limit < 1:
            raise PromptError(
                f"the model reads at most {self.context_length} tokens, the prompt has {len(prompt_ids)}: shorten it"
            )
        needed = self.room(len(prompt_ids), limit, self.planner.scratch)
        if needed > self.capacity:
            raise CacheFull(
                f"{len(prompt_ids)} prompt tokens, {limit} new ones and {self.planner.scratch} of scratch need "
                f"{needed} cache positions, a row has {self.capacity}: ask for fewer tokens or a larger capacity"
            )
        return limit

    def _admit(self) -> None:
        """Move waiting completions into free rows and prefill them together, all but each one's last token."""
        first = len(self.live)
        if first and self.cache.rows - first < self.admit_free:
            return
        pending = []
        try:
            while self.waiting and len(self.live) < self.cache.rows:
                pending.append(self._reuse(len(self.live), self.waiting[0].prompt_ids[:-1]))
                self.live.append(self.waiting.popleft())
            if any(pending):
                self._read(slice(first, len(self.live)), pending)
        except BaseException:  # memory ran out, say: nobody may go on from a prompt that was not read
            self._send_back(first)
            raise

    def _send_back(self, first: int) -> None:
        """Let the rows from this place on wait again, with the keys that they have by now."""
        while len(self.live) > first:
            row = self.live.pop()
            place = len(self.live)
            self._cached_ids[place] = row.prompt_ids[: self.cache.lengths[place]]
            self._ready[place] = None
            self.waiting.appendleft(row)

    def _read(self, rows: slice, pending: list[list[int]]) -> None:
        """Read what new rows' prompts still lack; where drafts will be wanted next, the last pass makes the first."""
        others = [ready is not None for ready in self._ready[: rows.start]]
        allowed = self.passes.reads_ahead and (self.finding is None or self.finding.reads_ahead)
        drafts = self.planner.first_drafts if all(pending) and all(others) and allowed else 0
        if self.drafter is not twin or not drafts:
            self.passes.prefill(rows, pending, chunk=self.prefill_chunk)
            return
        anchor_B = torch.tensor([row.anchor for row in self.live[rows]], device=self.cache.device)
        ahead_BMV = self.passes.prefill(rows, pending, chunk=self.prefill_chunk, anchor_B=anchor_B, drafts=drafts)
        assert ahead_BMV is not None
        self._ready[rows] = [Ready(logits_MV, blind=False) for logits_MV in ahead_BMV]

    def _reuse(self, place: int, prompt_ids: list[int]) -> list[int]:
        """Keep the keys that any row, live or ended, has of a new prompt's start; return the tokens still to be read.

        Another row's keys are copied once, here; a shared start (a system prompt, say) is so read once and not for
        every request.
        """
        common = [0] * self.cache.rows
        # Where a token's place in a pass changes its keys, texts are comparable only when all are read from the start.
        if self.finding is None or self.finding.holds:
            common = [_common_start(self._cached(row), prompt_ids) for row in range(self.cache.rows)]
        source = max(range(self.cache.rows), key=lambda row: (common[row], row == place))
        if source != place:
            self.cache.copy_start(source, place, common[source])
        self.cache.set_length(place, common[source])
        self._cached_ids[place] = prompt_ids[: common[source]]
        return prompt_ids[common[source] :]

    def _cached(self, place: int) -> list[int]:
        """Return the tokens whose keys a row holds."""
        if place >= len(self.live):
            return self._cached_ids[place]
        row = self.live[place]
        return (row.prompt_ids + row.token_ids)[: self.cache.lengths[place]]

    def _batch(self, rows: slice, step: Step, copied: list[bool]) -> Batch:
        """Describe the live rows to the cycle."""
        device = self.cache.device
        ready = [self._usable(place, step) for place in range(len(self.live))]
        lacking = [place for place, logits_MV in enumerate(ready) if logits_MV is None and not copied[place]]
        drawing = slice(lacking[0], lacking[-1] + 1) if lacking and step.drafts else slice(0, 0)
        if drawing.stop and self.passes.compiled:  # no graph for each number of rows
            drawing = slice(0, len(self.live))
        made = next((logits_MV for logits_MV in ready if logits_MV is not None), None)
        ready_BMV = copied_BM = copying_B = None
        if made is not None and drawing != slice(0, len(self.live)):
            ready_BMV = torch.stack([made if logits_MV is None else logits_MV for logits_MV in ready])
        if any(copied):
            copied_BM = torch.tensor([row.lookup.drafts(step.drafts) for row in self.live], device=device)
            copying_B = None if all(copied) else torch.tensor(copied, device=device)
        anchor_B = torch.tensor([row.anchor for row in self.live], device=device)
        stream_B = torch.tensor([row.stream for row in self.live], device=device)
        context = Context(stream_B, self.cache.length_R[rows], self._seen())
        places: dict[tuple[Sampling, Processing | None], list[int]] = {}
        for place, row in enumerate(self.live):
            places.setdefault((row.options.sampling, row.processing), []).append(place)
        choosers = [Chooser(sampling, self.coupled, processing) for sampling, processing in places]
        if len(places) == 1:
            groups: list[tuple[Chooser, Tensor | None]] = [(choosers[0], None)]
        else:
            indices = [torch.tensor(index, device=device) for index in places.values()]
            groups = list(zip(choosers, indices, strict=True))
        return Batch(
            rows=rows,
            anchor_B=anchor_B,
            context=context,
            groups=groups,
            drawing=drawing,
            ready_BMV=ready_BMV,
            copied_BM=copied_BM,
            copying_B=copying_B,
        )

    def _usable(self, place: int, step: Step) -> Tensor | None:
        """Return the drafts that an earlier pass has made for a row, where the step can and should do with them."""
        ready = self._ready[place]
        if ready is None or len(ready.logits_MV) < step.drafts or self.planner.draws:
            return None
        usable = step.kind in ("chain", "onepass") or (step.kind == "tree" and not ready.blind)
        return ready.logits_MV[: step.drafts] if usable else None

    def _keep(self, place: int, tokens: list[int], step: Step, outcome: Outcome) -> Progress:
        """Add a cycle's tokens to a row, as far as its text goes."""
        row = self.live[place]
        ready_BMV, ranks = outcome.ready_BMV, outcome.ranks
        ready = ready_BMV is not None and ranks is not None and ranks[place] < step.stops
        self._ready[place] = Ready(ready_BMV[place], blind=True) if ready and ready_BMV is not None else None
        kept: list[int] = []
        try:
            kept, row.finish_reason = row.stopper.cut(tokens)
        except Exception as error:
            row.fail(error)
        logits = None if row.processing is None else row.processing.take(kept)
        accepted = min(len(kept), len(tokens) if outcome.broken[place] else len(tokens) - 1)
        row.token_ids += kept
        row.stats.record(drafted=step.drafts, accepted=accepted, emitted=len(kept), forwards=outcome.forwards)
        if outcome.broken[place] and row.finish_reason is None:
            row.fail(
                (row.processing.error_after(tokens) if row.processing else None)
                or DecodingError(
                    f"finite logits are required to choose a token by, found NaN, infinity or none possible after "
                    f"{len(row.token_ids)} tokens: look at the model's weights and at what changes its logits"
                )
            )
        row.seen.update(dict.fromkeys(kept if row.penalised else ()))
        return Progress(row, kept, accepted, logits)

    def _remove(self, place: int) -> None:
        """Free a row; the last live row takes its place, so that live rows stay together at the front."""
        row = self.live.pop(place)
        last = len(self.live)
        valid = self.cache.lengths[place]
        self._cached_ids[place] = (row.prompt_ids + row.token_ids)[:valid]
        if row.error is not None:  # nobody may go on from keys that are no numbers, or meet them behind a mask
            self._cached_ids[place] = []
            self.cache.wipe(place)
        self._ready[place] = None
        if place == last:
            return
        self.live.insert(place, self.live.pop())
        self.cache.move_row(last, place)
        self._cached_ids[place], self._cached_ids[last] = [], []
        self._ready[place], self._ready[last] = self._ready[last], None

    def _seen(self) -> Tensor | None:
        """Return the tokens that each live row contains, `[B, L]`, where any of them is penalised for repeating."""
        if not any(row.penalised for row in self.live):
            return None
        seen = [list(row.seen) if row.penalised else [row.anchor] for row in self.live]
        longest = max(map(len, seen))
        return torch.tensor([own + own[:1] * (longest - len(own)) for own in seen], device=self.cache.device)


def _common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two texts have in common at their start."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))
