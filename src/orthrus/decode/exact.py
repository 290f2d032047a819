"""Exactness at any precision: passes of a few fixed shapes, and the probe that shows which shapes do not matter.

In bfloat16 a pass over many rows and a pass over one take different kernels, near-ties flip, and texts part. With
`exact="token"` every AR pass, plain steps included, has one of a few shapes: so many tokens per row, so many rows, keys
in reach rounded up to one of a few numbers. A token's logits then depend on its own text alone, as long as the kernels
treat rows independently in each of them. `probe` checks that on the device at hand.
Knows passes and tensors; knows neither options nor acceptance.
"""

import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedModel

from orthrus import __version__, memory
from orthrus.decode.geometry import Geometry
from orthrus.decode.trials import LONGER, SPAN, Trials
from orthrus.kernels import attention
from orthrus.model.attachment import attachment_of, config_of
from orthrus.model.fingerprint import key_of, state_of
from orthrus.provenance import digest_of

Exact = Literal["distribution", "token"]
KIND: Final = "exact"
"""Under which `orthrus.memory` keeps findings."""

EXACT: tuple[Exact, ...] = ("distribution", "token")

_WIDTHS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 24, 32, 48, 64)
_CHUNKS = (32, 48, 64, 80, 96, 128, 160, 192, 256)
_TAILS = (64, 128, 192, 256, 320, 384)
_GROUPS = (1, 2, 4, 8, 16)
_NUMBERS = 1 << 18


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What the probe saw on this device, at this dtype, with this attention function.

    Attributes:
        geometry: the shapes under which a token's logits depend on its own text alone.
        holds: False when not even single rows at fixed width are independent of their place in the block; drafts
            then cannot be verified exactly, and plain steps are the fallback: rows alone, texts read from their start.
        drafts_exact: whether an AR row in a draft pass has the bits of one in any other pass.
        broken: the kernels' dependencies that were seen, in words; empty where rows are independent.
    """

    geometry: Geometry
    holds: bool
    drafts_exact: bool
    broken: tuple[str, ...]


_FINDING: Final = TypeAdapter(Finding)


def probe(model: PreTrainedModel, *, width: int, rows: int = _GROUPS[-1]) -> Finding:
    """Find the fastest geometry that keeps rows independent here, bit for bit, for blocks of `width` tokens.

    Compares passes over random texts with passes over one text, `width` tokens at a time: one token and fillers in each
    of them, or half as many tokens, so that states take up several at once; more masked slots in reach; the text among
    2, 4, 8 and 16 rows, up to `rows`; narrower passes; keys written by wide prefill passes; draft passes; and, of
    attention alone, fewer masked slots in reach, for decoding passes and for prefill passes.
    """
    with torch.inference_mode():
        trials = Trials(model, width, _groups(rows))
        broken = []
        if not all(trials.agrees(width, tokens=tokens) for tokens in _kept(width)):
            broken.append("a token's logits depend on its place in the pass")
        # Functions that take no tiles agree up to some reach and then change their ways, which no probe can rule out.
        tiled = model.config._attn_implementation == attention.NAME
        if not tiled or not trials.agrees(width, span=LONGER):
            broken.append("a token's logits depend on masked cache slots in reach")
        holds, group = not broken, 1
        for size in trials.groups[1:]:
            if not trials.agrees(width, group=size):
                broken.append(f"a token's logits depend on its neighbours in a pass of {size} rows")
                break
            group = size
        groups = trials.groups[: trials.groups.index(group) + 1]
        narrower = [w for w in _WIDTHS if w < width]
        widths = [w for w in narrower if holds and all(trials.agrees(w, group=size) for size in groups)]
        if holds and widths != narrower:
            apart = ", ".join(str(w) for w in narrower if w not in widths)
            broken.append(f"a token's logits depend on the width of its pass: narrow ones ({apart}) are filled up")
        keys, wider = trials.keys(width), [c for c in _CHUNKS if c > width]
        chunks = [width, *(c for c in wider if torch.equal(keys, trials.keys(c)))]
        if len(chunks) <= len(wider):
            apart = ", ".join(str(c) for c in wider if c not in chunks)
            broken.append(f"a token's keys depend on the width of its prefill pass: not {apart} tokens at once")
        drafts = max(1, config_of(model).proposals - 1)
        narrowest = (*widths, width)[0]
        drafts_exact = holds and all(trials.agrees(narrowest, tokens=1, group=size, drafts=drafts) for size in groups)
        if holds and not drafts_exact:
            broken.append("a token's logits depend on the drafts beside it: its successor is verified like them")
        # Elsewhere tiles are filled up, and every number of slots is a shape of its own to compile.
        few = holds and model.device.type == "cpu"
        tails, chunk_tails = (
            (*(tail for tail in _TAILS if few and _alike(trials, tail, tokens, numbers)), SPAN)
            for tokens, numbers in (((*widths, width), _NUMBERS), (chunks, _NUMBERS // 4))
        )
    geometry = Geometry(
        widths=(*widths, width), chunks=tuple(chunks), span=SPAN, tails=tails, chunk_tails=chunk_tails, group=group
    )
    return Finding(
        geometry=geometry if holds else trials.fixed, holds=holds, drafts_exact=drafts_exact, broken=tuple(broken)
    )


def finding_for(model: PreTrainedModel, *, width: int, rows: int = _GROUPS[-1]) -> Finding:
    """Return the probe's finding for a model as it stands (device, dtype, kernels, threads, settings), probing once.

    Findings are kept for later processes (`orthrus.memory`), which check them in brief. They probe anew where that
    fails, or where processor, torch, weights or the code of passes have changed.
    """
    findings: dict[object, Finding] = attachment_of(model).memo("findings")
    state = (width, _groups(rows), *key_of(model))
    if state not in findings:
        about = {**state_of(model), "code": _code(), "width": width, "groups": list(_groups(rows))}
        finding = _recalled(about) if attachment_of(model).remembers else None
        if finding is None or not _confirmed(model, finding, width=width, rows=rows):
            finding = probe(model, width=width, rows=rows)
            if attachment_of(model).remembers:
                memory.keep(KIND, about, _FINDING.dump_python(finding, mode="json"))
        findings[state] = finding
    return findings[state]


def _confirmed(model: PreTrainedModel, finding: Finding, *, width: int, rows: int) -> bool:
    """Look once more, at the ends of each range only, at what an earlier process found."""
    if not finding.holds:
        return True  # plain decoding is right anywhere
    shape = finding.geometry
    with torch.inference_mode():
        trials = Trials(model, width, _groups(rows))
        alike = all(trials.agrees(width, tokens=tokens) for tokens in _kept(width))
        alike = alike and trials.agrees(width, span=LONGER)
        for size in {1, shape.group}:  # one row by itself may take an operator of its own
            if finding.drafts_exact:
                drafts = max(1, config_of(model).proposals - 1)
                alike = alike and trials.agrees(shape.widths[0], tokens=1, group=size, drafts=drafts)
            alike = alike and all(trials.agrees(w, group=size) for w in (shape.widths[0], width))
        return alike and torch.equal(trials.keys(width), trials.keys(shape.chunks[-1]))


def can_fuse(model: PreTrainedModel, finding: Finding, *, rows: int, drafts: int, stops: int) -> bool:
    """Tell whether fused passes of up to so many rows leave the AR view's logits and keys as they are, bit for bit.

    Found out at the first time a shape is asked for; rows are cut as the finding's geometry says. Behind a draft pass
    the fused one has a draft less.
    """
    if not finding.holds:
        return False
    fused: dict[object, bool] = attachment_of(model).memo("fused")
    geometry = finding.geometry
    trials: Trials | None = None
    sizes = _groups(min(rows, geometry.group))
    for size, tokens in itertools.product(sizes, (drafts, drafts + 1)):
        state = (size, tokens, drafts, stops, *key_of(model))
        if state not in fused:
            with torch.inference_mode():
                trials = trials or Trials(model, geometry.widths[-1], sizes, scratch=stops * (drafts + 1))
                shape = {"tokens": tokens, "group": size, "stops": min(stops, tokens), "drafts": drafts}
                fused[state] = trials.agrees(geometry.width(tokens), **shape)
        if not fused[state]:
            return False
    return True


def _alike(trials: Trials, tail: int, tokens: Sequence[int], numbers: int) -> bool:
    """Return what `attends_alike` finds, once a process: weights and numbers of rows do not change it."""
    state = (tail, *tokens, numbers, *trials.attends, attention.attention, *key_of(trials.model))
    if state not in _ALIKE:
        _ALIKE[state] = trials.attends_alike(tail, tokens, numbers)
    return _ALIKE[state]


_ALIKE: Final[dict[object, bool]] = {}
_ROOMS = ("decode", "kernels", "model")


@cache
def _code() -> str:
    """Digest the source of decoding and of models: another version may take other kernels."""
    files = (file for room in _ROOMS for file in sorted((Path(__file__).parents[1] / room).iterdir()))
    sources = (file.read_bytes() for file in files if file.suffix in (".py", ".cpp", ".h"))
    return digest_of(b"".join([__version__.encode(), *sources]))


def _recalled(about: Mapping[str, Any]) -> Finding | None:
    with suppress(ValidationError):  # also where nothing was kept
        return _FINDING.validate_python(memory.recall(KIND, about))
    return None


def _kept(width: int) -> tuple[int, ...]:
    """Return how many of a pass's tokens trials keep: one, as a plain step does, and several."""
    return tuple(sorted({1, max(1, width // 2)}))


def _groups(rows: int) -> tuple[int, ...]:
    """Return the sizes of the passes that so many rows can be cut into."""
    return tuple(size for size in _GROUPS if size <= rows)
