"""What single passes cost: a plain step, drafts, verifications and both fused, by width, context and batch.

Tokens and keys are drawn from a seed: what a pass costs does not depend on them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from random import Random
from statistics import median
from time import perf_counter
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedModel

from orthrus.bench.peers import hf
from orthrus.bench.race import Clock
from orthrus.decode import prompts
from orthrus.decode.frames import Reading
from orthrus.decode.passes import Passes
from orthrus.errors import ConfigError
from orthrus.kernels.rounded import RoundedLinear
from orthrus.model.attach import duals
from orthrus.model.cache import ScratchCache
from orthrus.model.graphs import replayed

WIDTHS: Final = (1, 2, 4, 8, 16, 32, 64)

ALL: Final = 1 << 30
"""As a number of stop points: all there are."""

COPIED: Final = {"cpu": 1 << 28, "cuda": 1 << 31}
"""Bytes that the kind "copy" reads, and writes elsewhere: so many that calling it takes no time beside."""


@dataclass(frozen=True, slots=True)
class Pass:
    """A kind of pass and the positions it reads per prompt, anchor included.

    Attributes:
        kind: "ar", "draft", "verify", or "fused" for a verification that drafts as long a block for each stop point;
            "matmul" for a pass's matrix products alone, those of attention included; "read" for reading all cached
            keys and values once, which is of no width; "copy" for copying `COPIED` bytes, by which a device's
            bandwidth is known; "prompt" for reading a prompt of `context` tokens and verifying the first block, or
            plainly writing the first token (width 1), or that by transformers' own model without a view (width 0).
        width: positions; of a fused pass those verified.
        stops: stop points that a fused pass drafts for.
    """

    kind: str
    width: int
    stops: int = 0

    @property
    def rows(self) -> int:
        """Positions per prompt in all, draft blocks included."""
        return self.width * (1 + self.stops)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Seconds that one pass took, in each repeat, over `batch` rows that hold `context` tokens each."""

    what: Pass
    batch: int
    context: int
    repeats_seconds: list[float]
    bytes: int | None = None
    """Weights, keys and values that it cannot do without reading; of a copy what is read and written."""

    @property
    def seconds(self) -> float:
        return median(self.repeats_seconds)

    def to_dict(self) -> dict[str, Any]:
        figures = asdict(self)
        what = figures.pop("what")
        return {"pass": what.pop("kind"), **what, "seconds": self.seconds, **figures}


def costs(
    model: PreTrainedModel,
    *,
    widths: Sequence[int] = WIDTHS,
    stops: Sequence[int] = (),
    contexts: Sequence[int] = (256,),
    batches: Sequence[int] = (1,),
    repeats: int = 20,
    floor: bool = False,
    prompt: bool = False,
    clock: Clock = perf_counter,
    on_pass: Callable[[], None] = lambda: None,
) -> Iterator[Cost]:
    """Time every pass at every context and batch; those of one context and batch take turns.

    Args:
        widths: positions per prompt; a plain step is a verification of width 1, and drafts need 2.
        stops: numbers of stop points of fused passes; `ALL` for one per position verified.
        contexts: tokens in the cache before the pass.
        repeats: how often each pass is timed, after one that is not.
        floor: whether to time what a pass cannot do without, too ("matmul", "read", "copy").
        prompt: whether to time reading prompts up to the first token, too, of as many tokens as `contexts` says.

    Raises ConfigError: a number below 1, or positions beyond the model's context.
    """
    limit: int = model.config.get_text_config().max_position_embeddings
    for name, values in (
        ("widths", widths),
        ("contexts", contexts),
        ("batches", batches),
        ("repeats", [repeats]),
        ("stops", stops or [ALL]),
    ):
        if not values or min(values) < 1:
            raise ConfigError(f"{name} must be at least 1, found {list(values)}")
    if max(contexts) + max(widths) > limit:
        raise ConfigError(
            f"contexts and widths must fit the model's {limit} positions, found {max(contexts)} and {max(widths)}"
        )
    for batch in batches:
        for context in contexts:
            what = kinds(widths, stops, floor=floor, prompt=prompt)
            yield from _costs_at(model, what, batch, context, repeats, clock, on_pass)


