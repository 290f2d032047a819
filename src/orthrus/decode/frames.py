"""What a pass reads and who sees whom in it: AR rows, a chain or a tree, and blocks of masks behind any of them.

Every pass of decoding is one of these. A plain step is one AR row; a verification several; a draft pass one and a block
behind it; a one-pass cycle several of both. Pure functions of tensors: who sees whom follows from positions alone.

Shapes: B texts, Q AR rows, R AR rows with fillers, S blocks, K slots of a block, T = R + S*K rows in all, M drafts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from orthrus.kernels import masks


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """The rows of one pass.

    Attributes:
        token_BQ: tokens of the AR rows. The first one stands at the text's length.
        depth_BQ: where AR rows are a tree, each one's distance from the root, the first row; None for a chain.
        ancestor_BQQ: `[b, i, j]` says that row j lies on row i's path from the root, i itself included.
        stop_BS: AR row that each block stands behind, whose text it continues; -1 for the text before all rows.
        shown_BJ: tokens in place of each block's first masks.
        skip: slots of each block whose predictions are not wanted, and
        drafts: slots behind them whose predictions are. A slot predicts the token after its own position.
    """

    token_BQ: Tensor
    depth_BQ: Tensor | None = None
    ancestor_BQQ: Tensor | None = None
    stop_BS: Tensor | None = None
    shown_BJ: Tensor | None = None
    skip: int = 0
    drafts: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors there are, by attribute."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in fields.items() if isinstance(value, Tensor)}

    def of(self, tensors: Sequence[Tensor]) -> "Reading":
        """Return the same reading of other tensors, in the order of `tensors()`."""
        changed: dict[str, Any] = dict(zip(self.tensors(), tensors, strict=True))
        return replace(self, **changed)

    def rows(self, texts: slice) -> "Reading":
        """Return the reading of some of the texts."""
        return self.of([tensor[texts] for tensor in self.tensors().values()])


class Layout(NamedTuple):
    """Where a pass's rows lie: AR rows first, fillers behind them, then the blocks.

    Attributes:
        token_BT: what is read.
        position_BT: positions in the text; that of a slot past the length, but for trees and blocks.
        slot_BT: cache slots their keys are written to.
        rows: R.
        block: K; 0 without blocks.
        predicting: rows whose logits are wanted, AR rows first; 0 for all.
        drafting: those of them in blocks.
        own: the additive mask of the pass's own slots, `[1, 1, T, T]`; None where it is not known beforehand.
    """

    token_BT: Tensor
    position_BT: Tensor
    slot_BT: Tensor
    rows: int
    block: int
    predicting: Tensor | int
    drafting: Tensor
    own: Tensor | None = None


def lay_out(reading: Reading, length_B: Tensor, *, mask: int, last: bool, width: int = 0) -> Layout:
    """Lay a pass's rows out behind texts of these lengths.

    Args:
        reading: the rows.
        length_B: cached tokens of each text.
        mask: the mask token.
        last: whether blocks end with a mask that predicts nothing, which the others see.
        width: AR rows, fillers included, at least. Logits of all are wanted (another number is another shape).
    """
    B, Q = reading.token_BQ.shape
    R, length_B1 = max(width, Q), length_B[:, None]
    token_BT = pad(reading.token_BQ, (0, R - Q))
    row_R = torch.arange(R, device=length_B.device)
    position_BT = length_B1 + (row_R if reading.depth_BQ is None else reading.depth_BQ)
    drafting, K = row_R[:0], 0
    if reading.stop_BS is not None:
        S, J = reading.stop_BS.shape[1], reading.skip
        K = J + reading.drafts + last
        block_BK = torch.full((B, K), mask, device=length_B.device)
        if reading.shown_BJ is not None:
            block_BK[:, : reading.shown_BJ.shape[1]] = reading.shown_BJ
        after_BS = reading.stop_BS if reading.depth_BQ is None else reading.depth_BQ.gather(1, reading.stop_BS)
        slot_K = torch.arange(1, K + 1, device=length_B.device)
        position_BSK = (length_B1 + after_BS)[:, :, None] + slot_K
        token_BT = torch.cat([token_BT, block_BK.repeat(1, S)], dim=1)
        position_BT = torch.cat([position_BT, position_BSK.flatten(1)], dim=1)
        slot_M = torch.arange(J, J + reading.drafts, device=length_B.device)
        drafting = (R + K * torch.arange(S, device=length_B.device)[:, None] + slot_M).flatten()
    T = token_BT.shape[1]
    predicting = torch.cat([row_R, drafting])
    slot_BT = length_B1 + torch.arange(T, device=length_B.device)
    return Layout(token_BT, position_BT, slot_BT, R, K, 0 if len(predicting) == T else predicting, drafting)


def paths(reading: Reading, layout: Layout) -> tuple[Tensor | None, Tensor | None]:
    """Return which rows of a pass each row's text consists of, for layers that keep a recurrent state.

    Of AR rows `[B, R, R]`, None for a chain; of blocks `[B, S*K, R + S*K]`, None without any: the path of the row that
    a block stands behind, and its own slots up to each one, whichever way attention looks there.
    """
    if reading.stop_BS is None:
        return reading.ancestor_BQQ, None
    (B, S), R, K = reading.stop_BS.shape, layout.rows, layout.block
    if reading.ancestor_BQQ is None:
        text_BSR = torch.arange(R, device=reading.stop_BS.device) <= reading.stop_BS[:, :, None]
    else:
        text_BSR = reading.ancestor_BQQ.gather(1, reading.stop_BS[:, :, None].expand(-1, -1, R))
    block_M = torch.arange(S * K, device=reading.stop_BS.device) // max(K, 1)
    same_MM = (block_M[:, None] == block_M).tril()
    path_BMT = torch.cat([text_BSR.repeat_interleave(K, dim=1), same_MM.expand(B, -1, -1)], dim=2)
    return reading.ancestor_BQQ, path_BMT


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """The cache slots that a pass's masks are made over: all in reach or, split, the pass's own alone.

    Attributes:
        length_B: cached tokens of each text.
        span: slots in the frame.
        split: whether it holds the pass's own slots alone, so that nothing about it depends on the text's length.
        windows: the model's sliding windows.
        dtype: of additive masks.
    """

    length_B: Tensor
    span: int
    split: bool
    windows: tuple[int, ...]
    dtype: torch.dtype

    @property
    def _start_B(self) -> Tensor:
        """Where in the frame the pass's own slots begin."""
        return torch.zeros_like(self.length_B) if self.split else self.length_B

    def ar(self, reading: Reading, rows: int) -> Tensor:
        """Let each AR row see the text and the rows up to itself, or its own path through a tree: `[B, R, span]`."""
        if reading.ancestor_BQQ is not None:
            return masks.tree(self._start_B, reading.ancestor_BQQ, span=self.span)
        row_R = torch.arange(rows, device=self.length_B.device)
        return masks.up_to(self._start_B[:, None] + row_R, span=self.span)

    def blocks(self, reading: Reading, layout: Layout, *, causal: bool) -> Tensor:
        """Let each block see what the row before it sees, and its own slots: `[B, S*K, span]`."""
        assert reading.stop_BS is not None
        if reading.ancestor_BQQ is None:
            text_BSS = masks.up_to(self._start_B[:, None] + reading.stop_BS, span=self.span)
        else:
            ar_BRS = self.ar(reading, layout.rows)
            text_BSS = ar_BRS.gather(1, reading.stop_BS[:, :, None].expand(-1, -1, self.span))
        return masks.ahead(text_BSS, self._start_B, rows=layout.rows, block=layout.block, causal=causal)

    def chain(self, start: int, reading: Reading, layout: Layout, *, causal: bool) -> masks.LayerMasks:
        """Make the masks of a prompt's pass behind texts of one length, which no window narrows."""
        rest = None
        if reading.stop_BS is not None:
            blocks_BMS = self.blocks(reading, layout, causal=causal)
            rest = masks.additive(blocks_BMS, self.dtype)[:, None]
        seen = masks.Chain(start, layout.rows, rest)
        return masks.LayerMasks(full=seen, windowed=dict.fromkeys(self.windows, seen))

    def behind(self, start: int, own_11TT: Tensor) -> masks.LayerMasks:
        """Make those of a pass behind texts of one length, which no window narrows, from that of its own slots."""
        after = self.span - start - own_11TT.shape[3]
        own_11TT = pad(own_11TT, (0, after), value=torch.finfo(self.dtype).min) if after else own_11TT
        seen = pad(own_11TT, (start, 0))
        return masks.LayerMasks(full=seen, windowed=dict.fromkeys(self.windows, seen))

    def dense(self, reading: Reading, layout: Layout, *, causal: bool) -> masks.LayerMasks:
        """Make the masks of any pass."""
        allowed_BQS = self.ar(reading, layout.rows)
        if reading.stop_BS is not None:
            allowed_BQS = torch.cat([allowed_BQS, self.blocks(reading, layout, causal=causal)], dim=1)
        query_BQ = layout.position_BT
        if self.split:
            return masks.behind(
                allowed_BQS,
                length_B=self.length_B,
                query_position_BQ=query_BQ,
                key_position_BW=layout.position_BT,
                windows=self.windows,
            )
        key_BS = torch.arange(self.span, device=query_BQ.device)[None]
        if self.windows and (reading.depth_BQ is not None or reading.stop_BS is not None):
            # Keys lie at the position of their slot, but for those of trees and blocks.
            key_BS = key_BS.expand(len(query_BQ), -1).scatter(1, layout.slot_BT, layout.position_BT)
        return masks.layer_masks(
            allowed_BQS, query_position_BQ=query_BQ, key_position_BS=key_BS, windows=self.windows, dtype=self.dtype
        )


