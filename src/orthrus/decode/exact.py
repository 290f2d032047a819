"""Exactness at any precision: passes of a few fixed shapes, and the probe that shows which shapes do not matter.

In bfloat16 a pass over many rows and a pass over one take different kernels, near-ties flip, and texts part. With
`exact="token"` every AR pass, plain steps included, has one of a few shapes: so many tokens per row, so many rows, keys
in reach rounded up to one of a few numbers. A token's logits then depend on its own text alone as long as the kernels
treat rows independently in each of them, which `probe` checks on the device at hand and never takes for granted.
Knows passes and tensors; knows neither options nor acceptance.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from orthrus import __version__, memory
from orthrus.decode.frames import Reading
from orthrus.decode.geometry import Geometry
from orthrus.decode.passes import Passes
from orthrus.kernels import attention
from orthrus.kernels.masks import additive
from orthrus.model.attachment import attachment_of, config_of
from orthrus.model.cache import ScratchCache
from orthrus.model.fingerprint import key_of, state_of
from orthrus.provenance import digest_of

Exact = Literal["distribution", "token"]
KIND: Final = "exact"
"""Under which `orthrus.memory` keeps findings."""

EXACT: tuple[Exact, ...] = ("distribution", "token")

SPAN = attention.BLOCK
_WIDTHS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 24, 32, 48, 64)
_CHUNKS = (32, 48, 64, 80, 96, 128, 160, 192, 256)
_TAILS = (64, 128, 192, 256, 320, 384)
_GROUPS = (1, 2, 4, 8, 16)
_PREFIX = SPAN - 7
_LONGER = 3 * SPAN
_READ = 249
_DRAWN = 32
_NUMBERS = 1 << 18
_TEXTS = 2
_FEWEST_TOKENS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What the probe saw on this device, at this dtype, with this attention function.

    Attributes:
        geometry: the shapes under which a token's logits depend on its own text alone.
        reads_ahead: whether the pass that reads the end of a prompt may draft as well.
        holds: False when not even single rows at fixed width are independent of their place in the block; drafts
            then cannot be verified exactly, and plain steps are the fallback: rows alone, texts read from their start.
        drafts_exact: whether an AR row in a draft pass has the bits of one in any other pass.
        broken: the kernels' dependencies that were seen, in words; empty where rows are independent.
    """

    geometry: Geometry
    reads_ahead: bool
    holds: bool
    drafts_exact: bool
    broken: tuple[str, ...]


_FINDING: Final = TypeAdapter(Finding)


