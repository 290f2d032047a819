"""The passes of the backbone that decoding is made of: prefill, draft, verify.

Each one says which slots it writes, which view it takes and who sees whom, and calls the model once. Rows stay
where they are in the cache; nothing is copied. Knows tokens and shapes, but neither options nor acceptance.

Shapes: B rows, Q query rows, K block length, M drafts, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from orthrus.errors import ConfigError
from orthrus.model import masks
from orthrus.model.attach import config_of, windows_of
from orthrus.model.cache import ScratchCache
from orthrus.model.dual import View, ViewName

_DENSE_MASKS = ("orthrus", "sdpa", "eager")


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """Fix the shapes of AR passes, so that a token's logits do not depend on the pass it came in (`decode.exact`).

    Attributes:
        width: tokens per row of every decoding pass, fillers included.
        chunk: tokens per row of every prefill pass, fillers included.
        span: cache slots in reach are rounded up to a multiple of this.
        tile: attention takes keys so many at a time; divides `span`.
        group: rows per decoding pass at most, a power of two; other numbers of rows take several passes of smaller
            powers. Prefill passes carry one row.
    """

    width: int
    chunk: int
    span: int
    tile: int
    group: int

    def capacity(self, positions: int) -> int:
        """Return the cache positions a row of so many tokens needs, fillers and rounding included."""
        return -(-(positions + max(self.chunk, self.width)) // self.span) * self.span

    def parts(self, rows: slice) -> list[slice]:
        """Cut rows into passes of power-of-two sizes, the largest first."""
        parts, start, size = [], rows.start, self.group
        while start < rows.stop:
            while size > rows.stop - start:
                size //= 2
            parts.append(slice(start, start + size))
            start += size
        return parts


class Passes:
    """Run a dual-view model over the rows of one cache; with a `geometry`, AR passes take fixed shapes."""

    def __init__(self, model: PreTrainedModel, cache: ScratchCache, geometry: Geometry | None = None) -> None:
        self.model = model
        self.cache = cache
        self.geometry = geometry
        self.config = config_of(model)
        self.windows = windows_of(model)
        self.dtype = model.dtype
        if model.config._attn_implementation not in _DENSE_MASKS:
            raise ConfigError(
                f"decoding needs an attention function that takes dense masks ({', '.join(_DENSE_MASKS)}), found "
                f"{model.config._attn_implementation!r}: orthrus.model.use_attention(model, 'orthrus')"
            )

    def prefill(self, rows: slice, pending: Sequence[Sequence[int]], *, chunk: int) -> None:
        """Write the keys of each row's pending tokens, `chunk` positions at a time, and commit them; no logits.

        Rows may differ in length, before and after: a shorter row writes filler into its own scratch.
        """
        fixed = self.geometry
        parts = [rows] if fixed is None else [slice(i, i + 1) for i in range(rows.start, rows.stop)]
        chunk = chunk if fixed is None else fixed.chunk
        for part in parts:
            tokens = [pending[i - rows.start] for i in range(part.start, part.stop)]
            for start in range(0, max(map(len, tokens)), chunk):
                piece = [list(t[start : start + chunk]) for t in tokens]
                width = max(map(len, piece)) if fixed is None else chunk
                token_BQ = torch.tensor([p + [0] * (width - len(p)) for p in piece], device=self.cache.device)
                slot_BQ = self._slots(part, width)
                self._forward(part, token_BQ, slot_BQ, limit_BQ=slot_BQ, view="ar", logits=None)
                self.cache.commit(part, [len(p) for p in piece])

    def verify(self, rows: slice, token_BQ: Tensor) -> Tensor:
        """Run the AR view over each row's anchor and drafts; returns logits `[B, Q, V]`."""
        Q = token_BQ.shape[1]
        if self.geometry is not None:
            token_BQ = torch.nn.functional.pad(token_BQ, (0, self.geometry.width - Q))
        width = token_BQ.shape[1]
        logits = []
        for part in [rows] if self.geometry is None else self.geometry.parts(rows):
            slot_BQ = self._slots(part, width)
            own_BQ = token_BQ[part.start - rows.start : part.stop - rows.start]
            logits.append(self._forward(part, own_BQ, slot_BQ, limit_BQ=slot_BQ, view="ar", logits=width)[:, :Q])
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def draft(self, rows: slice, anchor_B: Tensor, drafts: int) -> Tensor:
        """Run the diffusion view over `[anchor, mask × drafts]`; returns logits `[B, drafts, V]` of what follows it.

        Slot j predicts the token after its own position, so the last slot's logits are never computed.
        """
        token_BK = torch.full((anchor_B.shape[0], drafts + 1), self.config.mask, device=self.cache.device)
        token_BK[:, 0] = anchor_B
        slot_BK = self._slots(rows, drafts + 1)
        limit_BK = slot_BK[:, -1:].expand_as(slot_BK)
        return self._forward(rows, token_BK, slot_BK, limit_BQ=limit_BK, view="diffusion", logits=drafts)

    def _slots(self, rows: slice, width: int) -> Tensor:
        """Return the `[B, width]` slots after each row's valid positions."""
        return self.cache.length_R[rows, None] + torch.arange(width, device=self.cache.device)

    def _forward(
        self, rows: slice, token_BQ: Tensor, slot_BQ: Tensor, *, limit_BQ: Tensor, view: ViewName, logits: int | None
    ) -> Tensor:
        """Call the model once; `logits` says how many leading slots to project (None: none at all)."""
        end = max(self.cache.lengths[rows]) + token_BQ.shape[1]
        if self.geometry is not None:
            end = -(-end // self.geometry.span) * self.geometry.span
        self.cache.begin(rows, slot_BQ, end=end)
        layer_masks = masks.layer_masks(
            masks.up_to(limit_BQ, span=end),
            query_position_BQ=slot_BQ,
            key_position_BS=torch.arange(end, device=slot_BQ.device)[None],
            windows=self.windows,
            dtype=self.dtype,
        )
        arguments = {
            "input_ids": token_BQ,
            "attention_mask": layer_masks.full,
            "position_ids": slot_BQ,
            "past_key_values": self.cache,
            "use_cache": True,
            "view": View(name=view, masks=layer_masks),
        }
        if self.geometry is not None and view == "ar":
            arguments["tile"] = self.geometry.tile
        if logits is None:
            hidden: Tensor = self.model.base_model(**arguments).last_hidden_state
            return hidden
        keep = 0 if logits == token_BQ.shape[1] else torch.arange(logits, device=slot_BQ.device)
        out: Tensor = self.model(**arguments, logits_to_keep=keep).logits
        return out
