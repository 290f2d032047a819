"""What single passes cost: an AR step, drafts and verifications, by width, context and batch.

Knows how to bring a cache to a length and how to time one pass; plans and reports take it from here. Tokens
are drawn from a seed: what a pass costs does not depend on them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any, Final

import torch
from transformers import PreTrainedModel

from orthrus.bench.race import Clock
from orthrus.decode.passes import Passes
from orthrus.errors import ConfigError
from orthrus.model.cache import ScratchCache

WIDTHS: Final = (1, 2, 4, 8, 16, 32, 64)
_PREFILL_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Pass:
    """A kind of pass ("ar", "draft", "verify") and the positions it reads per prompt, anchor included."""

    kind: str
    width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Seconds that one pass took, in each repeat, over `batch` rows that hold `context` tokens each."""

    what: Pass
    batch: int
    context: int
    repeats_seconds: list[float]

    @property
    def seconds(self) -> float:
        """The median of all repeats."""
        return median(self.repeats_seconds)

    def to_dict(self) -> dict[str, Any]:
        """Return the cost as plain JSON values."""
        return {
            "pass": self.what.kind,
            "width": self.what.width,
            "batch": self.batch,
            "context": self.context,
            "seconds": self.seconds,
            "repeats_seconds": self.repeats_seconds,
        }


def costs(
    model: PreTrainedModel,
    *,
    widths: Sequence[int] = WIDTHS,
    contexts: Sequence[int] = (256,),
    batches: Sequence[int] = (1,),
    repeats: int = 20,
    clock: Clock = perf_counter,
    on_pass: Callable[[], None] = lambda: None,
) -> Iterator[Cost]:
    """Time every pass at every context and batch; those of one context and batch take turns.

    Args:
        model: a dual-view model.
        widths: positions per prompt; a plain step is a verification of width 1, and drafts need 2.
        contexts: tokens in the cache before the pass.
        batches: prompts per pass.
        repeats: how often each pass is timed, after one that is not.
        clock: seconds, from any moment on.
        on_pass: called after every timed pass.

    Raises:
        ConfigError: a number below 1, or positions beyond the model's context.
    """
    limit: int = model.config.get_text_config().max_position_embeddings
    for name, values in (
        ("widths", widths),
        ("contexts", contexts),
        ("batches", batches),
        ("repeats", [repeats]),
    ):
        if not values or min(values) < 1:
            raise ConfigError(f"{name} must be at least 1, found {list(values)}")
    if max(contexts) + max(widths) > limit:
        raise ConfigError(
            f"contexts and widths must fit the model's {limit} positions, found {max(contexts)} and {max(widths)}"
        )
    for batch in batches:
        for context in contexts:
            yield from _costs_at(model, kinds(widths), batch, context, repeats, clock, on_pass)


def kinds(widths: Sequence[int]) -> list[Pass]:
    """Return the passes of these widths: the plain step first, then drafts and verifications."""
    wider = sorted(width for width in set(widths) if width > 1)
    return [Pass("ar", 1)] + [Pass(kind, width) for width in wider for kind in ("draft", "verify")]


@torch.inference_mode()
def _costs_at(
    model: PreTrainedModel,
    what: Sequence[Pass],
    batch: int,
    context: int,
    repeats: int,
    clock: Clock,
    on_pass: Callable[[], None],
) -> list[Cost]:
    """Time the passes over one filled cache; none of them moves its length."""
    widest = max(one.width for one in what)
    cache = ScratchCache(rows=batch, capacity=context + widest, device=model.device)
    passes, rows = Passes(model, cache), slice(0, batch)
    random = torch.Generator().manual_seed(0)
    drawn = torch.randint(model.get_input_embeddings().weight.shape[0], (batch, context + widest), generator=random)
    passes.prefill(rows, drawn[:, :context].tolist(), chunk=_PREFILL_CHUNK)
    token_BQ = drawn[:, context:].to(model.device)
    seconds: dict[Pass, list[float]] = {one: [] for one in what}
    for repeat in range(repeats + 1):
        first = repeat % len(what)
        for one in [*what[first:], *what[:first]]:
            start = clock()
            _run(passes, rows, token_BQ, one)
            taken = clock() - start
            if repeat:  # the first time round is the warm-up
                seconds[one].append(taken)
                on_pass()
    return [Cost(what=one, batch=batch, context=context, repeats_seconds=seconds[one]) for one in what]


def _run(passes: Passes, rows: slice, token_BQ: torch.Tensor, what: Pass) -> None:
    """Run one pass and wait for its tokens, as a cycle does."""
    if what.kind == "draft":
        logits = passes.draft(rows, token_BQ[:, 0], what.width - 1)
    else:
        logits = passes.verify(rows, token_BQ[:, : what.width])
    logits.argmax(-1).tolist()
