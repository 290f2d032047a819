"""The pass that decoding is made of: AR rows, and blocks of masks behind any of them, in one call of the model.

Knows tokens and shapes, but neither options nor acceptance. Texts stay where they are in the cache; nothing is copied.

Shapes: B texts, Q AR rows, S blocks, M drafts, V vocabulary.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from orthrus.decode.frames import Frame, Layout, Reading, known_layout, lay_out, paths
from orthrus.decode.geometry import Geometry
from orthrus.decode.runner import runner_for, splits
from orthrus.errors import ConfigError
from orthrus.kernels import attention
from orthrus.model.attach import config_of, is_hybrid, require_reach, windows_of
from orthrus.model.cache import ScratchCache
from orthrus.model.dual import FusedView, View
from orthrus.model.head import projecting
from orthrus.model.markov import markov_of
from orthrus.model.mask_row import inputs_of, mask_of

_DENSE_MASKS = ("orthrus", "sdpa", "eager")


class Logits(NamedTuple):
    """What a pass says: of each AR row `[B, Q, V]`, and of each block's masks `[B, S, M, V]`, where there are any."""

    ar_BQV: Tensor
    ahead_BSMV: Tensor | None = None


class Proposal(NamedTuple):
    """What a draft pass gives.

    Attributes:
        logits_BMV: of the drafts.
        first_B1V: the backbone's own logits of the token before them, the first after the anchor; None where the first
            draft stands there.
        passes: how many passes of the drafter it took.
    """

    logits_BMV: Tensor
    first_B1V: Tensor | None = None
    passes: int = 1

    def unverified(self) -> "Proposal":
        """Take the first token for a draft like the others."""
        if self.first_B1V is None:
            return self
        return Proposal(torch.cat([self.first_B1V, self.logits_BMV], dim=1), passes=self.passes)


