"""A pass over the decoding cache as a function of what may differ between two of its kind, for `orthrus.model.traced`.

Shapes: B texts, T rows of the pass.
"""

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from orthrus.kernels.attention import FEW, uses_own
from orthrus.kernels.masks import LayerMasks
from orthrus.kernels.products import pays
from orthrus.model.cache import KeyStore, PassSlots, ScratchCache


class Call:
    """A pass taken apart: its kind (`key`), what is handed in, and how it is made.

    `kept` are terms of recurrent states that it leaves; None where their buffers have to grow first.
    """

    def __init__(self, model: PreTrainedModel, arguments: dict[str, Any]) -> None:
        self._model = model
        self._view, self._cache = arguments["view"], arguments["past_key_values"]
        self._name = "input_ids" if "input_ids" in arguments else "inputs_embeds"
        own = (self._name, "attention_mask", "position_ids", "past_key_values", "view")
        self._rest = {name: value for name, value in arguments.items() if name not in own}
        token_BT, keep, current = arguments[self._name], self._rest["logits_to_keep"], self._cache.current
        (B, T), shown = token_BT.shape[:2], self._view.masks
        self._windows = sorted(shown.windowed)
        picked = [keep] if isinstance(keep, Tensor) else []
        self._paths = [name for name in ("path", "block_path") if getattr(self._view, name, None) is not None]
        self.kept: int | None = self._cache.states.kept
        self._start = current.start if B == 1 else None  # several texts hardly ever stand level
        # Recordings read sizes anew, and no numbers: these are passed as sizes, of nothing.
        reach = torch.empty(current.span, current.first, self._start or 0, 0)
        masks: list[Any] = [shown.of(window).expand(B, -1, -1, -1) for window in (None, *self._windows)]
        stores: list[KeyStore] = list(self._cache.stores.values())
        self.inputs: tuple[Any, ...] = (
            [token_BT, arguments["position_ids"], current.slot_BQ, current.row_B1, reach]
            + [getattr(self._view, name) for name in self._paths]
            + picked,
            masks,
            [store.keys for store in stores] + [store.values for store in stores] + self._cache.states.buffers(),
        )
        rows = getattr(self._view, "rows", 0)
        self._grows = T - rows > 1 and "tile" not in self._rest  # where the view's own row is one it has to stay one
        way = self._way(T, current.span)
        by_head = way[1]
        self._joins = B > 1 and not by_head
        self._all_kept = self.kept == T
        self.key = (
            (type(self._view), rows, self._name),
            0 if self._grows else T,
            (B > 1) if not by_head else B,
            way,
            tuple(self._windows),
            tuple(mask.shape[2] == 1 for mask in masks),
            tuple(len(index) == 1 for index in picked),
            (*self._paths, None if self._all_kept else self.kept),
            tuple((name, value) for name, value in self._rest.items() if not isinstance(value, Tensor)),
            (tuple(self._cache.stores), stores[0].keys.dtype, self._start is None),
            model.config._attn_implementation,
        )

    @property
    def has_room(self) -> bool:
        """Whether attention computes the pass over `others` in the same way."""
        rows, span, more = self._cache.current.slot_BQ.shape[1], self._cache.current.span, 1 + self._grows
        return self._way(rows, span)[:2] == self._way(rows + self._grows, span + more)[:2]

    def _way(self, rows: int, span: int) -> tuple[bool, bool, bool]:
        """Tell how a pass is computed.

        Whether attention is our own operator's, else whether it makes a product for each head; and whether rows are
        few, which packed layers may multiply otherwise.
        """
        tiled = "tile" in self._rest
        own = uses_own(self._model, rows, tiled=tiled)
        return own, not own and not tiled and pays(self.inputs[2][0], rows, span), rows <= FEW

    def others(self) -> tuple[Any, ...]:
        """Return inputs of other sizes, over a cache of their own: other tokens, which see all slots before them.

        They stand a slot and a row of the cache further on, and are a row more and, where there are several, a text.
        """
        (token_BT, position_BT, slot_BT, row_B1, reach, *more), masks, buffers = self.inputs
        paths, picked = more[: len(self._paths)], more[len(self._paths) :]
        grows, B, (span, first, start, _) = int(self._grows), len(row_B1), reach.shape
        texts = torch.arange(B + self._joins).clamp_max(B - 1)  # one of them twice
        rows = first + torch.cat([texts[:1], texts])
        token_BT = (
            (token_BT + 1) % self._model.get_input_embeddings().weight.shape[0]
            if self._name == "input_ids"
            else token_BT.flip(1)
        )
        tokens = [torch.cat([x, x[:, -1:] + 1], 1) if grows else x for x in (position_BT, slot_BT + 1)]
        token_BT = torch.cat([token_BT, token_BT[:, :1]], 1) if grows else token_BT
        if grows:
            picked = [torch.cat([index, index.new_tensor([token_BT.shape[1] - 1])]) for index in picked]
            paths = [_one_more(_one_more(path, 2), 1, value=True) for path in paths]
        wider = [pad(mask, (1 + grows, 0, 0, grows))[texts] for mask in masks]
        stored = 2 * len(self._cache.stores)
        kinds = [(index < stored // 2, buffer.shape, buffer.dtype) for index, buffer in enumerate(buffers[:stored])]
        # One cache for all layers of a shape, which are called in turn; slots lie as they do in the cache.
        different = {kind: buffer.transpose(1, 2) for kind, buffer in zip(kinds, buffers, strict=False)}
        slots = {k: pad(x[rows, :, :span], (0, 0, 0, 1 + grows)).transpose(1, 2) for k, x in different.items()}
        terms = {id(buffer) for buffer in self._cache.states.term_buffers()} if grows else set()
        states = [_one_more(x[rows], 1) if id(x) in terms else x[rows] for x in buffers[stored:]]
        reach = torch.empty(span + 1 + grows, 1, start + (self._start is not None), 0)
        row_B1 = torch.arange(1, len(rows))[:, None]
        given = [x[texts] for x in (token_BT, *tokens)] + [row_B1, reach, *(path[texts] for path in paths), *picked]
        return (given, wider, [slots[kind] for kind in kinds] + states)

    def run(self, given: list[Tensor], masks: list[Tensor], buffers: list[Tensor]) -> Tensor:
        token_BT, position_BT, slot_BT, row_B1, reach, *more = given
        paths, picked = more[: len(self._paths)], more[len(self._paths) :]
        cache: ScratchCache = copy.copy(self._cache)
        cache.stores = {layer: copy.copy(store) for layer, store in cache.stores.items()}
        count = len(cache.stores)
        for store, keys, values in zip(cache.stores.values(), buffers, buffers[count:], strict=False):
            store.keys, store.values = keys, values
        assert self.kept is not None
        kept = token_BT.shape[1] if self._all_kept else self.kept
        first = reach.shape[1]
        last = first + token_BT.shape[0]
        cache.states = cache.states.over(buffers[2 * count :], slice(first, last), kept)
        cache.current = PassSlots(
            first=first,
            last=last,
            row_B1=row_B1,
            slot_BQ=slot_BT,
            start=None if self._start is None else reach.shape[2],
            span=reach.shape[0],
        )
        shown = LayerMasks(full=masks[0], windowed=dict(zip(self._windows, masks[1:], strict=True)))
        logits: Tensor = self._model(
            attention_mask=masks[0],
            position_ids=position_BT,
            past_key_values=cache,
            view=dataclasses.replace(self._view, masks=shown, **dict(zip(self._paths, paths, strict=True))),
            **self._rest | {self._name: token_BT} | ({"logits_to_keep": picked[0]} if picked else {}),
        ).logits
        return logits


def _one_more(tensor: Tensor, dim: int, *, value: bool = False) -> Tensor:
    """Return a tensor with one more entry along a dimension, all of this value."""
    shape = (*tensor.shape[:dim], 1, *tensor.shape[dim + 1 :])
    return torch.cat([tensor, tensor.new_full(shape, value)], dim=dim)
