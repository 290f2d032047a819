"""Passes of different shapes over the same random texts, compared bit for bit: what the probe of `exact` is made of.

Shapes: B rows, Q query rows, V vocabulary.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Final, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from orthrus.decode.frames import Reading
from orthrus.decode.geometry import Geometry
from orthrus.decode.passes import Passes
from orthrus.kernels import attention
from orthrus.kernels.masks import additive
from orthrus.model.cache import ScratchCache

SPAN: Final = attention.BLOCK
"""Keys that attention takes at a time."""
LONGER: Final = 3 * SPAN
"""Cache slots in reach of the trials with more masked slots."""
_PREFIX = SPAN - 7
_READ = 249
_DRAWN = 32
_TEXTS = 2
_FEWEST_TOKENS = 8


class Trials:
    """Texts in the middle of a full cache, and whether their logits are the same under different passes."""

    def __init__(self, model: PreTrainedModel, width: int, groups: Sequence[int], *, scratch: int = 0) -> None:
        self.model = model
        self.groups = tuple(groups)
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        shape = (max(self.groups[-1], _TEXTS), _PREFIX + 2 * width)
        self.tokens = torch.randint(vocabulary, shape, generator=generator).to(model.device)
        self._random: dict[str, Tensor] = {}
        self.fixed = Geometry(widths=(width,), chunks=(width,), span=SPAN, tails=(SPAN,), chunk_tails=(SPAN,), group=1)
        capacity = max(LONGER, self.fixed.capacity(_PREFIX + 3 * width + scratch))
        self.cache = ScratchCache(rows=shape[0] + 1, capacity=capacity, device=model.device)
        Passes(model, self.cache).prefill(slice(0, _TEXTS), self.tokens[:_TEXTS, :_PREFIX].tolist(), chunk=_PREFIX)
        for row in range(_TEXTS, shape[0]):  # neighbours begin otherwise and go on otherwise, each with its own keys
            self.cache.copy_start(row % _TEXTS, row, _PREFIX)
            self.cache.set_length(row, _PREFIX)
        self._rewind = self.cache.mark()
        alone = [self._logits(slice(i, i + 1), width, 2 * width) for i in range(shape[0])]
        self.alone = torch.cat(alone)

    def agrees(self, width: int, *, group: int = 1, tokens: int | None = None, **shape: int) -> bool:
        """Tell whether passes of another shape give the logits of the texts read alone, and so write the same keys.

        `group` is the number of texts in a pass; what else says its shape, `_logits` takes.
        """
        tokens = tokens or width
        everywhere = tokens < width and "drafts" not in shape  # at each place of a pass, the first of another
        length = self.fixed.widths[0] if everywhere else max(2 * tokens, _FEWEST_TOKENS)
        length = min(length, self.alone.shape[1])
        groups = [slice(i, i + 1) for i in range(_TEXTS)] if group == 1 else [slice(0, group)]
        return all(
            torch.equal(self.alone[rows, :length], self._logits(rows, width, length, tokens, **shape))
            for rows in groups
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
        self._rewind()
        return torch.cat(logits, dim=1)

    def keys(self, chunk: int) -> Tensor:
        """Return the last layer's keys and values of a text, and states, when it is read `chunk` tokens at a time."""
        row = self.cache.rows - 1  # whose keys no other trial looks at
        passes = Passes(self.model, self.cache, dataclasses.replace(self.fixed, chunks=(chunk,)))
        passes.prefill(slice(row, row + 1), self.tokens[:1, :_READ].tolist(), chunk=chunk)
        written = [buffers[-1][row, :_READ] for buffers in (self.cache.keys, self.cache.values)]
        read = torch.cat([part.flatten().float() for part in (*written, *self.cache.states.of(row))])
        self._rewind()
        return read

    @property
    def attends(self) -> tuple[int, *tuple[tuple[int, int, int], ...]]:
        """Query heads, then the shapes of layers: key heads, numbers of a key, numbers of a value."""
        layers = zip(self.cache.keys, self.cache.values, strict=True)
        shapes = {(keys.shape[2], keys.shape[3], values.shape[3]) for keys, values in layers}
        return (self.model.config.get_text_config().num_attention_heads, *sorted(shapes))

    def attends_alike(self, tail: int, widths: Sequence[int], numbers: int) -> bool:
        """Tell whether attention over so many slots gives tokens at their end the bits that it does over a whole span.

        Alone and after a whole span before them. Of each layer's shapes, with random queries and keys. So many
        results each, since bfloat16 rounds nearly all differences between sums associated otherwise away; wide passes,
        whose queries are taken in blocks of the same sizes, make up for fewer by their number.
        """
        heads, *shapes = self.attends
        like = self.cache.keys[0]
        for (key_heads, size, out), width, before in itertools.product(shapes, widths, (0, SPAN)):
            if width > before + tail:
                continue  # no pass looks at fewer slots than it has tokens
            texts = min(-(-numbers // (heads * width * out)), _DRAWN)
            keys = self._drawn("keys", texts, before + SPAN, key_heads, size)
            values = self._drawn("values", texts, before + SPAN, key_heads, out)
            limit_Q = torch.arange(before + tail - width, before + tail)
            mask = additive(torch.arange(before + SPAN) <= limit_Q[:, None], like.dtype).to(like.device)[None, None]
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
        drawn, count = self._random.get(what), math.prod(shape)
        if drawn is None or len(drawn) < count:
            generator = torch.Generator().manual_seed(("keys", "values", "queries").index(what))
            drawn = self._random[what] = torch.randn(count, generator=generator).to(self.cache.keys[0])
        return drawn[:count].view(shape)
