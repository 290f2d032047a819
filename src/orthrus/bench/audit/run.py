"""An audit: does every plan, batch and precision write the text that plain decoding, alone, and `generate` write?

One engine works through a whole chunk of prompts, so that rows join as others end.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Final, TypeAlias

import torch
from transformers import PreTrainedModel

from orthrus.bench import lines, session
from orthrus.bench.audit.verdicts import Divergence, Reference, Verdict, close, from_hf
from orthrus.bench.contenders import contenders
from orthrus.bench.metrics import split
from orthrus.bench.race import Answer, Clock, Contender
from orthrus.bench.session import Cut, Encoded, Heat, Loader, Outlook
from orthrus.bench.texts import Plain, Writer, perplexity
from orthrus.data.records import append
from orthrus.decode.exact import Exact, finding_for
from orthrus.decode.learned import begin_anew
from orthrus.decode.rows import Row
from orthrus.errors import ConfigError
from orthrus.model.attach import config_of
from orthrus.model.fingerprint import operators_of
from orthrus.provenance import device_name, digest

SCORER: Final = "float32"

Seat: TypeAlias = tuple[Contender, int]
"""Who answers, and how many rows at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job(session.Job):
    """What is asked for: `exacts` is what is promised, `plans` are those of mode "orthrus", `batches` rows at once."""

    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    exacts: tuple[str, ...] = ("distribution", "token")
    plans: tuple[str, ...] = ("auto",)
    batches: tuple[int, ...] = (1, 4)
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        session.Job.__post_init__(self)
        session.require_named(batches=self.batches)
        if min(self.batches) < 1:
            raise ConfigError(f"batches must be at least 1, found {min(self.batches)}")
        self.contenders()

    def contenders(self) -> tuple[Contender, ...]:
        """Return everyone who answers: plain decoding and every plan, as exact as asked."""
        return contenders(("ar", "orthrus"), self.plans, self.exacts)

    def seats(self) -> list[Seat]:
        return [(contender, batch) for batch in self.batches for contender in self.contenders()]

    @property
    def chunk(self) -> int:
        """How many prompts are answered and written together: enough for rows to end while others wait."""
        return 2 * max(self.batches)


def run(
    job: Job,
    output: Path,
    *,
    load: Loader,
    clock: Clock = perf_counter,
    on_start: Callable[[Outlook], None] = lambda _: None,
    on_lap: Callable[[], None] = lambda: None,
) -> str:
    """Audit what is not in the file yet, write it there chunk by chunk, and return the configuration's id.

    The float32 model stays in memory beside the others, to score texts.

    Raises:
        ConfigError, DataError: what is asked for cannot be had, or the file is not one of results.
        PromptError: all prompts are longer than the model's context.
    """
    items = job.items()
    scorer, tokenizer = load(SCORER)
    prompts, too_long = session.encoded(items, scorer, tokenizer)
    settings = configuration(job, scorer)
    done = lines.take_up(output, digest(settings), {batch: set(job.contenders()) for batch in job.batches})
    cuts = [Cut(dtype, job.batches, job.chunk) for dtype in job.dtypes]
    laps = 1 + len(job.exacts) + len(job.seats())
    outlook = session.outlook(prompts, cuts, digest(settings), done, laps=lambda _: laps, too_long=too_long)
    on_start(outlook)
    if not outlook.heats:
        return digest(settings)
    labels = session.write_head(output, settings, dtypes=job.dtypes, device=scorer.device)
    for dtype, heats in split(outlook.heats, lambda heat: heat.cut.dtype).items():
        model = scorer if dtype == SCORER else load(dtype)[0]
        begin_anew(model)
        writer = Writer(model, tokenizer, job.max_new_tokens)
        audit = _Audit(
            job=job,
            writer=writer,
            scorer=scorer,
            labels=labels,
            conditions={exact: conditions(model, exact) for exact in job.exacts},
            clock=clock,
            on_lap=on_lap,
        )
        for turn, heat in enumerate(heats):
            references, verdicts = audit.chunk(heat, turn)
            new = [verdict for verdict in verdicts if verdict.prompt not in done]
            append(output, [*(r.to_record() for r in references), *(v.to_record() for v in new)])
    return digest(settings)


