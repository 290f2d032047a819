"""A measurement from start to end: suites × contenders × batch sizes × precisions, into one file of results."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.bench import lines, session
from orthrus.bench.contenders import ALONE, LLAMA, OWN, decoders, fits
from orthrus.bench.lines import Result
from orthrus.bench.metrics import split
from orthrus.bench.peers import ggufs, llamacpp
from orthrus.bench.race import PLAIN, Clock, Contender, Decoder, Laps, first_difference, race
from orthrus.bench.session import Cut, Heat, Loader, Outlook
from orthrus.bench.speed.prices import Meter, Prices
from orthrus.bench.suites import judge
from orthrus.data.records import append
from orthrus.decode.learned import begin_anew
from orthrus.decode.prepared import record_passes
from orthrus.errors import ConfigError
from orthrus.provenance import digest, digest_of

Others: TypeAlias = Callable[[PreTrainedModel, PreTrainedTokenizerBase], Mapping[Contender, Decoder]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job(session.Job):
    """What is asked for.

    Attributes:
        warmup: rounds before the first batch of each size and precision that are not measured. Passes that are recorded
            on CPUs are recorded before them (`decode.prepared`), but not those of `exact="token"`, and none where peers
            take part or prices count.
        offload: whether the backbone's layers are read from disk in every pass.
        prices: a file of measured passes (`orthrus bench passes`) whose seconds count in place of the clock's.
        gguf: files and forms that llama.cpp answers from; `gguf_source` unless given, which the backbone was read from.
    """

    contenders: tuple[Contender, ...]
    batches: tuple[int, ...] = (1,)
    rounds: int = 3
    warmup: int = 1
    compile: bool = False
    offload: bool = False
    prices: Path | None = None
    gguf: tuple[str, ...] = ()
    gguf_source: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        session.Job.__post_init__(self)
        session.require_named(batches=self.batches)
        for name, least in (("rounds", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, found {getattr(self, name)}")
        if min(self.batches) < 1:
            raise ConfigError(f"a batch must be of at least 1 prompt, found {min(self.batches)}")
        for batch in self.batches:
            if not self.contenders_at(batch):
                raise ConfigError(f"none of the modes asked for can run batches of {batch}: {', '.join(ALONE)} take 1")
        if left := [c.mode for c in self.contenders if not any(fits(c, batch) for batch in self.batches)]:
            raise ConfigError(
                f"{left[0]} takes one prompt at a time, so batches of 1 are required, found {list(self.batches)}: "
                "add 1, or leave it out"
            )
        strangers = sorted({c.mode for c in self.contenders if c.mode not in OWN})
        if self.prices is not None and strangers:
            raise ConfigError(f"prices are of our own passes, so modes must be {' and '.join(OWN)}, found {strangers}")

    def contenders_at(self, batch: int) -> list[Contender]:
        """Return the contenders that can run batches of this size."""
        return [contender for contender in self.contenders if fits(contender, batch)]


def run(
    job: Job,
    output: Path,
    *,
    load: Loader,
    clock: Clock = perf_counter,
    on_start: Callable[[Outlook], None] = lambda _: None,
    on_lap: Callable[[], None] = lambda: None,
    others: Others | None = None,
) -> dict[str, str]:
    """Measure what is asked for and not yet in the file, and write it there, batch by batch.

    `others` makes the decoders of contenders, for a model that is loaded; those of their modes unless given. Returns
    the labels of the run's lines; none where there was nothing to do.

    Raises:
        ConfigError, DataError: what is asked for cannot be had, or the file is not one of results.
        PromptError: all prompts are longer than the model's context.
    """
    weights = _llama_weights(job)
    items = job.items()
    model, tokenizer = _loaded(job, load, job.dtypes[0])
    for file in weights.values():
        file.check(model)
    prompts, too_long = session.encoded(items, model, tokenizer)
    prices = {} if job.prices is None else {dtype: Prices.read(job.prices, dtype) for dtype in job.dtypes}
    settings = configuration(job, model)
    if weights:
        described = {label or "own": file.to_dict() for label, file in weights.items()}
        settings |= {"llama.cpp": llamacpp.build(), "gguf": described}
    context = max(len(prompt.token_ids) for prompt in prompts) + job.max_new_tokens
    done = lines.take_up(output, digest(settings), {batch: set(job.contenders_at(batch)) for batch in job.batches})
    cuts = [Cut(dtype, (batch,), batch) for dtype in job.dtypes for batch in job.batches]

    def laps(heat: Heat) -> int:
        return len(job.contenders_at(heat.cut.chunk)) * job.rounds

    outlook = session.outlook(prompts, cuts, digest(settings), done, laps=laps, too_long=too_long)
    on_start(outlook)
    if not outlook.heats:
        return {}
    given = others and others(model, tokenizer)  # who cannot be loaded is refused before anything is written
    labels = session.write_head(output, settings, dtypes=job.dtypes, device=model.device)
    at = job.dtypes[0]
    for (dtype, _, batch), heats in split(outlook.heats, lambda heat: heat.cut).items():
        if dtype != at:
            (model, tokenizer), at = _loaded(job, load, dtype), dtype
            given = others and others(model, tokenizer)
        meter = Meter(prices[dtype]) if dtype in prices else None
        everyone, engine = job.contenders_at(batch), meter.engine() if meter else {}
        own = [c for c in everyone if c.mode in OWN and c.exact != "token"]
        if own and not (given or meter):
            record_passes(model, rows=batch, drafts=any(c.mode != "ar" for c in own))
        if given:
            runners = {contender: given[contender] for contender in everyone}
        else:
            runners = decoders(model, tokenizer, everyone, engine=engine, weights=weights, context=context)
        _race_all(job, heats, runners, model, tokenizer, output, labels, clock=meter or clock, on_lap=on_lap)
    return labels


def _llama_weights(job: Job) -> dict[str | None, ggufs.Weights]:
    """Find llama.cpp and its files, where it takes part, before anything else takes time."""
    if not any(c.mode in LLAMA for c in job.contenders):
        return {}
    llamacpp.check()
    return ggufs.weights(job.gguf, job.gguf_source)


def _loaded(job: Job, load: Loader, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = load(dtype)
    begin_anew(model)  # figures do not depend on what was run before
    return model, tokenizer


def configuration(job: Job, model: PreTrainedModel) -> dict[str, Any]:
    """Return all that figures depend on, as JSON values, but for what each line says by itself."""
    return {
        **session.settings(job, model, job.contenders, rounds=job.rounds),
        "warmup": job.warmup,
        **job.settings,
        **({"compile": True} if job.compile else {}),
        **({"offload": True} if job.offload else {}),
        **({"prices": [job.prices.name, digest_of(job.prices.read_bytes())]} if job.prices is not None else {}),
    }


def _race_all(
    job: Job,
    heats: Sequence[Heat],
    runners: Mapping[Contender, Decoder],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    labels: Mapping[str, str],
    *,
    clock: Clock,
    on_lap: Callable[[], None],
) -> None:
    """Race over batches of one size in one precision, and write each one's lines together."""
    context: int = model.config.get_text_config().max_position_embeddings
    for turn, heat in enumerate(heats):
        ids = [prompt.token_ids for prompt in heat.prompts]
        limit = min(job.max_new_tokens, context - max(map(len, ids)))
        for _ in range(job.warmup if turn == 0 else 0):
            for decode in runners.values():
                decode(ids, limit)
        laps = race(runners, ids, max_new_tokens=limit, rounds=job.rounds, turn=turn, clock=clock, on_lap=on_lap)
        append(output, [line.to_record() for line in _results(heat, laps, tokenizer, labels)])


def _results(
    heat: Heat, laps: Mapping[Contender, Laps], tokenizer: PreTrainedTokenizerBase, labels: Mapping[str, str]
) -> list[Result]:
    out = []
    for index, prompt in enumerate(heat.prompts):
        verdicts: dict[str, bool | None] = {}
        for contender, lap in laps.items():
            answer = lap.answers[0][index]
            text = tokenizer.decode(answer.token_ids, skip_special_tokens=True)
            if text not in verdicts:  # equal texts are judged once: judging code runs it
                verdicts[text] = judge(prompt.item, text)
            plain = laps.get(PLAIN._replace(exact=contender.exact or PLAIN.exact))
            pairs = zip(lap.tokens(index), plain.tokens(index) if plain else [], strict=False)
            differences = [place for pair in pairs if (place := first_difference(*pair)) is not None]
            seconds = [of_round / len(heat.prompts) for of_round in lap.seconds]
            out.append(
                Result(
                    **session.answered(labels, heat, prompt, contender, answer, batch=heat.cut.chunk, seconds=seconds),
                    identical=None if plain is None else not differences,
                    diverges_at=min(differences, default=None),
                    right=verdicts[text],
                )
            )
    return out