def kinds(widths: Sequence[int], stops: Sequence[int] = (), *, floor: bool = False, prompt: bool = False) -> list[Pass]:
    """Return the passes of these widths: the plain step, drafts and verifications, fused passes, then the others."""
    wider = sorted(width for width in set(widths) if width > 1)
    passes = [Pass("ar", 1)] + [Pass(kind, width) for width in wider for kind in ("draft", "verify")]
    passes += [Pass("fused", width, count) for width in wider for count in sorted({min(m, width) for m in stops})]
    if floor:
        passes += [Pass("matmul", width) for width in (1, *wider)] + [Pass("read", 1), Pass("copy", 1)]
    return passes + ([Pass("prompt", width) for width in (0, 1, *wider[-1:])] if prompt else [])


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
    widest = max(one.rows for one in what) + 2  # a draft pass has an anchor of its own, and one mask at least
    cache = ScratchCache(rows=batch, capacity=context + widest, device=model.device)
    passes, rows = Passes(model, cache), slice(0, batch)
    random = torch.Generator().manual_seed(0)
    drawn = torch.randint(model.get_input_embeddings().weight.shape[0], (batch, widest), generator=random)
    token_BQ = drawn.to(model.device)
    passes.verify(rows, token_BQ[:, :1])
    backbone = hf.plain(model) if any(one.kind == "prompt" for one in what) else model
    for buffer in (*cache.keys, *cache.values):
        buffer.normal_()
    cache.pretend(rows, [context] * batch)
    size = COPIED.get(model.device.type, COPIED["cpu"]) if Pass("copy", 1) in what else 0
    both = torch.zeros(2, size, dtype=torch.uint8, device=model.device)
    seconds: dict[Pass, list[float]] = {one: [] for one in what}
    for one in what:
        # Until a pass takes as long as it will in a text of some length.
        for _ in range(passes.runner.uses if one.kind in ("ar", "draft", "verify", "fused") else 0):
            _run(passes, rows, token_BQ, one)
    for repeat in range(repeats + 1):
        # In an order of chance: what a pass finds in the caches is what the one before has left there.
        for one in Random(repeat).sample(what, len(what)):
            start = clock()
            if one.kind == "prompt":
                _read(passes, rows, context, one.width, backbone)
            elif one.kind == "copy":
                both[1].copy_(both[0])[:1].tolist()
            else:
                _run(passes, rows, token_BQ, one)
            taken = clock() - start
            if repeat:  # the first time round is the warm-up
                seconds[one].append(taken)
                on_pass()
    moved = {one: 2 * size if one.kind == "copy" else _bytes(passes, rows, one) for one in what}
    return [
        Cost(what=one, batch=batch, context=context, repeats_seconds=seconds[one], bytes=moved[one]) for one in what
    ]


def _run(passes: Passes, rows: slice, token_BQ: torch.Tensor, what: Pass) -> None:
    """Run one pass and wait for its tokens, as a cycle does."""
    if what.kind == "matmul" and passes.runner.captured:
        key = (what, rows.start, rows.stop, passes.cache.lengths[rows.start])
        replayed(passes.cache, key, [], lambda _: [_multiply(passes, rows, what.width)])[0].tolist()
    elif what.kind == "matmul":
        _multiply(passes, rows, what.width).tolist()
    elif what.kind == "read":
        live = slice(0, passes.cache.lengths[0])
        torch.stack([buffer[rows, live].sum() for buffer in (*passes.cache.keys, *passes.cache.values)]).tolist()
    elif what.kind == "fused":
        stop_BS = torch.arange(what.stops, device=token_BQ.device).expand(len(token_BQ), -1)
        reading = Reading(token_BQ=token_BQ[:, : what.width], stop_BS=stop_BS, drafts=what.width - 1)
        passes.run(rows, reading).ar_BQV.argmax(-1).tolist()
    elif what.kind == "draft":
        passes.draft(rows, token_BQ[:, 0], max(1, what.width - 2)).logits_BMV.argmax(-1).tolist()
    else:
        passes.verify(rows, token_BQ[:, : what.width]).argmax(-1).tolist()