def configuration(job: Job, model: PreTrainedModel) -> dict[str, Any]:
    """Return all that verdicts depend on, as JSON values, but for what each line says by itself."""
    return {
        **session.settings(job, model, job.contenders()),
        "audit": True,
        # Whose kernels regroup tokens with their neighbours, unlike those of dense models.
        "experts": any(name.rpartition(".")[2] == "experts" for name, _ in model.named_modules()),
    }


def conditions(model: PreTrainedModel, exact: str) -> dict[str, Any]:
    """Return what a promise depends on: device, attention, operators, threads, and what the probe found if asked."""
    finding = finding_for(model, width=config_of(model).proposals + 1) if exact == "token" else None
    return {
        "device": device_name(model.device),
        "attention": model.config._attn_implementation,
        "operators": operators_of(model),
        "threads": torch.get_num_threads(),
        "finding": None if finding is None else dataclasses.asdict(finding),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Audit:
    """One precision of the model, and how its texts become lines."""

    job: Job
    writer: Writer
    scorer: PreTrainedModel
    labels: Mapping[str, str]
    conditions: Mapping[str, Mapping[str, Any]]
    clock: Clock
    on_lap: Callable[[], None]

    def chunk(self, heat: Heat, turn: int) -> tuple[list[Reference], list[Verdict]]:
        """Answer a chunk of prompts in every way; the order moves on with each turn, and the first is warmed up."""
        ids = [prompt.token_ids for prompt in heat.prompts]
        hf = [self.writer.hf(prompt) for prompt in ids]
        self.on_lap()
        plain: dict[Exact | None, list[Plain]] = {}
        references: list[Reference] = []
        for exact in dict.fromkeys(who.exact for who in self.job.contenders() if who.exact is not None):
            plain[exact] = [self.writer.plain(prompt, exact) for prompt in ids]
            trios = zip(heat.prompts, plain[exact], hf, strict=True)
            references += [self._reference(heat.cut.dtype, exact, *trio) for trio in trios]
            self.on_lap()
        verdicts: list[Verdict] = []
        seats = self.job.seats()
        first = turn % len(seats)
        for who, batch in seats[first:] + seats[:first]:
            if turn == 0:
                self.writer.answers(ids[:1], who, 1)
            began = self.clock()
            rows = self.writer.answers(ids, who, batch)
            seconds = (self.clock() - began) / len(rows)
            texts = zip(heat.prompts, rows, plain[who.exact], hf, strict=True)
            verdicts += [self._verdict(heat, who, batch, seconds, *text) for text in texts]
            self.on_lap()
        return references, verdicts

    def _reference(self, dtype: str, exact: Exact, prompt: Encoded, plain: Plain, hf_ids: list[int]) -> Reference:
        return Reference(
            **self.labels,
            **prompt.names,
            dtype=dtype,
            exact=exact,
            tokens=len(plain.token_ids),
            token_hash=session.token_hash(plain.token_ids),
            perplexity=perplexity(self.scorer, prompt.token_ids, plain.token_ids),
            close=close(plain.gaps),
            hf=from_hf(plain.token_ids, hf_ids, plain.token_ids, plain.gaps),
        )

    def _verdict(
        self,
        heat: Heat,
        who: Contender,
        batch: int,
        seconds: float,
        prompt: Encoded,
        row: Row,
        plain: Plain,
        hf_ids: list[int],
    ) -> Verdict:
        parting = Divergence.of(row.token_ids, plain.token_ids, plain.gaps)
        return Verdict(
            **session.answered(self.labels, heat, prompt, who, Answer.of(row), batch=batch, seconds=[seconds]),
            identical=parting is None,
            diverges_at=None if parting is None else parting.at,
            right=None,
            gap=None if parting is None else parting.gap,
            hf=from_hf(row.token_ids, hf_ids, plain.token_ids, plain.gaps),
            conditions=self.conditions[str(who.exact)],
        )