def known_layout(reading: Reading, length_B: Tensor, **how: Any) -> Layout | None:
    """Return a pass's layout on a CPU, of a chain with a block behind it or none, from one made before; None of others.

    `how` is as `lay_out` takes it, with whether blocks are `causal` and the masks' `dtype`.
    """
    (B, Q), stop_BS = reading.token_BQ.shape, reading.stop_BS
    if length_B.device.type != "cpu" or reading.depth_BQ is not None or reading.shown_BJ is not None:
        return None
    stops = {None} if stop_BS is None else {*stop_BS[:, 0].tolist()} if stop_BS.shape[1] == 1 else set()
    if len(stops) != 1:
        return None
    form = _form(Q, *stops, reading.skip, reading.drafts, **how)
    slot_BT, more_BT = length_B[:, None] + form.slot_BT, form.token_BT[:, Q:].expand(B, -1)
    return form._replace(
        token_BT=torch.cat([reading.token_BQ, more_BT], dim=1) if more_BT.numel() else reading.token_BQ,
        position_BT=slot_BT if form.position_BT is form.slot_BT else length_B[:, None] + form.position_BT,
        slot_BT=slot_BT,
    )


@lru_cache(maxsize=256)
def _form(Q: int, stop: int | None, skip: int, drafts: int, *, causal: bool, dtype: torch.dtype, **how: Any) -> Layout:
    """Return the layout of one text without tokens, and its own mask."""
    with torch.inference_mode(False), torch.no_grad():
        none_B = torch.zeros(1, dtype=torch.long, device="cpu")
        stop_BS = None if stop is None else torch.tensor([[stop]], device="cpu")
        reading = Reading(token_BQ=none_B[:, None].expand(1, Q), stop_BS=stop_BS, skip=skip, drafts=drafts)
        form = lay_out(reading, none_B, **how)
        frame = Frame(length_B=none_B, span=form.token_BT.shape[1], split=False, windows=(), dtype=dtype)
        own = frame.dense(reading, form, causal=causal).full
        assert isinstance(own, Tensor)
        alike = torch.equal(form.position_BT, form.slot_BT)
        return form._replace(position_BT=form.slot_BT if alike else form.position_BT, own=own)