def _read(passes: Passes, rows: slice, context: int, width: int, backbone: PreTrainedModel) -> None:
    """Read a prompt from its start and wait for the first token after it, or for the first block's verdict."""
    batch, device = rows.stop - rows.start, passes.cache.device
    if width == 0:
        token_BT = torch.ones(batch, context, dtype=torch.long, device=device)
        backbone(input_ids=token_BT, logits_to_keep=1).logits.argmax(-1).tolist()
        return
    passes.cache.set_lengths_of(rows, [0] * batch)
    pending = [[1] * (context - 1)] * batch
    drafts = 0 if passes.runner.compiled else max(width - 2, 0)
    made = passes.prefill(rows, pending, chunk=prompts.CHUNK, anchors=[1] * batch, drafts=drafts)
    assert made is not None
    assert made.first_B1V is not None
    made.first_B1V.argmax(-1).tolist()
    passes.cache.commit(rows, [1] * batch)
    if width <= 2:
        return
    if not drafts:
        made = passes.draft(rows, made.first_B1V[:, 0].argmax(-1), width - 2)
        passes.cache.commit(rows, [1] * batch)
    assert made.first_B1V is not None
    token_BM = torch.cat([made.first_B1V, made.logits_BMV], dim=1).argmax(-1)
    passes.verify(rows, token_BM).argmax(-1).tolist()
    passes.cache.pretend(rows, [context] * batch)


def _bytes(passes: Passes, rows: slice, what: Pass) -> int | None:
    """Return how many bytes a pass must read at least; None for kinds of which that tells nothing."""
    cached: int = sum(buffer[rows, : passes.cache.lengths[rows.start]].nbytes for buffer in passes.cache.keys)
    cached += sum(buffer[rows, : passes.cache.lengths[rows.start]].nbytes for buffer in passes.cache.values)
    if what.kind == "read":
        return cached
    if what.kind not in ("ar", "draft", "verify", "fused"):
        return None
    model = passes.model
    twins = [dual.diffusion for dual in duals(model) if dual.diffusion and what.kind not in ("draft", "fused")]
    unread = {id(p) for twin in twins for p in twin.parameters()}  # the half that the pass leaves alone
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not table.weight:
        unread |= {id(p) for p in table.parameters()}  # of which a pass reads a row per token
    weights: int = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in unread)
    return cached + weights


def _multiply(passes: Passes, rows: slice, width: int) -> torch.Tensor:
    """Multiply by every matrix that a verify pass does, and by the keys and values in reach; nothing in between."""
    skipped = {id(linear) for dual in duals(passes.model) if dual.diffusion for linear in dual.diffusion.modules()}
    linears = [m for m in passes.model.modules() if isinstance(m, nn.Linear | RoundedLinear) and id(m) not in skipped]
    batch, device, dtype = rows.stop - rows.start, passes.cache.device, passes.model.dtype
    inputs = {n: torch.ones(batch, width, n, device=device, dtype=dtype) for n in {m.in_features for m in linears}}
    total = torch.zeros(())
    for linear in linears:
        total = linear(inputs[linear.in_features])
    config = passes.model.config.get_text_config()
    end = passes.cache.lengths[rows.start] + width
    for keys, values in zip(passes.cache.keys, passes.cache.values, strict=True):
        reach = slice(0, end)
        heads, size = keys.shape[2:]
        grouped = width * config.num_attention_heads // heads
        query = torch.ones(batch, heads, grouped, size, device=device, dtype=keys.dtype)
        weights = query @ keys[rows, reach].permute(0, 2, 3, 1)
        total = weights @ values[rows, reach].transpose(1, 2)
    return total.flatten()[:1]
