"""Exactness at any precision: passes of one fixed shape, and the probe that shows when shapes stop mattering.

In bfloat16 a pass over many rows and a pass over one take different kernels, near-ties flip, and texts part. With
`exact="token"` every AR pass, plain steps included, has the same geometry: `width` tokens per row, at most `group`
rows, keys in reach rounded up to a multiple of `span`. A token's logits then depend on its own text alone as long as
the kernels treat rows independently, which `probe` checks on the device at hand and never takes for granted.
Knows passes and tensors; knows neither options nor acceptance.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from orthrus.decode.passes import Geometry, Passes
from orthrus.model import attention
from orthrus.model.cache import ScratchCache
from orthrus.model.compiled import is_compiled
from orthrus.model.packed import is_packed

Exact = Literal["distribution", "token"]
EXACT: tuple[Exact, ...] = ("distribution", "token")

SPAN = 64
_CHUNKS = (256, 128, 64, 32)
_GROUPS = (2, 4, 8, 16)
_PREFIX = 2 * SPAN - 7
_LONGER = 8 * SPAN


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What the probe saw on this device, at this dtype, with this attention function.

    Attributes:
        geometry: the shapes under which a token's logits depend on its own text alone.
        holds: False when not even single rows at fixed width are independent of their place in the block; drafts
            then cannot be verified exactly, and plain steps are the fallback: rows alone, texts read from their start.
        broken: the kernels' dependencies that were seen, in words; empty where rows are independent.
    """

    geometry: Geometry
    holds: bool
    broken: tuple[str, ...]


def probe(model: PreTrainedModel, *, width: int) -> Finding:
    """Find the fastest geometry of `width` tokens that keeps rows independent here, bit for bit.

    Compares passes over random tokens: one token and fillers against a whole block; the same row with more masked
    slots in reach; a row alone against the same row among others, in passes of 2, 4, 8 and 16 rows; keys written by
    wide prefill passes against keys written `width` at a time.
    """
    with torch.inference_mode():
        bench = _Bench(model, width)
        broken = []
        whole = bench.block(group=1, place=0)
        if not torch.equal(whole, bench.one_by_one()):
            broken.append("a token's logits depend on its place in the pass")
        # Functions that take no tiles agree up to some reach and then change their ways, which no probe can rule out.
        tiled = model.config._attn_implementation == attention.NAME
        if not tiled or not torch.equal(whole, bench.block(group=1, place=0, span=_LONGER)):
            broken.append("a token's logits depend on masked cache slots in reach")
        holds, group = not broken, 1
        for size in _GROUPS:
            if not all(torch.equal(whole, bench.block(group=size, place=p)) for p in (0, size // 2, size - 1)):
                broken.append(f"a token's logits depend on its neighbours in a pass of {size} rows")
                break
            group = size
        keys, wider = bench.keys(width), [c for c in _CHUNKS if c > width]
        chunk = next((c for c in wider if torch.equal(keys, bench.keys(c))), width)
        if chunk != max(wider, default=width):
            broken.append(f"a token's keys depend on the width of its prefill pass beyond {chunk} tokens")
    geometry = Geometry(width=width, chunk=chunk, span=SPAN, tile=SPAN, group=group)
    return Finding(geometry=geometry if holds else bench.fixed, holds=holds, broken=tuple(broken))


def finding_for(model: PreTrainedModel, *, width: int) -> Finding:
    """Return the probe's finding for a model as it stands (device, dtype, kernels, threads), probing once."""
    kernels = (model.config._attn_implementation, is_compiled(model), is_packed(model))
    state = (width, str(model.device), model.dtype, *kernels, torch.get_num_threads())
    known: dict[object, Finding] = model.__dict__.setdefault("_orthrus_findings", {})
    if state not in known:
        known[state] = probe(model, width=width)
    return known[state]


class _Bench:
    """One text in the middle of a full cache, and what its logits are under different passes."""

    def __init__(self, model: PreTrainedModel, width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        self.row = max(_GROUPS) - 1
        shape = (2 * max(_GROUPS) - 1, _PREFIX + width)
        self.tokens = torch.randint(vocabulary, shape, generator=generator).to(model.device)
        self.fixed = Geometry(width=width, chunk=width, span=SPAN, tile=SPAN, group=1)
        capacity = self.fixed.capacity(_PREFIX + max(_CHUNKS) + 2 * width) + 2 * SPAN
        self.cache = ScratchCache(rows=shape[0], capacity=capacity, device=model.device)
        self.model = model
        Passes(model, self.cache).prefill(slice(0, shape[0]), self.tokens[:, :_PREFIX].tolist(), chunk=_PREFIX)
        self._read(width)

    def block(self, *, group: int, place: int, span: int = SPAN) -> Tensor:
        """Return the logits of the text's block when it is row `place` of a pass over `group` rows."""
        first = self.row - place
        passes = Passes(self.model, self.cache, dataclasses.replace(self.fixed, span=span, group=group))
        return passes.verify(slice(first, first + group), self.tokens[first : first + group, _PREFIX:])[place]

    def one_by_one(self) -> Tensor:
        """Return the same logits from passes that each carry one token of the text and fillers."""
        own, logits = slice(self.row, self.row + 1), []
        passes = Passes(self.model, self.cache, self.fixed)
        for j in range(self.fixed.width):
            logits.append(passes.verify(own, self.tokens[own, _PREFIX + j : _PREFIX + j + 1])[0, 0])
            self.cache.commit(own, [1])
        self.cache.set_length(self.row, _PREFIX)
        return torch.stack(logits)

    def keys(self, chunk: int) -> Tensor:
        """Return the last layer's keys and values of the text when it is read `chunk` tokens at a time."""
        self._read(chunk)
        return torch.stack([b[-1][self.row, :_PREFIX].clone() for b in (self.cache.keys, self.cache.values)])

    def _read(self, chunk: int) -> None:
        own = slice(self.row, self.row + 1)
        self.cache.set_length(self.row, 0)
        passes = Passes(self.model, self.cache, dataclasses.replace(self.fixed, chunk=chunk))
        passes.prefill(own, self.tokens[own, :_PREFIX].tolist(), chunk=chunk)
