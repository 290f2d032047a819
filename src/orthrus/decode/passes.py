"""The passes of the backbone that decoding is made of: prefill, draft, verify.

Each one says which slots it writes, which view it takes and who sees whom, and calls the model once. Rows stay
where they are in the cache; nothing is copied. Knows tokens and shapes, but neither options nor acceptance.

Shapes: B rows, Q query rows, K block length, M drafts, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from orthrus.errors import ConfigError
from orthrus.model import masks
from orthrus.model.attach import config_of, windows_of
from orthrus.model.cache import ScratchCache
from orthrus.model.dual import View, ViewName

_DENSE_MASKS = ("orthrus", "sdpa", "eager")


class Passes:
    """Run a dual-view model over the rows of one cache."""

    def __init__(self, model: PreTrainedModel, cache: ScratchCache) -> None:
        self.model = model
        self.cache = cache
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
        longest = max(len(tokens) for tokens in pending)
        device = self.cache.device
        for start in range(0, longest, chunk):
            width = min(chunk, longest - start)
            piece = [list(tokens[start : start + width]) for tokens in pending]
            token_BQ = torch.tensor([p + [0] * (width - len(p)) for p in piece], device=device)
            slot_BQ = self._slots(rows, width)
            self._forward(rows, token_BQ, slot_BQ, limit_BQ=slot_BQ, view="ar", logits=None)
            self.cache.set_lengths_of(rows, [self.cache.lengths[rows.start + i] + len(p) for i, p in enumerate(piece)])

    def verify(self, rows: slice, token_BQ: Tensor) -> Tensor:
        """Run the AR view over each row's anchor and drafts; returns logits `[B, Q, V]`."""
        slot_BQ = self._slots(rows, token_BQ.shape[1])
        return self._forward(rows, token_BQ, slot_BQ, limit_BQ=slot_BQ, view="ar", logits=token_BQ.shape[1])

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
        if logits is None:
            hidden: Tensor = self.model.base_model(**arguments).last_hidden_state
            return hidden
        keep = 0 if logits == token_BQ.shape[1] else torch.arange(logits, device=slot_BQ.device)
        out: Tensor = self.model(**arguments, logits_to_keep=keep).logits
        return out
