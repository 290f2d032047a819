"""A small causal language model that drafts for a larger one with the same tokenizer.

Each of its layers writes keys into a further layer of the engine's cache, where they move with the rows.

Shapes: B rows, W tokens of a window, M drafts, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from orthrus.checkpoints.load import backbone_with_tokenizer, tokenizer_of
from orthrus.decode.drafters import Drafter
from orthrus.decode.passes import Passes, Proposal
from orthrus.decode.rows import Row
from orthrus.errors import ConfigError, UnsupportedModel
from orthrus.kernels import masks
from orthrus.model.attach import attach, detach, is_hybrid, layers_of, windows_of
from orthrus.model.cache import CachePart, ScratchCache
from orthrus.model.config import OrthrusConfig
from orthrus.model.dual import View
from orthrus.model.head import output_head
from orthrus.model.twin import in_dtype
from orthrus.peers.serial import Reader, Window, unread

CHUNK = 512
"""Most tokens of a prompt that one pass reads."""


class DraftModel(Drafter):
    """Draft token after token with a small model, which gets a view without twins; at most `proposals` in a row.

    Raises UnsupportedModel: the small model's layers keep recurrent states.
    """

    name = "draft"

    def __init__(self, model: PreTrainedModel, small: PreTrainedModel, *, proposals: int = 15) -> None:
        self.small = attach(small, OrthrusConfig(layers=()), attn_implementation="orthrus").eval()
        if is_hybrid(self.small):
            detach(small)
            raise UnsupportedModel(
                f"a draft model needs attention in every layer, found {type(small).__name__}, whose layers keep "
                "recurrent states: draft with another"
            )
        self.proposals = proposals
        self._windows = windows_of(self.small)
        self._head = output_head(self.small)
        self._first = len(layers_of(model))
        self._rows = small.get_input_embeddings().weight.shape[0]
        self._vocabulary = model.get_input_embeddings().weight.shape[0]

    def reset(self, row: Row) -> Reader:
        """Return the state of a new row, for which the small model has no keys yet."""
        return Reader(row)

    def propose(self, passes: Passes, rows: slice, anchor_B: Tensor, drafts: int, states: Sequence[Reader]) -> Proposal:
        """Return logits of a chain, each draft the likeliest token after those before it."""
        cache = passes.cache
        parts = unread(cache, rows, states).parts(CHUNK)
        for part in parts:
            logits_B1V = self._run(cache, rows, part)
        out = [logits_B1V]
        for _ in range(1, drafts):
            slot_B1 = parts[-1].slot_BW[:, -1:] + len(out)
            out.append(self._run(cache, rows, Window(out[-1].argmax(-1), slot_B1)))
        return Proposal(torch.cat(out, dim=1), passes=len(parts) + drafts - 1)

    def _run(self, cache: ScratchCache, rows: slice, window: Window) -> Tensor:
        """Read tokens at their slots; returns logits `[B, 1, V]` of what follows the last, in the large vocabulary."""
        slot_BW, end = window.slot_BW, int(window.slot_BW[:, -1].max()) + 1
        cache.begin(rows, slot_BW, end=end)
        seen = masks.layer_masks(
            masks.up_to(slot_BW, span=end),
            query_position_BQ=slot_BW,
            key_position_BS=torch.arange(end, device=slot_BW.device)[None],
            windows=self._windows,
            dtype=self.small.dtype,
        )
        hidden_BWC: Tensor = self.small.base_model(
            input_ids=window.token_BW.clamp_max(self._rows - 1),  # padding of the large vocabulary
            position_ids=slot_BW,
            attention_mask=seen.full,
            past_key_values=CachePart(cache, self._first),
            use_cache=True,
            view=View(name="ar", masks=seen),
        ).last_hidden_state
        logits_B1V = self._head(hidden_BWC[:, -1:])[..., : self._vocabulary]
        missing = self._vocabulary - logits_B1V.shape[-1]
        return torch.nn.functional.pad(logits_B1V, (0, missing), value=torch.finfo(logits_B1V.dtype).min)


def load(source: str, model: PreTrainedModel) -> DraftModel:
    """Load a small model to draft for a dual-view model, from a directory, the Hub or a bundled name.

    Raises CheckpointError: nothing there; ConfigError: it has another tokenizer, or the model does not name its own.
    """
    other = model.name_or_path
    if not other:
        raise ConfigError(
            "a draft model needs the large model's tokenizer, found a model without name_or_path: set "
            "model.name_or_path to a folder or Hub id that holds it"
        )
    small, tokenizer = backbone_with_tokenizer(source)
    if tokenizer_of(other).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(f"a draft model with the tokenizer of {other} is required, found another in {source}")
    return DraftModel(model, in_dtype(small, model.dtype).to(model.device))
