"""The start of every measurement: encode prompts, find what a file of results lacks, write the head of its lines."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.bench import lines
from orthrus.bench.contenders import Answer, Contender
from orthrus.bench.lines import Result
from orthrus.bench.suites import Item, read_suites
from orthrus.checkpoints.load import PRECISIONS
from orthrus.data.records import append
from orthrus.decode.text import encode
from orthrus.errors import ConfigError, PromptError
from orthrus.model.fingerprint import weights_digest
from orthrus.provenance import device_name, digest, provenance

Loader: TypeAlias = Callable[[str], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
"""Load the model that is measured in the precision of that name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is asked for, whatever is measured.

    Attributes:
        model: the model's name, as figures are to be labelled.
        suites: names for `orthrus.bench.suites.read_suites`.
        folder: where suites are looked for first.
        limit: prompts of each suite.
        dtypes: precisions by name.
        max_new_tokens: tokens per answer at most (fewer where the model's context ends).

    Raises:
        ConfigError: a list that is empty or names something twice, an unknown precision, no token to write.
    """

    model: str
    suites: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None
    dtypes: tuple[str, ...] = ("float32",)
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        require_named(suites=self.suites, dtypes=self.dtypes)
        for dtype in self.dtypes:
            if dtype not in PRECISIONS:
                raise ConfigError(f"a precision is one of {', '.join(PRECISIONS)}, found {dtype!r}")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}")

    def items(self) -> list[Item]:
        """Read the prompts."""
        return read_suites(self.suites, folder=self.folder, limit=self.limit)


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A prompt in the model's own tokens."""

    item: Item
    token_ids: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Heat:
    """Prompts of one suite that all contenders answer in turn."""

    dtype: str
    batch: int
    prompts: list[Encoded]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """The work of a run: batches, laps in total, prompts done before, prompts too long."""

    heats: list[Heat]
    laps: int
    done: int
    too_long: int


def require_named(**values: Sequence[Any]) -> None:
    """Refuse lists of a job that are empty or name something twice.

    Raises:
        ConfigError: with the list's name.
    """
    for name, listed in values.items():
        if not listed or len(set(listed)) < len(listed):
            raise ConfigError(f"{name} must name at least one, and each one once; found {list(listed)}")


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


def settings(
    name: str, model: PreTrainedModel, contenders: Sequence[Contender], *, max_new_tokens: int, rounds: int
) -> dict[str, Any]:
    """Return what all figures depend on, as JSON values."""
    return {
        "model": name,
        "weights": weights_digest(model),
        "contenders": [[c.mode, c.plan, c.exact] for c in contenders],
        "max_new_tokens": max_new_tokens,
        "rounds": rounds,
        "device": device_name(model.device),
        "threads": torch.get_num_threads(),
    }


def heats(
    prompts: Sequence[Encoded], *, dtype: str, batch: int, chunk: int, pending: Callable[[Encoded], bool]
) -> list[Heat]:
    """Cut the prompts that are still to be answered, suite by suite, into chunks."""
    out: list[Heat] = []
    for suite in dict.fromkeys(prompt.item.suite for prompt in prompts):
        left = [prompt for prompt in prompts if prompt.item.suite == suite and pending(prompt)]
        out += [Heat(dtype=dtype, batch=batch, prompts=left[cut : cut + chunk]) for cut in range(0, len(left), chunk)]
    return out


def write_head(
    output: Path, settings: Mapping[str, Any], *, dtypes: Sequence[str], device: torch.device
) -> dict[str, str]:
    """Write what a run was made with; returns the ids of that and of its settings, for each of its lines."""
    head = lines.head({**provenance(dtypes=dtypes, device=device), "settings": settings})
    labels = {"provenance": head["id"], "configuration": digest(settings)}
    append(output, [{**head, "configuration": labels["configuration"]}])
    return labels


def result(
    labels: Mapping[str, str],
    heat: Heat,
    prompt: Encoded,
    contender: Contender,
    answer: Answer,
    *,
    batch: int,
    seconds: Sequence[float],
    identical: bool | None,
    diverges_at: int | None,
    right: bool | None = None,
) -> Result:
    """Return the line of one answer; `seconds` are those of the prompt in each round."""
    return Result(
        **labels,
        suite=prompt.item.suite,
        id=prompt.item.id,
        domain=prompt.item.domain,
        mode=contender.mode,
        plan=contender.plan,
        exact=contender.exact,
        dtype=heat.dtype,
        batch=batch,
        rows=min(batch, len(heat.prompts)),
        group=heat.prompts[0].item.id,
        prompt_tokens=len(prompt.token_ids),
        seconds=median(seconds),
        rounds_seconds=list(seconds),
        stats=dict(answer.stats),
        proposed_per_position=answer.proposed_per_position,
        accepted_at_position=answer.accepted_at_position,
        token_hash=token_hash(answer.token_ids),
        identical=identical,
        diverges_at=diverges_at,
        right=right,
    )


def token_hash(token_ids: Sequence[int]) -> str:
    """Return a digest that tells texts apart by their tokens."""
    return hashlib.sha256(json.dumps(list(token_ids)).encode()).hexdigest()[:16]


def who(contenders: Sequence[Contender]) -> set[lines.Who]:
    """Return contenders as lines name them."""
    return {(contender.mode, contender.plan, contender.exact) for contender in contenders}
