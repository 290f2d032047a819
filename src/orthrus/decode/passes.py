"""The passes of the backbone that decoding is made of: prefill, draft, verify.

Each one says which slots it writes, which view it takes and who sees whom, and calls the model once. Rows stay
where they are in the cache; nothing is copied. Knows tokens and shapes, but neither options nor acceptance.

Shapes: B rows, Q query rows, K block length, M drafts, V vocabulary.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from orthrus.errors import ConfigError, UnsupportedModel
from orthrus.kernels import attention, masks
from orthrus.model import graphs
from orthrus.model.attach import config_of, duals, windows_of
from orthrus.model.attachment import attachment_of
from orthrus.model.cache import ScratchCache
from orthrus.model.dual import FusedView, View, ViewName
from orthrus.model.markov import markov_of

_DENSE_MASKS = ("orthrus", "sdpa", "eager")


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """Fix the shapes of AR passes, so that a token's logits do not depend on the pass it came in (`decode.exact`).

    Attributes:
        widths: tokens per row that a decoding pass may have, in ascending order; fewer are filled up to the next.
        chunks: the same of prefill passes.
        span: attention takes keys so many at a time; cache slots in reach are rounded up to a multiple of this, or
        tails: in decoding passes to whole spans and one of these, in ascending order, `span` the last, and
        chunk_tails: in prefill passes to whole spans and one of these.
        group: rows per decoding pass at most, a power of two; other numbers of rows take several passes of smaller
            powers. Prefill passes carry one row.
    """

    widths: tuple[int, ...]
    chunks: tuple[int, ...]
    span: int
    tails: tuple[int, ...]
    chunk_tails: tuple[int, ...]
    group: int

    def width(self, tokens: int) -> int:
        """Return the width of a decoding pass over so many tokens per row, the largest one's at most."""
        return self.widths[bisect_left(self.widths, tokens)]

    def chunk(self, tokens: int) -> int:
        """Return the width of a prefill pass over so many tokens, the largest one's at most."""
        return self.chunks[bisect_left(self.chunks, tokens)]

    def reach(self, slots: int, *, whole: bool, prefill: bool = False) -> int:
        """Return how many slots a pass looks at that needs so many: `whole` spans, or a tail at their end."""
        before = (slots - 1) // self.span * self.span
        tails = (self.span,) if whole else self.chunk_tails if prefill else self.tails
        return before + tails[bisect_left(tails, slots - before)]

    def capacity(self, positions: int) -> int:
        """Return the cache positions a row of so many tokens needs, fillers and rounding included."""
        return -(-(positions + max(self.chunks[-1], self.widths[-1])) // self.span) * self.span

    def parts(self, rows: slice) -> list[slice]:
        """Cut rows into passes of power-of-two sizes, the largest first."""
        parts, start, size = [], rows.start, self.group
        while start < rows.stop:
            while size > rows.stop - start:
                size //= 2
            parts.append(slice(start, start + size))
            start += size
        return parts


class Branches(NamedTuple):
    """How the AR rows of a pass hang together where they are a tree of drafts (`decode.tree`).

    Attributes:
        depth_BQ: distance from the root, which stands at the row's length.
        ancestor_BQQ: `[b, i, j]` says that j lies on i's path from the root, i itself included.
    """

    depth_BQ: Tensor
    ancestor_BQQ: Tensor

    def rows(self, own: slice) -> "Branches":
        """Return the branches of some of the rows."""
        return Branches(self.depth_BQ[own], self.ancestor_BQQ[own])


class Frame(NamedTuple):
    """The slots that a pass's masks are made over: all in reach or, where masks are in parts, its own alone.

    Attributes:
        first_B: the slot of the cache that is the frame's first.
        length_B: where in the frame the pass's own slots begin.
        span: slots in it.
        in_parts: whether it holds the pass's own slots alone.
    """

    first_B: Tensor
    length_B: Tensor
    span: int
    in_parts: bool


class Passes:
    """Run a dual-view model over the rows of one cache; with a `geometry`, AR passes take fixed shapes."""

    def __init__(self, model: PreTrainedModel, cache: ScratchCache, geometry: Geometry | None = None) -> None:
        self.model = model
        self.cache = cache
        self.geometry = geometry
        self.compiled = graphs.is_compiled(model)
        self.in_parts = attention.can_split(cache.device) and model.config._attn_implementation == attention.NAME
        self.recorded = self.compiled and self.in_parts
        self.reads_ahead = not self.recorded  # a recorded draft pass takes less than a longer prefill pass does
        # What a recording reads beside the cache and its inputs: other weights make another one.
        self.model_state = hash((config_of(model), *(p.data_ptr() for p in model.parameters()))) if self.recorded else 0
        self.config = config_of(model)
        self.causal = self.config.block_attention == "causal"
        self.markov = markov_of(model)
        self.windows = windows_of(model)
        self.dtype = model.dtype
        self.last_position: int = model.config.get_text_config().max_position_embeddings - 1
        if model.config._attn_implementation not in _DENSE_MASKS:
            raise ConfigError(
                f"decoding needs an attention function that takes dense masks ({', '.join(_DENSE_MASKS)}), found "
                f"{model.config._attn_implementation!r}: orthrus.model.use_attention(model, 'orthrus')"
            )
        require_reach(model)

    def prefill(
        self,
        rows: slice,
        pending: Sequence[Sequence[int]],
        *,
        chunk: int,
        anchor_B: Tensor | None = None,
        drafts: int = 0,
    ) -> Tensor | None:
        """Write the keys of each row's pending tokens, `chunk` positions at a time, and commit them.

        Rows may differ in length, before and after: a shorter row writes filler into its own scratch. Those that
        start level share passes, so that no filler runs past the longest of their texts.

        Args:
            rows: where the rows stand in the cache.
            pending: tokens of each row; some for every row where anchors are given.
            chunk: positions per pass at most, where shapes are not fixed.
            anchor_B: the tokens after the pending ones. With them the last pass drafts what follows, as `draft` would.
            drafts: how many tokens it drafts.

        Returns:
            Draft logits `[B, drafts, V]`; None without anchors.
        """
        fixed, ahead = self.geometry, []
        parts = self._level(rows) if fixed is None else [slice(i, i + 1) for i in range(rows.start, rows.stop)]
        chunk = chunk if fixed is None else fixed.chunks[-1]
        for part in parts:
            own = slice(part.start - rows.start, part.stop - rows.start)
            tokens = pending[own]
            longest = max(map(len, tokens))
            for start in range(0, longest, chunk):
                piece = [list(t[start : start + chunk]) for t in tokens]
                width = min(chunk, longest - start)
                width = width if fixed is None else fixed.chunk(width)
                token_BQ = torch.tensor([p + [0] * (width - len(p)) for p in piece], device=self.cache.device)
                if anchor_B is not None and start + chunk >= longest:
                    last_B1 = torch.tensor([[len(p) - 1] for p in piece], device=self.cache.device)
                    keep = torch.arange(width, width + drafts, device=self.cache.device)
                    ahead.append(self._both(part, token_BQ, last_B1, anchor_B[own, None], drafts, keep, eager=True))
                else:
                    slot_BQ = self._slots(part, width)
                    self._forward(part, token_BQ, slot_BQ, limit_BQ=slot_BQ, view="ar", logits=None)
                self.cache.commit(part, [len(p) for p in piece])
        return _joined(ahead) if ahead else None

    def verify(self, rows: slice, token_BQ: Tensor) -> Tensor:
        """Run the AR view over each row's anchor and drafts; returns logits `[B, Q, V]`."""
        Q = token_BQ.shape[1]
        width = Q if self.geometry is None else self.geometry.width(Q)
        (logits_BQV,) = self._replayed("verify", rows, width, [token_BQ], lambda own: [self._verify(rows, width, *own)])
        return logits_BQV

    def _verify(self, rows: slice, width: int, token_BQ: Tensor) -> Tensor:
        Q = token_BQ.shape[1]
        if width > Q:
            token_BQ = torch.nn.functional.pad(token_BQ, (0, width - Q))
        logits = []
        for part in self._parts(rows):
            slot_BQ = self._slots(part, width)
            own_BQ = token_BQ[part.start - rows.start : part.stop - rows.start]
            logits.append(self._forward(part, own_BQ, slot_BQ, limit_BQ=slot_BQ, view="ar", logits=width)[:, :Q])
        return _joined(logits)

    def draft(self, rows: slice, anchor_B: Tensor, drafts: int, *, shown_BJ: Tensor | None = None) -> Tensor:
        """Run the diffusion view over `[anchor, mask × drafts]`; returns logits `[B, drafts, V]` of what follows it.

        Slot j predicts the token after its own position, so the last slot's logits are never computed. `shown_BJ` are
        drafts that a step before has settled, in place of the first masks.
        """
        given = [anchor_B] if shown_BJ is None else [anchor_B, shown_BJ]
        width = drafts + 1
        (logits_BMV,) = self._replayed("draft", rows, width, given, lambda own: [self._draft(rows, drafts, *own)])
        return logits_BMV

    def _draft(self, rows: slice, drafts: int, anchor_B: Tensor, shown_BJ: Tensor | None = None) -> Tensor:
        token_BK = torch.full((anchor_B.shape[0], drafts + 1), self.config.mask, device=self.cache.device)
        token_BK[:, 0] = anchor_B
        if shown_BJ is not None:
            token_BK[:, 1 : 1 + shown_BJ.shape[1]] = shown_BJ
        slot_BK = self._slots(rows, drafts + 1)
        limit_BK = slot_BK if self.causal else slot_BK[:, -1:].expand_as(slot_BK)
        return self._forward(rows, token_BK, slot_BK, limit_BQ=limit_BK, view="diffusion", logits=drafts)

    def verify_tree(self, rows: slice, token_BP: Tensor, branches: Branches) -> Tensor:
        """Run the AR view over the nodes of a draft tree, each seeing its own path; returns logits `[B, P, V]`.

        Node i's keys lie in slot `length + i`, at position `length + depth`.
        """
        (logits_BPV,) = self._replayed(
            "tree",
            rows,
            token_BP.shape[1],
            [token_BP, *branches],
            lambda own: [self._verify_tree(rows, own[0], Branches(*own[1:]))],
        )
        return logits_BPV

    def _verify_tree(self, rows: slice, token_BP: Tensor, branches: Branches) -> Tensor:
        slot_BP = self._slots(rows, token_BP.shape[1])
        position_BP = self.cache.length_R[rows, None] + branches.depth_BQ
        frame = self._begin(rows, slot_BP)
        allowed = masks.tree(frame.length_B, branches.ancestor_BQQ, span=frame.span)
        layer_masks = self._masks(frame, allowed, position_BP, slot_BP, position_BP)
        return self._call(token_BP, position_BP, View(name="ar", masks=layer_masks), keep=0)

    def fused(
        self, rows: slice, token_BQ: Tensor, stop_BS: Tensor, drafts: int, branches: Branches | None = None
    ) -> tuple[Tensor, Tensor]:
        """Verify and draft in one pass: AR rows for anchor and drafts, a block of masks for each stop.

        Block s continues the text as if the AR view kept the drafts up to the one at `stop_BS[:, s]`; it does not know
        the token written there (its first slot is a mask too), so after a chain its slot j predicts position
        `length + stop + 2 + j`. With branches the drafts are a tree's, as in `verify_tree`.

        Returns:
            AR logits `[B, Q, V]` and the blocks' draft logits `[B, S, drafts, V]`.
        """
        given = [token_BQ, stop_BS, *(branches or ())]

        def call(own: list[Tensor]) -> list[Tensor]:
            return list(self._fused(rows, own[0], own[1], drafts, Branches(*own[2:]) if own[2:] else None))

        width = token_BQ.shape[1] + stop_BS.shape[1] * (drafts + 1)
        logits_BQV, ahead_BSMV = self._replayed(("fused", drafts), rows, width, given, call)
        return logits_BQV, ahead_BSMV

    def move_slots(self, rows: slice, source_BM: Tensor, target_BM: Tensor) -> None:
        """Copy a few slots within each row, as `ScratchCache.move_slots` does: a tree's accepted path to its place."""

        def call(own: list[Tensor]) -> list[Tensor]:
            self.cache.move_slots(rows, *own)
            return []

        self._replayed("move", rows, 0, [source_BM, target_BM], call)

    def _fused(
        self, rows: slice, token_BQ: Tensor, stop_BS: Tensor, drafts: int, branches: Branches | None
    ) -> tuple[Tensor, Tensor]:
        Q, S, K = token_BQ.shape[1], stop_BS.shape[1], drafts + 1
        index = torch.arange(Q + S * K, device=self.cache.device)
        keep = torch.cat([index[:Q], index[Q:].view(S, K)[:, :-1].flatten()])
        mask_BS = torch.full_like(stop_BS, self.config.mask)
        parts = [(part, slice(part.start - rows.start, part.stop - rows.start)) for part in self._parts(rows)]
        logits = []
        for part, own in parts:
            hung = None if branches is None else branches.rows(own)
            logits.append(self._both(part, token_BQ[own], stop_BS[own], mask_BS[own], drafts, keep, branches=hung))
        logits_BTV = _joined(logits)
        return logits_BTV[:, :Q], logits_BTV[:, Q:].view(len(logits_BTV), S, drafts, -1)

    def _both(
        self,
        rows: slice,
        token_BQ: Tensor,
        stop_BS: Tensor,
        head_BS: Tensor,
        drafts: int,
        keep: Tensor,
        *,
        branches: Branches | None = None,
        eager: bool = False,
    ) -> Tensor:
        """Run the AR view over `token_BQ` and, behind them, the diffusion view over blocks `[head, mask × drafts]`.

        Block s stands after the token at `stop_BS[:, s]` (-1: before all of them) and sees what that one does.
        """
        (B, Q), S, K = token_BQ.shape, stop_BS.shape[1], drafts + 1
        length_B = self.cache.length_R[rows]
        slot_BT = self._slots(rows, Q + S * K)
        frame = self._begin(rows, slot_BT, whole=not eager, prefill=eager)
        if branches is None:
            own_BQ, place_BS = slot_BT[:, :Q], length_B[:, None] + stop_BS
            sees_BQS, text_BSS = (self._up_to(frame, place) for place in (own_BQ, place_BS))
        else:
            own_BQ = length_B[:, None] + branches.depth_BQ
            place_BS = own_BQ.gather(1, stop_BS)
            sees_BQS = masks.tree(frame.length_B, branches.ancestor_BQQ, span=frame.span)
            text_BSS = sees_BQS.gather(1, stop_BS[:, :, None].expand(-1, -1, frame.span))
        ahead_BSK = place_BS[:, :, None] + torch.arange(1, K + 1, device=self.cache.device)
        position_BT = torch.cat([own_BQ, ahead_BSK.flatten(1)], dim=1)
        verifying = self._masks(frame, sees_BQS, own_BQ, slot_BT, position_BT)
        allowed_BMS = masks.ahead(text_BSS, frame.length_B, rows=Q, block=K, causal=self.causal)
        drafting = self._masks(frame, allowed_BMS, position_BT[:, Q:], slot_BT, position_BT)
        block_BSK = torch.full((B, S, K), self.config.mask, device=self.cache.device)
        block_BSK[:, :, 0] = head_BS
        token_BT = torch.cat([token_BQ, block_BSK.flatten(1)], dim=1)
        view = FusedView(rows=Q, ar=verifying, diffusion=drafting)
        return self._call(token_BT, position_BT, view, keep=keep, eager=eager)

    def _parts(self, rows: slice) -> list[slice]:
        """Cut rows into the passes that a fixed geometry allows: without one, a single pass."""
        return [rows] if self.geometry is None else self.geometry.parts(rows)

    def _level(self, rows: slice) -> list[slice]:
        """Cut rows into runs of equal length."""
        lengths = self.cache.lengths
        steps = [i for i in range(rows.start + 1, rows.stop) if lengths[i] != lengths[i - 1]]
        return [slice(start, stop) for start, stop in pairwise([rows.start, *steps, rows.stop])]

    def _slots(self, rows: slice, width: int) -> Tensor:
        """Return the `[B, width]` slots after each row's valid positions."""
        return self.cache.length_R[rows, None] + torch.arange(width, device=self.cache.device)

    def _forward(
        self, rows: slice, token_BQ: Tensor, slot_BQ: Tensor, *, limit_BQ: Tensor, view: ViewName, logits: int | None
    ) -> Tensor:
        """Run a pass whose slots are its positions; `logits` says how many leading slots to project (None: none)."""
        frame = self._begin(rows, slot_BQ, fixed=view == "ar", whole=False, prefill=logits is None)
        if self._alike(rows, slot_BQ, frame, view):
            seen = self.cache.lengths[rows.start] + slot_BQ.shape[1]
            layer_masks = masks.alike(
                seen, span=frame.span, windows=self.windows, dtype=self.dtype, device=slot_BQ.device
            )
        else:
            layer_masks = self._masks(frame, self._up_to(frame, limit_BQ), slot_BQ, slot_BQ, slot_BQ)
        keep = (
            None if logits is None else 0 if logits == slot_BQ.shape[1] else torch.arange(logits, device=slot_BQ.device)
        )
        return self._call(token_BQ, slot_BQ, View(name=view, masks=layer_masks), keep=keep)

    def _begin(
        self, rows: slice, slot_BQ: Tensor, *, fixed: bool = True, whole: bool = True, prefill: bool = False
    ) -> Frame:
        """Point the cache at a pass's slots; returns what its masks are made over.

        Draft passes are free (`fixed=False`) of a geometry, which rounds the reach, to `whole` spans or to tails.
        """
        cache, longest = self.cache, max(self.cache.lengths[rows])
        end, length_B = longest + slot_BQ.shape[1], cache.length_R[rows]
        # Reading a prompt is another kernel's work, unless its keys must be those that other passes write.
        in_parts = self.in_parts and (self.geometry is not None or not prefill)
        cache.require(end)
        if in_parts and self.recorded:
            end = cache.capacity  # one recording for all lengths
        elif self.geometry is not None and fixed:
            end = min(self.geometry.reach(end, whole=whole, prefill=prefill), cache.capacity)
        elif self.compiled:
            end = min(-(-end // graphs.SPAN) * graphs.SPAN, cache.capacity)
        level = not self.compiled and len(set(cache.lengths[rows])) == 1
        cache.begin(rows, slot_BQ, end=end, start=cache.lengths[rows.start] if level else None)
        if in_parts:
            return Frame(length_B, torch.zeros_like(length_B), slot_BQ.shape[1], in_parts=True)
        return Frame(torch.zeros_like(length_B), length_B, end, in_parts=False)

    def _up_to(self, frame: Frame, limit_BQ: Tensor) -> Tensor:
        """Let each query see the frame's slots up to and including the one at its limit."""
        limit_BQ = limit_BQ - frame.first_B[:, None] if frame.in_parts else limit_BQ
        return masks.up_to(limit_BQ, span=frame.span)

    def _alike(self, rows: slice, slot_BQ: Tensor, frame: Frame, view: ViewName) -> bool:
        """Tell whether all queries see the same slots: a lone token, or a block that looks both ways.

        Only in rows of one length, and within every window.
        """
        if self.compiled or frame.in_parts or (slot_BQ.shape[1] > 1 and (self.causal or view == "ar")):
            return False
        return len(set(self.cache.lengths[rows])) == 1 and frame.span <= min(self.windows, default=frame.span)

    def _masks(
        self, frame: Frame, allowed_BQS: Tensor, query_BQ: Tensor, written_BW: Tensor, position_BW: Tensor
    ) -> masks.LayerMasks:
        """Make a pass's masks from its rule within the frame.

        Keys lie at the position of their slot but for those the pass itself writes.
        """
        if frame.in_parts:
            return masks.behind(
                allowed_BQS,
                length_B=frame.first_B,
                query_position_BQ=query_BQ,
                key_position_BW=position_BW,
                windows=self.windows,
            )
        key_BS = torch.arange(frame.span, device=query_BQ.device)[None]
        if self.windows and position_BW is not written_BW:
            key_BS = key_BS.expand(len(written_BW), -1).scatter(1, written_BW, position_BW)
        return masks.layer_masks(
            allowed_BQS, query_position_BQ=query_BQ, key_position_BS=key_BS, windows=self.windows, dtype=self.dtype
        )

    def _replayed(
        self,
        kind: object,
        rows: slice,
        width: int,
        given: list[Tensor],
        call: Callable[[list[Tensor]], list[Tensor]],
    ) -> list[Tensor]:
        """Make a pass, or run it again as it was recorded; `given` is all that may differ, but for rows' lengths."""
        if not (self.recorded and self.cache.keys):
            return call(given)
        self.cache.require(max(self.cache.lengths[rows]) + width)
        key = (kind, width, rows.start, rows.stop, self.geometry, self.model_state)
        return graphs.replayed(self.cache, key, given, call)

    def _call(
        self,
        token_BQ: Tensor,
        position_BQ: Tensor,
        view: View | FusedView,
        *,
        keep: int | Tensor | None,
        eager: bool = False,
    ) -> Tensor:
        """Call the model once; `keep` picks the query rows to project (0: all, None: none, hidden states instead).

        `eager` is for widths that are never met again, which no graph should be compiled for.
        """
        arguments: dict[str, Any] = {
            "input_ids": token_BQ,
            "attention_mask": self._stand_in(view),
            # Fillers and drafts may stand past the context, where learned position embeddings have no row.
            "position_ids": position_BQ.clamp_max(self.last_position),
            "past_key_values": self.cache,
            "use_cache": True,
            "view": view,
        }
        if self.geometry is not None and (isinstance(view, FusedView) or view.name == "ar"):
            arguments["tile"] = self.geometry.span
        if keep is None:
            hidden: Tensor = self.model.base_model(**arguments).last_hidden_state
            return hidden
        arguments["logits_to_keep"] = keep
        if self.compiled and self.cache.keys and not eager:
            return graphs.run(self.model, arguments)
        logits: Tensor = self.model(**arguments).logits
        return logits

    @staticmethod
    def _stand_in(view: View | FusedView) -> Tensor | None:
        """Return any mask that the model takes for one, which saves it making its own: each view brings its own."""
        own = view.ar if isinstance(view, FusedView) else view.masks
        if own is None:
            return None
        assert isinstance(own.full, Tensor | masks.Behind)
        return own.full if isinstance(own.full, Tensor) else own.full.own_BQW[:, None]


def _joined(parts: list[Tensor]) -> Tensor:
    """Put the rows of several passes together, without a copy where there is one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def require_reach(model: PreTrainedModel) -> None:
    """Check once, with a pass over one token, that `view=` reaches every attention module of a model.

    Raises:
        UnsupportedModel: the architecture does not hand keyword arguments on to its attention.
    """
    if attachment_of(model).reached:
        return
    reached: list[bool] = []
    hooks = [
        dual.register_forward_pre_hook(lambda _, __, kwargs: reached.append("view" in kwargs), with_kwargs=True)
        for dual in duals(model)
    ]
    try:
        with torch.no_grad():
            model.base_model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), view="ar")
    finally:
        for hook in hooks:
            hook.remove()
    if len(reached) != len(hooks) or not all(reached):
        raise UnsupportedModel(
            f"{type(model).__name__} does not hand keyword arguments on to its attention, found {sum(reached)} of "
            f"{len(hooks)} layers reached by view=: its diffusion view could never be run"
        )
    attachment_of(model).reached = True