class Passes:
    """Run a dual-view model over the rows of one cache; with a `geometry`, AR rows take fixed shapes."""

    def __init__(self, model: PreTrainedModel, cache: ScratchCache, geometry: Geometry | None = None) -> None:
        self.model = model
        self.cache = cache
        self.geometry = geometry
        self.config = config_of(model)
        self.causal = self.config.block_attention == "causal"
        self._both_ways = self.config.block_recurrence == "bidirectional"
        # The paper's last slot predicts nothing, and matters only where slots see both ways.
        self._last = self.config.anchor == "twin" and (self._both_ways or not self.causal)
        self.markov = markov_of(model)
        self._mask = mask_of(model)
        cache.rounded = attention.rounded_layers(model)
        self.runner = runner_for(model, cache)
        self._splits = splits(model, cache)
        self._windows = windows_of(model)
        self._chains = cache.device.type == "cpu" and model.config._attn_implementation == attention.NAME
        self._hybrid = is_hybrid(model)
        self._last_position: int = model.config.get_text_config().max_position_embeddings - 1
        if model.config._attn_implementation not in _DENSE_MASKS:
            raise ConfigError(
                f"decoding needs an attention function that takes dense masks ({', '.join(_DENSE_MASKS)}), found "
                f"{model.config._attn_implementation!r}: orthrus.model.use_attention(model, 'orthrus')"
            )
        require_reach(model)

    def run(self, rows: slice, reading: Reading) -> Logits:
        """Run one pass: every AR row's keys stay in the cache until the next pass, and `commit` keeps them."""
        self.cache.require(max(self.cache.lengths[rows]) + self.scratch(reading))
        if rows.start or not self.runner.captured:  # too many numbers of rows are behind others to record each
            return self._run(rows, reading)
        given = reading.tensors()
        kind = (tuple(given), reading.skip, reading.drafts, self.geometry)

        def call(inputs: list[Tensor]) -> list[Tensor]:
            return [part for part in self._run(rows, reading.of(inputs)) if part is not None]

        return Logits(*self.runner.replay(kind, rows, list(given.values()), call))

    def verify(self, rows: slice, token_BQ: Tensor) -> Tensor:
        """Run AR rows alone, each text's anchor and drafts; returns logits `[B, Q, V]`."""
        return self.run(rows, Reading(token_BQ=token_BQ)).ar_BQV

    def draft(self, rows: slice, anchor_B: Tensor, drafts: int, *, shown_BJ: Tensor | None = None) -> Proposal:
        """Run the anchor's AR row and the view's own kind of block behind it.

        The AR row says what the backbone writes after the anchor; the drafts are of the tokens after that one. The
        tokens `shown_BJ` after the anchor stand in the block already, and drafts follow them.
        """
        if drafts == 0:
            logits_B1V = self.verify(rows, anchor_B[:, None])
            return Proposal(logits_B1V[:, :0], logits_B1V)
        made = drafts if self.geometry is None or shown_BJ is not None else max(drafts, self.config.proposals - 1)
        reading = self._behind(anchor_B[:, None], torch.zeros_like(anchor_B), made, shown_BJ)
        first_B1V, ahead_BSMV = self.run(rows, reading)
        assert ahead_BSMV is not None
        return Proposal(ahead_BSMV[:, 0, :drafts], first_B1V)

    def _behind(self, token_BQ: Tensor, anchor_B: Tensor, drafts: int, shown_BJ: Tensor | None = None) -> Reading:
        """Put a block behind the anchor's row: of masks, or one that starts with the anchor and sees what is before.

        The last token shown has a prediction of its own; only the backbone predicts what follows the anchor.
        """
        shown = 0 if shown_BJ is None else shown_BJ.shape[1]
        if self.config.anchor == "backbone":
            stop_BS, skip = anchor_B[:, None], max(0, shown - 1)
        else:
            head_B1 = token_BQ.gather(1, anchor_B[:, None])
            stop_BS, skip = anchor_B[:, None] - 1, max(1, shown)
            shown_BJ = head_B1 if shown_BJ is None else torch.cat([head_B1, shown_BJ], dim=1)
        return Reading(token_BQ=token_BQ, stop_BS=stop_BS, shown_BJ=shown_BJ, skip=skip, drafts=drafts)

    def prefill(
        self,
        rows: slice,
        pending: Sequence[Sequence[int]],
        *,
        chunk: int,
        anchors: Sequence[int] | None = None,
        drafts: int = 0,
    ) -> Proposal | None:
        """Write the keys of each row's pending tokens, `chunk` positions at a time, and commit them.

        Rows may differ in length, before and after: a shorter row writes filler into its own scratch. Those that
        start level share passes, so that no filler runs past the longest of their texts.

        Args:
            rows: where the rows stand in the cache.
            pending: tokens of each row.
            chunk: positions per pass at most, where shapes are not fixed.
            anchors: the tokens after the pending ones, where shapes are not fixed. The last pass reads them too, says
                what follows, and commits no anchor.
            drafts: how many drafts it makes then.

        Returns:
            What `draft` would; None without anchors.
        """
        self.runner.begin()
        fixed, made = self.geometry, []
        assert fixed is None or anchors is None
        parts = self._level(rows) if fixed is None else [slice(i, i + 1) for i in range(rows.start, rows.stop)]
        chunk = chunk if fixed is None else fixed.chunks[-1]
        for part in parts:
            texts = slice(part.start - rows.start, part.stop - rows.start)
            tokens = pending[texts]
            end = max(map(len, tokens)) + (anchors is not None)
            for start in range(0, end, chunk):
                pieces = [list(t[start : start + chunk]) for t in tokens]
                read = [len(piece) for piece in pieces]
                last = anchors is not None and start + chunk >= end
                if anchors is not None and last:
                    pieces = [[*piece, anchor] for piece, anchor in zip(pieces, anchors[texts], strict=True)]
                width = max(map(len, pieces))
                token_BQ = torch.tensor([p + [0] * (width - len(p)) for p in pieces], device=self.cache.device)
                reading, anchor_B = Reading(token_BQ=token_BQ), torch.tensor(read, device=self.cache.device)
                if last and drafts:
                    reading = self._behind(token_BQ, anchor_B, drafts)
                logits = self._call(part, reading, read=read, anchor_B=anchor_B if last else None)
                made += [logits] if last else []
                self.cache.commit(part, read)
        return Proposal(_joined(made)[:, 1:], _joined(made)[:, :1]) if made else None

    def move_slots(self, rows: slice, source_BM: Tensor, target_BM: Tensor) -> None:
        """Copy a few slots within each row, as `ScratchCache.move_slots` does: a tree's accepted path to its place."""

        def call(inputs: list[Tensor]) -> list[Tensor]:
            self.cache.move_slots(rows, *inputs)
            return []

        self.runner.replay("move", rows, [source_BM, target_BM], call)

    def parts(self, rows: slice) -> list[slice]:
        """Cut rows into the passes that a fixed geometry allows: without one, a single pass."""
        return [rows] if self.geometry is None else self.geometry.parts(rows)

    def width(self, reading: Reading) -> int:
        """Return how many AR rows a pass has, fillers included: none behind a tree, which is verified once more."""
        Q, fixed = reading.token_BQ.shape[1], self.geometry
        return Q if fixed is None or reading.depth_BQ is not None else fixed.width(Q)

    def scratch(self, reading: Reading) -> int:
        """Return how many slots past a text's length the pass of a reading writes."""
        blocks = 0 if reading.stop_BS is None else reading.stop_BS.shape[1]
        return self.width(reading) + blocks * (reading.skip + reading.drafts + self._last)

    def _level(self, rows: slice) -> list[slice]:
        """Cut rows into runs of equal length."""
        lengths = self.cache.lengths
        steps = [i for i in range(rows.start + 1, rows.stop) if lengths[i] != lengths[i - 1]]
        return [slice(start, stop) for start, stop in pairwise([rows.start, *steps, rows.stop])]

    def _run(self, rows: slice, reading: Reading) -> Logits:
        """Run a pass, in as many parts as a fixed geometry asks for."""
        parts = [(part, slice(part.start - rows.start, part.stop - rows.start)) for part in self.parts(rows)]
        one = len(parts) == 1
        logits_BTV = _joined([self._call(part, reading if one else reading.rows(texts)) for part, texts in parts])
        Q, R = reading.token_BQ.shape[1], self.width(reading)
        if reading.stop_BS is None:
            return Logits(logits_BTV[:, :Q])
        B, S = reading.stop_BS.shape
        return Logits(logits_BTV[:, :Q], logits_BTV[:, R:].view(B, S, reading.drafts, -1))

    def _call(
        self, rows: slice, reading: Reading, *, read: Sequence[int] | None = None, anchor_B: Tensor | None = None
    ) -> Tensor:
        """Call the model once; returns the logits of the AR rows and of the blocks' drafts.

        `read` says how many tokens of each row's prompt the pass reads, where it reads prompts. Of such AR rows it
        gives the anchors' logits alone, where they stand, and hidden states without any.
        """
        fixed, length_B, prefill = self.geometry, self.cache.length_R[rows], read is not None
        Q = reading.token_BQ.shape[1]
        width = self.width(reading) if not prefill or fixed is None else fixed.chunk(Q)
        how: dict[str, Any] = {"mask": self._mask, "last": self._last, "width": width}
        known = None if prefill else known_layout(reading, length_B, causal=self.causal, dtype=self.model.dtype, **how)
        layout = known or lay_out(reading, length_B, **how)
        frame = self._begin(rows, layout, read, kept=Q if not prefill else int(anchor_B is not None))
        view = self._view(frame, reading, layout, chain=prefill and fixed is None)
        shown = view.masks
        assert shown is not None
        masked = reading.stop_BS is not None
        arguments: dict[str, Any] = inputs_of(self.model, layout.token_BT) if masked else {"input_ids": layout.token_BT}
        fits = self.cache.current.span <= self._last_position
        arguments |= {
            # Any tensor of four dimensions saves the model making a mask, which no layer reads: views bring their own.
            # Where those are no tensors (chains, parts on CUDA) the positions serve, an input of each pass already.
            "attention_mask": shown.full if isinstance(shown.full, Tensor) else layout.position_BT[:, None, None],
            # Fillers and drafts may stand past the context, where learned position embeddings have no row.
            "position_ids": layout.position_BT if fits else layout.position_BT.clamp_max(self._last_position),
            "past_key_values": self.cache,
            "use_cache": True,
            "view": view,
        }
        if fixed is not None:
            arguments["tile"] = fixed.span
        if not prefill:
            return self.runner.logits(arguments | {"logits_to_keep": layout.predicting}, once=False)
        if anchor_B is None:
            hidden: Tensor = self.model.base_model(**arguments).last_hidden_state
            return hidden
        drafted = layout.drafting[None].expand(len(anchor_B), -1)
        with projecting(self.model, torch.cat([anchor_B[:, None], drafted], dim=1)):
            return self.runner.logits(arguments, once=True)

    def _begin(self, rows: slice, layout: Layout, read: Sequence[int] | None, *, kept: int) -> Frame:
        """Point the cache at a pass's slots; returns what its masks are made over."""
        cache, T, prefill = self.cache, layout.token_BT.shape[1], read is not None
        lengths = cache.lengths[rows]
        end = max(lengths) + T
        cache.require(end)
        # Reading a prompt is another kernel's work, unless its keys must be those that other passes write.
        split = self._splits and (self.geometry is not None or not prefill)
        if self.geometry is not None and not (split and self.runner.captured):
            end = min(self.geometry.reach(end, prefill=prefill), cache.capacity)
        elif split or not self._splits:
            end = self.runner.reach(end)
        start = lengths[0] if not self.runner.compiled and len(set(lengths)) == 1 else None
        cache.begin(
            rows,
            layout.slot_BT,
            end=end,
            start=start,
            position_BQ=layout.position_BT,
            kept=kept,
            read=read,
            in_order=self.geometry is not None,
        )
        span = T if split else end
        return Frame(
            length_B=cache.length_R[rows], span=span, split=split, windows=self._windows, dtype=self.model.dtype
        )

    def _view(self, frame: Frame, reading: Reading, layout: Layout, *, chain: bool) -> View | FusedView:
        """Say who sees whom, and so which half of the attention each row takes; a `chain` needs no mask of its own."""
        R, start = layout.rows, self.cache.current.start
        path, block_path = paths(reading, layout) if self._hybrid else (None, None)
        if frame.split or frame.span > min(self._windows, default=frame.span):
            start = None
        if start is not None and chain and self._chains:
            seen = frame.chain(start, reading, layout, causal=self.causal)
        elif start is not None and layout.own is not None:
            seen = frame.behind(start, layout.own)
        else:
            seen = frame.dense(reading, layout, causal=self.causal)
        if reading.stop_BS is None:
            return View(name="ar", masks=seen, path=path)
        return FusedView(rows=R, masks=seen, path=path, block_path=block_path, both_ways=self._both_ways)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Put the rows of several passes together, without a copy where there is one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
