"""Completions in flight: admission, reading of prompts, cycles, endings. Everything that decodes drives this.

Knows token ids, never text; a completion's `Stopper` says where it ends.
"""

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.decode.batching import batch_of, outcomes_of
from orthrus.decode.cycle import Outcome, cycle
from orthrus.decode.drafters import VIEW, Drafter, ViewDrafter, tapped
from orthrus.decode.exact import Exact, Finding, can_fuse, finding_for
from orthrus.decode.experience import experience_of
from orthrus.decode.noise import stream_of
from orthrus.decode.options import Options
from orthrus.decode.passes import Geometry, Passes
from orthrus.decode.planned import Planned
from orthrus.decode.processing import Kept, Processing
from orthrus.decode.processors import Request
from orthrus.decode.rows import Ready, Row, Rows
from orthrus.decode.stop import Stopper
from orthrus.errors import CacheFull, ConfigError, DecodingError, PromptError
from orthrus.model.attach import config_of, evaluating
from orthrus.model.cache import ScratchCache
from orthrus.model.graphs import lend
from orthrus.policy import steps as plans
from orthrus.policy.steps import Plan, Step

PREFILL_CHUNK: Final = {"cpu": 512, "cuda": 2048}
"""Prompt positions per prefill pass by kind of device, where nothing else is asked for."""

PREFILL_SLICE: Final = {"cpu": 128, "cuda": 512}
"""Prompt positions per step while other rows decode, likewise."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What one step added to one row; `kept` holds its logits where the options ask for them."""

    row: Row
    token_ids: list[int]
    accepted: int
    kept: Kept | None = None


