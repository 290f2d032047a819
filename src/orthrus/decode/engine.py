"""Completions in flight: admission, reading of prompts, cycles, endings. Everything that decodes drives this.

Knows token ids, never text; a completion's `Stopper` says where it ends.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.decode.allowed import bit_for_bit, block_of, drafted_by, drafter_for
from orthrus.decode.batching import batch_of, led, outcome_of
from orthrus.decode.cycle import Batch, Outcome, begin, cycle
from orthrus.decode.drafters import VIEW, Drafter, ViewDrafter, tapped
from orthrus.decode.exact import Exact, finding_for
from orthrus.decode.footprint import require_states
from orthrus.decode.geometry import Geometry
from orthrus.decode.learned import experience_of
from orthrus.decode.noise import stream_of
from orthrus.decode.options import Options
from orthrus.decode.passes import Passes, Proposal
from orthrus.decode.processing import Kept, Processing
from orthrus.decode.processors import Request
from orthrus.decode.prompts import Reader, limit_of
from orthrus.decode.rows import Ready, Row, Rows
from orthrus.decode.stop import Stopper
from orthrus.errors import ConfigError
from orthrus.model.attach import evaluating
from orthrus.model.attachment import attachment_of
from orthrus.model.cache import ScratchCache
from orthrus.model.graphs import lend
from orthrus.policy.policy import Policy
from orthrus.policy.steps import Plan, Step


@dataclass(frozen=True, slots=True)
class Progress:
    """What one step added to one row: a first token where a draft pass gave one, accepted drafts, and the bonus.

    The first of all is alone: a prompt's own pass has given it. One step has at most one of these for each row.

    `kept` holds their logits where the options ask for them.
    """

    row: Row
    token_ids: list[int]
    accepted: int
    kept: Kept | None = None
    first: bool = False


class Engine:
    """Decode many completions at once over one cache that is never copied.

    Args:
        model: a dual-view model.
        rows: completions in flight at most.
        capacity: positions per row, scratch for one block included (`Engine.room` says how many a request needs).
        plan: how many drafts each cycle proposes.
        prefill_chunk: prompt positions per prefill pass at most; `prompts.CHUNK` unless given.
        prefill_slice: prompt positions read between two tokens of a row that decodes, at most; `prompts.SLICE` unless
            given. With `exact="token"` rounded to whole passes.
        admit_free: rows that must be free before waiting completions join (more of them share a prefill pass).
        exact: "distribution" (the method's guarantee: the same text in float32, the same distribution always) or
            "token" (the same tokens as plain decoding with `exact="token"`, at any precision, bit for bit; where the
            device's kernels forbid it, decodes plainly and warns).
        drafter: who proposes; unless given, the one that the model was loaded with or else its own diffusion view.
            Passes that verify draft for the view alone, so others are refused under plans of one pass a cycle.
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
        self.drafter = drafter_for(model, plan, drafter)
        block = block_of(model, self.drafter)
        plan = drafted_by(plan, self.drafter, block=block)
        self.finding = None
        if exact == "token":
            with attachment_of(model).lock, evaluating(model):
                self.finding = finding_for(model, width=block, rows=rows)
                plan = bit_for_bit(plan, model, self.finding, block=block, rows=rows)
        self.policy = Policy(plan, block=block, experience=experience_of(model, exact, plan, self.drafter))
        self.capacity = capacity
        geometry = None if self.finding is None else self.finding.geometry
        room = capacity if geometry is None else geometry.capacity(capacity)
        require_states(model, rows=rows, capacity=room, terms=self.policy.scratch)
        self.cache = lend(model, rows=rows, capacity=room, borrower=self)
        self.passes = passes(model, self.cache, geometry)
        if self.drafter.taps and self.passes.runner.compiled:
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
        ahead = not self.passes.runner.compiled and (self.finding is None or self.finding.drafts_exact)
        ahead = ahead and isinstance(self.drafter, ViewDrafter) and self.drafter.ahead
        policy = self.policy if ahead else None
        self.reader = Reader(self.rows, self.passes, chunk=prefill_chunk, most=prefill_slice, policy=policy)
        self.admit_free = admit_free
        self.context_length: int = model.config.get_text_config().max_position_embeddings
        self.vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self.clock = clock
        self.waiting: deque[Row] = deque()
        self._held = False  # whether any of them waits for another's keys
        self._gained: list[Progress] = []  # what no step has returned yet
        self._next_id = 0

    @staticmethod
    def room(prompt: int, max_new_tokens: int, scratch: int) -> int:
        """Return the cache positions a completion needs: prompt, text, and the scratch of one step."""
        return prompt + max_new_tokens + scratch

    @property
    def busy(self) -> bool:
        """True while a completion is waiting or in flight, or what one has gained is still to be returned."""
        return bool(self.waiting or self.live or self.rows.reading or self._gained)

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
        ids = [self.add(prompt, its, tokenizer=tokenizer, index=index) for index, (prompt, its) in pairs]
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
        limit = limit_of(
            prompt_ids,
            options,
            vocabulary=self.vocabulary,
            context=self.context_length,
            capacity=self.capacity,
            scratch=self.policy.scratch,
        )
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
        self._gained = [progress for progress in self._gained if progress.row.id != id]
        for row in (*self.waiting, *self.live, *self.rows.reading):
            if row.id == id:
                row.finish_reason = "abort"
                (self.waiting if row in self.waiting else self.rows).remove(row)
                return True
        return False

    @torch.inference_mode()
    def step(self) -> list[Progress]:
        """Admit what fits, run one cycle over the rows that decode already, and return what each row has gained.

        Rows whose prompts this step has read gain their first token, and are in the next step's cycle.
        An exception of one row's own (logits that are no numbers, a stopper that raises) ends that row with an error.
        Any other leaves all rows as they were, and first tokens that are written already to the next step. The model is
        in evaluation mode meanwhile. Engines of one model may run in several threads, whose steps take turns.
        """
        model = self.passes.model
        with attachment_of(model).lock, evaluating(model), tapped(model, self.cache, self.drafter):
            return self._step()

    def _step(self) -> list[Progress]:
        if not self._gained:
            self._admit()
            decoding = len(self.live)
            for where, made in self.reader.step():
                self._begin(where, made)
            if rows := self.live[:decoding]:  # new ones stand behind
                self._cycle(rows)
        for row in self.live:
            if row.finish_reason is not None:
                self.rows.remove(row)
        gained, self._gained = self._gained, []
        return gained

    def _cycle(self, rows: Sequence[Row]) -> None:
        """Run one cycle over the rows at the front."""
        for row in rows:
            row.observe(copies=self.policy.copies)
        step = self.policy.choose([row.state for row in rows])
        started = self.clock()
        batch = self._batch(rows, step)
        outcome = cycle(self.passes, batch, step, drafter=self.drafter)
        taken = self.clock() - started
        self.policy.learn(step, [outcome_of(row, i, step, batch, outcome) for i, row in enumerate(rows)], taken)
        self._keep(rows, batch, step, outcome)

    def _begin(self, where: slice, made: Proposal) -> None:
        """Write the first token of rows whose prompts have been read."""
        rows = self.rows.at(where)
        batch = self._batch(rows, Step(), start=where.start)
        self._keep(rows, batch, Step(), begin(self.passes, batch, made))

    def _batch(self, rows: Sequence[Row], step: Step, *, start: int = 0) -> Batch:
        trusted = self.finding is None or self.finding.drafts_exact
        whole = self.passes.runner.compiled
        return batch_of(rows, self.cache, step, start=start, coupled=self.coupled, whole=whole, trusted=trusted)

    def _keep(self, rows: Sequence[Row], batch: Batch, step: Step, outcome: Outcome) -> None:
        """Give rows what a cycle made of them."""
        self._gained += (_kept(row, index, step, batch, outcome, self.drafter.name) for index, row in enumerate(rows))
        self.drafter.accepted(batch.states, [len(tokens) for tokens in outcome.tokens])

    def _admit(self) -> None:
        """Let waiting completions join; a place stays free for each that waits for another's keys."""
        if self._held or self.rows.free >= self.admit_free or not (self.live or self.rows.reading):
            self._held = False
            for row in list(islice(self.waiting, self.rows.free)):
                cached = self.rows.join(row)
                if cached is None:
                    self._held = True
                    continue
                self.waiting.remove(row)
                row.cached = cached
                row.drafting = self.drafter.reset(row)


def _kept(row: Row, index: int, step: Step, batch: Batch, outcome: Outcome, drafter: str) -> Progress:
    """Give a row what a cycle made of it."""
    tokens, broken, blind = outcome.tokens[index], outcome.broken[index], outcome.ranks is not None
    met = outcome.ranks is None or outcome.ranks[index] < step.stops
    row.ready = Ready(outcome.ready_BMV[index], blind) if met and outcome.ready_BMV is not None else None
    kept, logits = row.keep(tokens, broken=broken)
    first = outcome.has_first[index]
    accepted = max(min(len(kept), len(tokens) if broken else len(tokens) - 1) - first, 0)
    drew = outcome.draft_passes if batch.drawing.start <= index < batch.drawing.stop else 0
    own = drafter == VIEW
    verified = not (drew and first and row.finish_reason and len(kept) == 1)  # a text that ends there needs no more
    row.stats.record(
        drafted=outcome.drafted,
        accepted=accepted,
        emitted=len(kept),
        forwards=drew * own + outcome.forwards * verified,
        first=step.kind != "plain" and (first or led(row, index, step, batch)),
        drafter=drafter if drew and not own else None,
        draft_passes=drew,
    )
    return Progress(row, kept, accepted, logits, first=first)
