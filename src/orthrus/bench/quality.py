"""What a precision costs in quality: plain decoding's answers in float32 are read again in other precisions.

Both precisions see the same text, so every token is compared, and one early difference does not hide the rest.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from orthrus.bench import metrics, session
from orthrus.bench.lines import OfPrompt
from orthrus.bench.metrics import Estimate
from orthrus.bench.race import PLAIN
from orthrus.bench.rounding import require_forms, round_as
from orthrus.bench.session import Cut, Loader, Outlook
from orthrus.bench.suites import judge
from orthrus.bench.texts import Writer, answer_logits
from orthrus.data.records import append, read_records
from orthrus.errors import DataError
from orthrus.provenance import digest

REFERENCE: Final = "float32"


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality(OfPrompt):
    """One answer of plain decoding in float32, read in one precision; other fields are as of `Result`.

    Attributes:
        loss: nats per token of the answer.
        divergence: Kullback-Leibler divergence from float32's next-token distribution, in nats per token.
        agreed: tokens of the answer that are this precision's most likely ones, too.
    """

    kind: ClassVar[str] = "quality"

    dtype: str
    tokens: int
    loss: float
    divergence: float
    agreed: int
    right: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The figures of one precision on one suite, as of `Quality`; `ratio` is of perplexities, over float32's."""

    configuration: str
    suite: str
    dtype: str
    prompts: int
    tokens: int
    perplexity: float
    ratio: Estimate
    divergence: float
    agreement: float
    right: float | None


def summaries(lines: Iterable[Quality], *, where: str) -> list[Summary]:
    """Return figures of every suite and precision; raises DataError for a line without float32's beside it."""
    every = {(line.configuration, line.suite, line.dtype, line.id): line for line in lines}
    groups = metrics.split(every.values(), lambda line: (line.configuration, line.suite, line.dtype))
    out = []
    for (configuration, suite, dtype), part in groups.items():
        base = {line.id: line for line in groups.get((configuration, suite, REFERENCE), ())}
        if alone := {line.id for line in part} - base.keys():
            raise DataError(
                f"{where}: {dtype} of {suite} needs a line in {REFERENCE} beside each, found none of {alone}"
            )
        total = sum(line.tokens for line in part)
        more_N2 = np.array([[(line.loss - base[line.id].loss) * line.tokens, line.tokens] for line in part])
        judged = [line.right for line in part if line.right is not None]
        summary = Summary(
            configuration=configuration,
            suite=suite,
            dtype=dtype,
            prompts=len(part),
            tokens=total,
            perplexity=math.exp(sum(line.loss * line.tokens for line in part) / total),
            ratio=metrics.bootstrap(more_N2, lambda values: np.exp(metrics.ratio_of_sums(values))),
            divergence=sum(line.divergence * line.tokens for line in part) / total,
            agreement=sum(line.agreed for line in part) / total,
            right=sum(judged) / len(judged) if judged else None,
        )
        out.append(summary)
    return out


def run(
    job: session.Job,
    output: Path,
    *,
    load: Loader,
    forms: Sequence[str] = (),
    on_start: Callable[[Outlook], None] = lambda _: None,
    on_lap: Callable[[], None] = lambda: None,
) -> str:
    """Measure what is not in the file yet, write it there prompt by prompt, and return the configuration's id.

    Args:
        job: float32 is always measured with the precisions that are named, and stays in memory beside them.
        forms: of llama.cpp's, to be measured like precisions (`orthrus.bench.rounding`).

    Raises:
        ConfigError, DataError: what is asked for cannot be had, or the file is not one of results.
        PromptError: all prompts are longer than the model's context.
    """
    require_forms(forms)
    items = job.items()
    reference, tokenizer = load(REFERENCE)
    prompts, too_long = session.encoded(items, reference, tokenizer)
    settings = {**session.settings(job, reference, [PLAIN]), "quality": True}
    dtypes = list(dict.fromkeys((REFERENCE, *job.dtypes, *forms)))
    before = Quality.read(read_records(output) if output.exists() else [], where=str(output))
    done = {(line.configuration, line.dtype, 1, line.suite, line.id) for line in before}
    cuts = [Cut(dtype, (1,), 1) for dtype in dtypes]
    outlook = session.outlook(prompts, cuts, digest(settings), done, laps=lambda _: 1, too_long=too_long)
    on_start(outlook)
    if not outlook.heats:
        return digest(settings)
    labels = session.write_head(output, settings, dtypes=dtypes, device=reference.device)
    plain = Writer(reference, tokenizer, job.max_new_tokens)
    answers: dict[str, list[int]] = {}
    for dtype, heats in metrics.split(outlook.heats, lambda heat: heat.cut.dtype).items():
        model, writer = reference, plain  # lets go of the precision before
        model = reference if dtype == REFERENCE else load(REFERENCE if dtype in forms else dtype)[0]
        if dtype in forms:
            round_as(dtype, model)
        writer = plain if dtype == REFERENCE else Writer(model, tokenizer, job.max_new_tokens)
        for prompt in (prompt for heat in heats for prompt in heat.prompts):
            key = f"{prompt.item.suite} {prompt.item.id}"
            if key not in answers:
                answers[key] = plain.greedy(prompt.token_ids)
            answer = own = answers[key]
            if writer is not plain:  # whose own answers are written only where they can be judged
                own = writer.greedy(prompt.token_ids) if prompt.item.judged else []
            loss, divergence, agreed = compared(reference, model, prompt.token_ids, answer)
            line = Quality(
                **labels,
                **prompt.names,
                dtype=dtype,
                tokens=len(answer),
                loss=loss,
                divergence=divergence,
                agreed=agreed,
                right=judge(prompt.item, tokenizer.decode(own, skip_special_tokens=True)),
            )
            append(output, [line.to_record()])
            on_lap()
    return digest(settings)


@torch.inference_mode()
def compared(
    reference: PreTrainedModel, model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]
) -> tuple[float, float, int]:
    """Return a model's loss on an answer, its divergence from the reference (both per token), and tokens agreed on."""
    target_T = torch.tensor(answer, device=model.device)
    logits_TV = answer_logits(model, prompt, answer)
    ours_TV = logits_TV.log_softmax(-1)
    theirs_TV = ours_TV if model is reference else answer_logits(reference, prompt, answer).log_softmax(-1)
    divergence = (theirs_TV.exp() * (theirs_TV - ours_TV)).sum(-1).mean()
    return cross_entropy(logits_TV, target_T).item(), divergence.item(), int((logits_TV.argmax(-1) == target_T).sum())