class Engine:
    """Decode many completions at once over one cache that is never copied.

    Args:
        model: a dual-view model.
        rows: completions in flight at most.
        capacity: positions per row, scratch for one block included (`Engine.room` says how many a request needs).
        plan: how many drafts each cycle proposes.
        prefill_chunk: prompt positions per prefill pass at most; `PREFILL_CHUNK` unless given.
        prefill_slice: prompt positions read between two tokens of a row that decodes, at most; `PREFILL_SLICE` unless
            given. With `exact="token"` rounded to whole passes.
        admit_free: rows that must be free before waiting completions join (more of them share a prefill pass).
        exact: "distribution" (the method's guarantee: the same text in float32, the same distribution always) or
            "token" (the same tokens as plain decoding with `exact="token"`, at any precision, bit for bit; where the
            device's kernels forbid it, decodes plainly and warns).
        drafter: who proposes; the model's own diffusion view unless given. Passes that verify draft for the view alone,
            so others are refused under plans of one pass a cycle.
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
        prefill_slice: int | None = None,
        admit_free: int = 1,
        exact: Exact = "distribution",
        drafter: Drafter | None = None,
        passes: Callable[[PreTrainedModel, ScratchCache, Geometry | None], Passes] = Passes,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        block, device = config_of(model).block_size, model.device.type
        self.drafter: Drafter = ViewDrafter.of(model) if drafter is None else drafter
        if self.drafter.name != VIEW:
            plan = by_others(plan, self.drafter, block=block)
        self.finding = None
        if exact == "token":
            with evaluating(model):
                self.finding = finding_for(model, width=block, rows=rows)
                plan = permitted(plan, model, self.finding, block=block, rows=rows)
        experience = experience_of(model, exact, plan) if len(plan.steps(block)) > 1 else None
        self.policy = Planned(plan, block=block, experience=experience)
        self.capacity = capacity
        geometry = None if self.finding is None else self.finding.geometry
        room = capacity if geometry is None else geometry.capacity(capacity)
        self.cache = lend(model, rows=rows, capacity=room, borrower=self)
        self.passes = passes(model, self.cache, geometry)
        if self.drafter.taps and self.passes.compiled:
            raise ConfigError(
                f"drafter {self.drafter.name!r} reads hidden states, which compiled passes hide: load the model with "
                "compile=False"
            )
        # Where a token's place in a pass changes its keys, texts are comparable only when all are read from the start.
        self.rows = Rows(self.cache, reuse=self.finding is None or self.finding.holds)
        # Chains of one length keep the most drafts by rejection. Under any other plan a row's cycles depend on the
        # clock, on the rows beside it, or (trees) on noise still to come; none of them may decide what a seed gives, so
        # these texts are what plain sampling draws with the same noise, and trees find far more of them that way.
        self.coupled = exact == "token" or {step.kind for step in self.policy.steps} != {"chain"}
        self.prefill_chunk = prefill_chunk or PREFILL_CHUNK.get(device, PREFILL_CHUNK["cpu"])
        self.prefill_slice = prefill_slice or PREFILL_SLICE.get(device, PREFILL_SLICE["cpu"])
        self.admit_free = admit_free
        self.context_length: int = model.config.get_text_config().max_position_embeddings
        self.vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self.clock = clock
        self.waiting: deque[Row] = deque()
        self._next_id = 0

    @staticmethod
    def room(prompt: int, max_new_tokens: int, scratch: int) -> int:
        """Return the cache positions a completion needs: prompt, text, and the scratch of one step."""
        return prompt + max_new_tokens + scratch

    @property
    def busy(self) -> bool:
        """True while a completion is waiting or in flight."""
        return bool(self.waiting or self.live or self.rows.reading)

    @property
    def live(self) -> list[Row]:
        """The rows that decode, in the order of their places in the cache."""
        return self.rows.live

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
            state=self.policy.new_row(),
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
        for row in (*self.live, *self.rows.reading):
            if row.id == id:
                row.finish_reason = "abort"
                self.rows.remove(row)
                return True
        return False

    @torch.inference_mode()
    def step(self) -> list[Progress]:
        """Admit what fits, run one cycle over all rows that decode, and return what each of them gained.

        An exception of one row's own (logits that are no numbers, a stopper that raises) ends that row with an error.
        Any other leaves all rows as they were. The model is in evaluation mode meanwhile.
        """
        model = self.passes.model
        with evaluating(model), tapped(model, self.cache, self.drafter):
            return self._step()

    def _step(self) -> list[Progress]:
        self._admit()
        rows = self.live
        if not rows:
            return []
        for row in rows:
            row.observe(copies=self.policy.copies)
        step = self.policy.choose([row.state for row in rows], self.rows.room)
        started = self.clock()
        batch = batch_of(rows, self.cache, step, coupled=self.coupled, whole=self.passes.compiled)
        outcome = cycle(self.passes, batch, step, drafter=self.drafter)
        self.policy.learn(step, outcomes_of(rows, step, batch, outcome), self.clock() - started)
        self.drafter.accepted(batch.states, [len(tokens) for tokens in outcome.tokens])
        drew = batch.drawing.start < batch.drawing.stop and self.drafter.name != VIEW
        progress = [self._keep(row, place, step, outcome, drew) for place, row in enumerate(rows)]
        for row in rows:
            if row.finish_reason is not None:
                self.rows.remove(row)
        return progress

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
        needed = self.room(len(prompt_ids), limit, self.policy.scratch)
        if needed > self.capacity:
            raise CacheFull(
                f"{len(prompt_ids)} prompt tokens, {limit} new ones and {self.policy.scratch} of scratch need "
                f"{needed} cache positions, a row has {self.capacity}: ask for fewer tokens or a larger capacity"
            )
        return limit

    def _admit(self) -> None:
        """Let waiting completions join, and read prompts: as much of them as rows that decode can wait for."""
        rows, decoding = self.rows, bool(self.live)
        if rows.free >= self.admit_free or not (decoding or rows.reading):
            while self.waiting and rows.free:
                cached = rows.join(self.waiting[0])
                row = self.waiting.popleft()
                row.drafting = self.drafter.reset(cached)
        if decoding:
            self._begin_those_read()  # before others are read, who may have to wait
        if rows.reading:
            self._read(self.prefill_slice if decoding else None)
        self._begin_those_read()

    def _begin_those_read(self) -> None:
        for row in self.rows.reading:
            if not self.rows.pending(row):
                self.rows.begin(row)

    def _read(self, most: int | None) -> None:
        """Read prompts, so many positions at most; where drafts will be wanted next, the last pass makes the first."""
        geometry = self.passes.geometry
        where, pieces = self.rows.next_to_read(most, unit=1 if geometry is None else geometry.chunks[-1])
        rows = self.rows.at(where)
        to_the_end = all(piece and piece == self.rows.pending(row) for row, piece in zip(rows, pieces, strict=True))
        allowed = self.passes.reads_ahead and (self.finding is None or self.finding.reads_ahead)
        wanted = allowed and to_the_end and all(row.ready for row in self.live)
        wanted = wanted and isinstance(self.drafter, ViewDrafter) and self.drafter.ahead
        drafts = self.policy.prefill_drafts if wanted else 0
        if not any(pieces):
            return
        if not drafts:
            self.passes.prefill(where, pieces, chunk=self.prefill_chunk)
            return
        anchor_B = torch.tensor([row.anchor for row in rows], device=self.cache.device)
        ahead_BMV = self.passes.prefill(where, pieces, chunk=self.prefill_chunk, anchor_B=anchor_B, drafts=drafts)
        assert ahead_BMV is not None
        for row, logits_MV in zip(rows, ahead_BMV, strict=True):
            row.ready = Ready(logits_MV, blind=False)

    def _keep(self, row: Row, place: int, step: Step, outcome: Outcome, drew: bool) -> Progress:
        """Add a cycle's tokens to a row, as far as its text goes."""
        tokens, broken, ready_BMV, ranks = (
            outcome.tokens[place],
            outcome.broken[place],
            outcome.ready_BMV,
            outcome.ranks,
        )
        met = ready_BMV is not None and ranks is not None and ranks[place] < step.stops
        row.ready = Ready(ready_BMV[place], blind=True) if met and ready_BMV is not None else None
        kept: list[int] = []
        try:
            kept, row.finish_reason = row.stopper.cut(tokens)
        except Exception as error:
            row.fail(error)
        logits = None if row.processing is None else row.processing.take(kept)
        accepted = min(len(kept), len(tokens) if broken else len(tokens) - 1)
        row.token_ids += kept
        row.stats.record(
            drafted=step.drafts,
            accepted=accepted,
            emitted=len(kept),
            forwards=outcome.forwards - drew,
            drafter=self.drafter.name if drew else None,
        )
        if broken and row.finish_reason is None:
            row.fail(
                (row.processing.error_after(tokens) if row.processing else None)
                or DecodingError(
                    f"finite logits are required to choose a token by, found NaN, infinity or none possible after "
                    f"{len(row.token_ids)} tokens: look at the model's weights and at what changes its logits"
                )
            )
        row.seen.update(dict.fromkeys(kept if row.penalised else ()))
        return Progress(row, kept, accepted, logits)


