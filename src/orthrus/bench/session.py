"""The start of every measurement: encode prompts, find what a file of results lacks, write the head of its lines."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.bench import lines, metrics
from orthrus.bench.race import Answer, Contender
from orthrus.bench.suites import Item, read_suites
from orthrus.checkpoints.load import PRECISIONS
from orthrus.data.records import append
from orthrus.decode.text import encode
from orthrus.errors import ConfigError, PromptError
from orthrus.model.fingerprint import weights_digest
from orthrus.provenance import device_name, digest

Loader: TypeAlias = Callable[[str | None], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
"""Load the model that is measured in the precision of that name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is asked for, whatever is measured.

    Attributes:
        model: the model's name, as figures are to be labelled.
        suites: names for `orthrus.bench.suites.read_suites`, looked for in `folder` first; `limit` prompts of each.
        max_new_tokens: tokens per answer at most (fewer where the model's context ends).

    Raises ConfigError: a list that is empty or names something twice, an unknown precision, no token to write.
    """

    model: str
    suites: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None
    dtypes: tuple[str, ...] = ("float32",)
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        require_named(suites=self.suites, dtypes=self.dtypes)
        require_precisions(self.dtypes)
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}")

    def items(self) -> list[Item]:
        return read_suites(self.suites, folder=self.folder, limit=self.limit)


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A prompt in the model's own tokens."""

    item: Item
    token_ids: list[int]

    @property
    def names(self) -> dict[str, str]:
        return {"suite": self.item.suite, "id": self.item.id, "domain": self.item.domain}


class Cut(NamedTuple):
    """How prompts are answered together: in a precision, at these batch sizes, so many before lines are written."""

    dtype: str
    batches: tuple[int, ...]
    chunk: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Heat:
    """Prompts of one suite that are answered together."""

    cut: Cut
    prompts: list[Encoded]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """The work of a run: batches, laps in total, prompts done before, prompts too long."""

    heats: list[Heat]
    laps: int
    done: int
    too_long: int


def require_named(**values: Sequence[Any]) -> None:
    """Refuse lists of a job that are empty or name something twice; raises ConfigError with the list's name."""
    for name, listed in values.items():
        if not listed or len(set(listed)) < len(listed):
            raise ConfigError(f"{name} must name at least one, and each one once; found {list(listed)}")


def require_precisions(dtypes: Sequence[str]) -> None:
    """Refuse an unknown precision; raises ConfigError with its name."""
    if unknown := [dtype for dtype in dtypes if dtype not in PRECISIONS]:
        raise ConfigError(f"a precision is one of {', '.join(PRECISIONS)}, found {unknown[0]!r}")


def encoded(
    items: Sequence[Item], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Encoded], int]:
    """Return the prompts that leave room for an answer in the model's context, and how many do not."""
    context = model.config.get_text_config().max_position_embeddings
    every = [Encoded(item=item, token_ids=encode(tokenizer, item.messages, tools=item.tools)) for item in items]
    short = [prompt for prompt in every if len(prompt.token_ids) < context]
    if not short:
        raise PromptError(f"prompts must be shorter than the model's context of {context} tokens, found none that is")
    return short, len(every) - len(short)


def settings(job: Job, model: PreTrainedModel, contenders: Sequence[Contender], *, rounds: int = 1) -> dict[str, Any]:
    return {
        "model": job.model,
        "weights": weights_digest(model),
        "contenders": [list(contender) for contender in contenders],
        "max_new_tokens": job.max_new_tokens,
        "rounds": rounds,
        "device": device_name(model.device),
        "threads": torch.get_num_threads(),
    }


def outlook(
    prompts: Sequence[Encoded],
    cuts: Sequence[Cut],
    configuration: str,
    done: Set[lines.Prompt],
    *,
    laps: Callable[[Heat], int],
    too_long: int,
) -> Outlook:
    """Cut the prompts that are still to be answered, suite by suite; `laps` says how many a heat takes."""
    heats: list[Heat] = []
    for cut in cuts:
        labels = [(configuration, cut.dtype, batch) for batch in cut.batches]
        for of_suite in metrics.split(prompts, lambda prompt: prompt.item.suite).values():
            left = [p for p in of_suite if any((*label, p.item.suite, p.item.id) not in done for label in labels)]
            heats += [Heat(cut=cut, prompts=left[at : at + cut.chunk]) for at in range(0, len(left), cut.chunk)]
    todo = sum(len(heat.prompts) for heat in heats)
    return Outlook(heats=heats, laps=sum(map(laps, heats)), done=len(prompts) * len(cuts) - todo, too_long=too_long)


def write_head(
    output: Path, settings: Mapping[str, Any], *, dtypes: Sequence[str], device: torch.device
) -> dict[str, str]:
    """Write what a run was made with; returns the ids of that and of its settings, for each of its lines."""
    head = lines.head(dtypes=dtypes, device=device, settings=settings)
    labels = {"provenance": head["id"], "configuration": digest(settings)}
    append(output, [{**head, "configuration": labels["configuration"]}])
    return labels


def answered(
    labels: Mapping[str, str],
    heat: Heat,
    prompt: Encoded,
    contender: Contender,
    answer: Answer,
    *,
    batch: int,
    seconds: Sequence[float],
) -> dict[str, Any]:
    """Return what the line of one answer says of it alone; `seconds` are those of the prompt in each round."""
    return {
        **labels,
        **prompt.names,
        **contender._asdict(),
        "dtype": heat.cut.dtype,
        "batch": batch,
        "rows": min(batch, len(heat.prompts)),
        "group": heat.prompts[0].item.id,
        "prompt_tokens": len(prompt.token_ids),
        "seconds": median(seconds),
        "rounds_seconds": list(seconds),
        "stats": dict(answer.stats),
        "proposed_per_position": answer.proposed_per_position,
        "accepted_at_position": answer.accepted_at_position,
        "token_hash": token_hash(answer.token_ids),
    }


def token_hash(token_ids: Sequence[int]) -> str:
    """Return a digest that tells texts apart by their tokens."""
    return hashlib.sha256(json.dumps(list(token_ids)).encode()).hexdigest()[:16]