def probe(model: PreTrainedModel, *, width: int, rows: int = _GROUPS[-1]) -> Finding:
    """Find the fastest geometry that keeps rows independent here, bit for bit, for blocks of `width` tokens.

    Compares passes over random texts with passes over one text, `width` tokens at a time: one token and fillers in each
    of them; more masked slots in reach; the text among 2, 4, 8 and 16 rows, up to `rows`; narrower passes; keys written
    by wide prefill passes, and by those that draft as well; draft passes; and, of attention alone, fewer masked slots
    in reach, for decoding passes and for prefill passes.
    """
    with torch.inference_mode():
        bench = _Bench(model, width, rows)
        broken = []
        if not bench.agrees(width, tokens=1):
            broken.append("a token's logits depend on its place in the pass")
        # Functions that take no tiles agree up to some reach and then change their ways, which no probe can rule out.
        tiled = model.config._attn_implementation == attention.NAME
        if not tiled or not bench.agrees(width, span=_LONGER):
            broken.append("a token's logits depend on masked cache slots in reach")
        holds, group = not broken, 1
        for size in bench.groups[1:]:
            if not bench.agrees(width, group=size):
                broken.append(f"a token's logits depend on its neighbours in a pass of {size} rows")
                break
            group = size
        groups = bench.groups[: bench.groups.index(group) + 1]
        narrower = [w for w in _WIDTHS if w < width]
        widths = [w for w in narrower if holds and all(bench.agrees(w, group=size) for size in groups)]
        if holds and widths != narrower:
            apart = ", ".join(str(w) for w in narrower if w not in widths)
            broken.append(f"a token's logits depend on the width of its pass: narrow ones ({apart}) are filled up")
        keys, wider = bench.keys(width), [c for c in _CHUNKS if c > width]
        chunks = [width, *(c for c in wider if torch.equal(keys, bench.keys(c)))]
        if len(chunks) <= len(wider):
            apart = ", ".join(str(c) for c in wider if c not in chunks)
            broken.append(f"a token's keys depend on the width of its prefill pass: not {apart} tokens at once")
        drafts = max(1, config_of(model).proposals - 1)
        narrowest = (*widths, width)[0]
        drafts_exact = holds and all(bench.agrees(narrowest, tokens=1, group=size, drafts=drafts) for size in groups)
        if holds and not drafts_exact:
            broken.append("a token's logits depend on the drafts beside it: its successor is verified like them")
        reads_ahead = holds and all(torch.equal(keys, bench.keys(c, drafts=drafts)) for c in chunks)
        # Elsewhere tiles are filled up, and every number of slots is a shape of its own to compile.
        few = holds and model.device.type == "cpu"
        tails, chunk_tails = (
            (*(tail for tail in _TAILS if few and _alike(bench, tail, tokens, numbers)), SPAN)
            for tokens, numbers in (((*widths, width), _NUMBERS), (chunks, _NUMBERS // 4))
        )
    found = Geometry(
        widths=(*widths, width),
        chunks=tuple(chunks),
        span=SPAN,
        tails=tails,
        chunk_tails=chunk_tails,
        group=group,
    )
    return Finding(
        geometry=found if holds else bench.fixed,
        reads_ahead=reads_ahead,
        holds=holds,
        drafts_exact=drafts_exact,
        broken=tuple(broken),
    )


def finding_for(model: PreTrainedModel, *, width: int, rows: int = _GROUPS[-1]) -> Finding:
    """Return the probe's finding for a model as it stands (device, dtype, kernels, threads, settings), probing once.

    What was found is kept for processes to come (`orthrus.memory`), which look at it in brief and probe anew where it
    fails, or where anything that it depends on has changed: processor, torch, weights, the code of passes.
    """
    known: dict[object, Finding] = attachment_of(model).memo("findings")
    state = (width, _groups(rows), *key_of(model))
    if state not in known:
        about = {**state_of(model), "code": _code(), "width": width, "groups": list(_groups(rows))}
        found = _recalled(about) if attachment_of(model).remembers else None
        if found is None or not _confirmed(model, found, width=width, rows=rows):
            found = probe(model, width=width, rows=rows)
            if attachment_of(model).remembers:
                memory.keep(KIND, about, _FINDING.dump_python(found, mode="json"))
        known[state] = found
    return known[state]


def _confirmed(model: PreTrainedModel, finding: Finding, *, width: int, rows: int) -> bool:
    """Look once more, at the ends of each range only, at what an earlier process found."""
    if not finding.holds:
        return True  # plain decoding is right anywhere
    shape = finding.geometry
    with torch.inference_mode():
        bench = _Bench(model, width, rows)
        alike = bench.agrees(width, tokens=1) and bench.agrees(width, span=_LONGER)
        if finding.drafts_exact:
            drafts = max(1, config_of(model).proposals - 1)
            alike = alike and bench.agrees(shape.widths[0], tokens=1, group=shape.group, drafts=drafts)
        alike = alike and all(bench.agrees(w, group=shape.group) for w in (shape.widths[0], width))
        return alike and torch.equal(bench.keys(width), bench.keys(shape.chunks[-1]))


def can_fuse(model: PreTrainedModel, finding: Finding, *, rows: int, drafts: int, stops: int) -> bool:
    """Tell whether a fused pass of this shape leaves the AR view's logits and keys as they are, bit for bit.

    Found out at the first time a shape is asked for; rows are cut as the finding's geometry says. Behind a draft pass
    the fused one has a draft less.
    """
    if not finding.holds:
        return False
    known: dict[object, bool] = attachment_of(model).memo("fused")
    geometry = finding.geometry
    sizes = {part.stop - part.start for part in geometry.parts(slice(0, rows))}
    for size, tokens in itertools.product(sizes, (drafts, drafts + 1)):
        state = (size, tokens, drafts, stops, *key_of(model))
        if state not in known:
            with torch.inference_mode():
                bench = _Bench(model, geometry.widths[-1], size, scratch=stops * (drafts + 1))
                shape = {"tokens": tokens, "group": size, "stops": min(stops, tokens), "drafts": drafts}
                known[state] = bench.agrees(geometry.width(tokens), **shape)
        if not known[state]:
            return False
    return True


def _alike(bench: "_Bench", tail: int, tokens: Sequence[int], numbers: int) -> bool:
    """Return what `attends_alike` finds, found out once per state of a model: no number of rows changes it."""
    known: dict[object, bool] = attachment_of(bench.model).memo("alike")
    state = (tail, *tokens, numbers, *key_of(bench.model))
    if state not in known:
        known[state] = bench.attends_alike(tail, tokens, numbers)
    return known[state]


_ROOMS = ("decode", "kernels", "model")


@cache
def _code() -> str:
    """Digest the source of decoding and of models: another version may take other kernels."""
    files = (file for room in _ROOMS for file in sorted((Path(__file__).parents[1] / room).glob("*.py")))
    return digest_of(b"".join([__version__.encode(), *(file.read_bytes() for file in files)]))


def _recalled(about: Mapping[str, Any]) -> Finding | None:
    record = memory.recall(KIND, about)
    try:
        return None if record is None else _FINDING.validate_python(record)
    except ValidationError:
        return None


def _groups(rows: int) -> tuple[int, ...]:
    """Return the sizes of the passes that so many rows can be cut into."""
    return tuple(size for size in _GROUPS if size <= rows)


class _Bench:
    """Texts in the middle of a full cache, and whether their logits are the same under different passes."""

    def __init__(self, model: PreTrainedModel, width: int, rows: int, *, scratch: int = 0) -> None:
        self.model = model
        self.groups = _groups(rows)
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        shape = (max(self.groups[-1], _TEXTS), _PREFIX + 2 * width)
        self.tokens = torch.randint(vocabulary, shape, generator=generator).to(model.device)
        self._random: dict[str, Tensor] = {}
        self.fixed = Geometry(widths=(width,), chunks=(width,), span=SPAN, tails=(SPAN,), chunk_tails=(SPAN,), group=1)
        capacity = max(_LONGER, self.fixed.capacity(_PREFIX + 3 * width + scratch))
        self.cache = ScratchCache(rows=shape[0], capacity=capacity, device=model.device)
        Passes(model, self.cache).prefill(slice(0, shape[0]), self.tokens[:, :_PREFIX].tolist(), chunk=_PREFIX)
        alone = [self._logits(slice(i, i + 1), width, 2 * width) for i in range(shape[0])]
        self.alone = torch.cat(alone)

    def agrees(self, width: int, *, group: int = 1, tokens: int | None = None, **shape: int) -> bool:
        """Tell whether passes of another shape give the logits of the texts read alone, and so write the same keys.

        Args:
            width: tokens per pass and row, fillers included.
            group: texts per pass.
            tokens: tokens per pass and row without fillers; all by default.
            shape: what `_logits` takes.
        """
        tokens = tokens or width
        length = self.fixed.widths[0] if tokens < width else max(2 * width, _FEWEST_TOKENS)
        length = min(length, self.alone.shape[1])
        own = [slice(i, i + 1) for i in range(_TEXTS)] if group == 1 else [slice(0, group)]
        return all(
            torch.equal(self.alone[rows, :length], self._logits(rows, width, length, tokens, **shape)) for rows in own
        )

    def _logits(
        self,
        rows: slice,
        width: int,
        length: int,
        tokens: int | None = None,
        *,
        span: int = SPAN,
        drafts: int = 0,
        stops: int = 0,
    ) -> Tensor:
        """Return logits of the first `length` tokens after the prefix, read so many at a time.

        Args:
            rows: the texts.
            width: tokens per pass and row, fillers included.
            length: tokens per row in all.
            tokens: tokens per pass and row without fillers; all by default.
            span: what reach is rounded up to.
            drafts: masks behind the tokens of each pass: in a draft pass' block or,
            stops: so many places for which each pass drafts ahead, in a block for each of them.
        """
        count, step = rows.stop - rows.start, tokens or width
        shape = dataclasses.replace(self.fixed, widths=(width,), span=span, tails=(span,), group=count)
        passes, logits = Passes(self.model, self.cache, shape), []
        for start in range(0, length, step):
            token_BQ = self.tokens[rows, _PREFIX + start : _PREFIX + min(start + step, length)]
            if stops and token_BQ.shape[1] == step:
                stop_BS = torch.arange(stops, device=token_BQ.device).expand(count, -1)
                reading = Reading(token_BQ=token_BQ, stop_BS=stop_BS, drafts=drafts)
                logits.append(passes.run(rows, reading).ar_BQV)
            elif drafts and step == 1:
                first_B1V = passes.draft(rows, token_BQ[:, 0], drafts).first_B1V
                assert first_B1V is not None
                logits.append(first_B1V)
            else:
                logits.append(passes.verify(rows, token_BQ))
            self.cache.commit(rows, [token_BQ.shape[1]] * count)
        self.cache.set_lengths_of(rows, [_PREFIX] * count)
        return torch.cat(logits, dim=1)

    def keys(self, chunk: int, *, drafts: int = 0) -> Tensor:
        """Return the last layer's keys and values of a text when it is read `chunk` tokens at a time.

        With `drafts` the last pass makes these too.
        """
        own, anchors = slice(0, 1), [int(self.tokens[0, _PREFIX])] if drafts else None
        self.cache.set_length(0, 0)
        passes = Passes(self.model, self.cache, dataclasses.replace(self.fixed, chunks=(chunk,)))
        passes.prefill(own, self.tokens[own, :_READ].tolist(), chunk=chunk, anchors=anchors, drafts=drafts)
        return torch.stack([b[-1][0, :_READ].clone() for b in (self.cache.keys, self.cache.values)])

    def attends_alike(self, tail: int, widths: Sequence[int], numbers: int) -> bool:
        """Tell whether attention over so many slots gives tokens at their end the bits that it does over a whole span.

        Alone and after a whole span before them. Of each layer's shapes, with random queries and keys. So many
        results each, since bfloat16 rounds nearly all differences between sums associated otherwise away; wide passes,
        whose queries are taken in blocks of the same sizes, make up for fewer by their number.
        """
        heads: int = self.model.config.get_text_config().num_attention_heads
        layers = zip(self.cache.keys, self.cache.values, strict=True)
        shapes = {(*keys.shape[2:], values.shape[3]) for keys, values in layers}
        like = self.cache.keys[0]
        for (own, size, out), width, before in itertools.product(sorted(shapes), widths, (0, SPAN)):
            if width > before + tail:
                continue  # no pass looks at fewer slots than it has tokens
            texts = min(-(-numbers // (heads * width * out)), _DRAWN)
            keys = self._drawn("keys", texts, before + SPAN, own, size)
            values = self._drawn("values", texts, before + SPAN, own, out)
            place_Q = torch.arange(before + tail - width, before + tail)
            mask = additive(torch.arange(before + SPAN) <= place_Q[:, None], like.dtype).to(like.device)[None, None]
            rounds = -(-numbers // (texts * heads * width * out))
            for query in self._drawn("queries", rounds, texts, heads, width, size):
                short, whole = (
                    attention.attention(
                        self.model,
                        query,
                        keys[:, :slots].transpose(1, 2),
                        values[:, :slots].transpose(1, 2),
                        mask[..., :slots],
                        tile=SPAN,
                    )[0]
                    for slots in (before + tail, before + SPAN)
                )
                if not torch.equal(short, whole):
                    return False
        return True

    def _drawn(self, what: Literal["keys", "values", "queries"], *shape: int) -> Tensor:
        """Return random numbers, the same ones whenever as many or fewer of a kind are asked for."""
        known, count = self._random.get(what), math.prod(shape)
        if known is None or len(known) < count:
            generator = torch.Generator().manual_seed(("keys", "values", "queries").index(what))
            known = self._random[what] = torch.randn(count, generator=generator).to(self.cache.keys[0])
        return known[:count].view(shape)