def by_others(plan: Plan, drafter: Drafter, *, block: int) -> Plan:
    """Return a plan for another drafter than the view, without passes that verify and draft; refuses one of them."""
    plan = plan.without("onepass")
    if any(step.stops for step in plan.steps(block)):
        raise ConfigError(
            f"plan {plan.name!r} drafts in the pass that verifies, which only the view does, found drafter "
            f"{drafter.name!r}: take 'full', 'fixed:K' or 'tree:N'"
        )
    return plan


def permitted(plan: Plan, model: PreTrainedModel, finding: Finding, *, block: int, rows: int) -> Plan:
    """Return a plan with those steps alone that keep texts the same bit for bit; warns where none drafts.

    A tree's path is verified once more, and each shape of a fused pass has to be probed first: both take longer than
    `auto` could gain by them.
    """
    if not finding.holds:
        reasons = "; ".join(finding.broken)
        warnings.warn(f"exact='token' cannot verify drafts here ({reasons}): decoding plainly", stacklevel=3)
        return plans.parse("ar")
    plan = plan.without("onepass", "tree")
    (step, *others) = plan.steps(block)
    if others or step.kind != "onepass":
        return plan
    chain = step._replace(nodes=0, stops=min(step.stops, step.drafts + 1))
    sizes = [size for size in (1 << power for power in range(rows.bit_length())) if size <= rows]
    fuses = all(can_fuse(model, finding, rows=size, drafts=chain.drafts, stops=chain.stops) for size in sizes)
    return replace(plan, step=chain if fuses else Step(step.drafts))
