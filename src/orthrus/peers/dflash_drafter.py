"""DFlash in the engine: one pass of the drafter fills a block.

For each token that the backbone reads, the drafter's layers write keys and values into further layers of the engine's
cache. Shapes: B rows, Q tokens read, K slots of a block, M drafts, C hidden size, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from orthrus.checkpoints.load import locate
from orthrus.decode.drafters import Drafter
from orthrus.decode.passes import Passes
from orthrus.errors import ConfigError
from orthrus.kernels import masks
from orthrus.model.attach import layers_of
from orthrus.model.cache import CachePart, ScratchCache
from orthrus.model.twin import in_dtype
from orthrus.peers.dflash import DFlash
from orthrus.peers.dflash_files import read


class DFlashDrafter(Drafter):
    """Draft with DFlash, DSpark or JetSpec.

    Raises ConfigError: the backbone has other layers, another hidden size or another vocabulary.
    """

    name = "dflash"

    def __init__(self, model: PreTrainedModel, drafter: DFlash) -> None:
        text = model.config.get_text_config()
        layers, config = len(layers_of(model)), drafter.config
        if max(config.taps) >= layers or config.shape.hidden_size != text.hidden_size:
            raise ConfigError(
                f"a drafter that reads layers {list(config.taps)} of size {config.shape.hidden_size} needs a backbone "
                f"that has them, found {layers} layers of size {text.hidden_size}: it belongs to another"
            )
        rows = model.get_input_embeddings().weight.shape[0]
        narrow = drafter.markov is not None or drafter.vocabulary is not None
        if config.mask_token_id >= rows or (narrow and config.shape.vocab_size != rows):
            raise ConfigError(
                f"a drafter of {config.shape.vocab_size} tokens with mask {config.mask_token_id} needs a backbone of "
                f"as many, found {rows}: it belongs to another"
            )
        self.drafter = in_dtype(drafter, model.dtype).to(model.device).requires_grad_(False).eval()
        self.taps = config.taps
        self.proposals = config.proposals
        self.markov = drafter.markov
        self._first = layers

    def read(self, cache: ScratchCache, hidden: Sequence[Tensor]) -> None:
        """Keep keys and values of the tokens of a pass."""
        Q, position_BT = hidden[0].shape[1], cache.current.position_BQ
        assert position_BT is not None
        for layer, (key, value) in enumerate(self.drafter.context(torch.cat(list(hidden), -1), position_BT[:, :Q])):
            cache.update(key, value, self._first + layer, columns=slice(0, Q))

    def propose(self, passes: Passes, rows: slice, anchor_B: Tensor, drafts: int, states: Sequence[Any]) -> Tensor:
        """Return draft logits `[B, M, V]` of one pass over the anchors and the masks."""
        cache, config = passes.cache, self.drafter.config
        lengths, length_B = cache.lengths[rows], cache.length_R[rows]
        K = drafts + (not config.shift)
        token_BK = torch.full((len(anchor_B), K), config.mask_token_id, device=anchor_B.device)
        token_BK[:, 0] = anchor_B
        slot_BK = length_B[:, None] + torch.arange(K, device=anchor_B.device)
        end = max(lengths) + K
        start = lengths[0] if len(set(lengths)) == 1 else None
        cache.begin(rows, slot_BK, end=end, start=start, position_BQ=slot_BK)
        full, sliding = (self._masks(slot_BK, end, causal=causal) for causal in (config.causal, config.sliding_causal))
        embedded_BKC = self.drafter.embedded(passes.model, token_BK).to(passes.model.dtype)
        nothing_B0F = embedded_BKC.new_empty(len(anchor_B), 0, len(self.taps) * embedded_BKC.shape[2])
        hidden_BKC = self.drafter(embedded_BKC, nothing_B0F, slot_BK, full, sliding, CachePart(cache, self._first))
        return self.drafter.logits(passes.model, hidden_BKC[:, K - drafts :])

    def _masks(self, slot_BK: Tensor, end: int, *, causal: bool) -> masks.LayerMasks:
        """Let every slot see the text and its whole block, or with `causal` its block up to itself."""
        seen_BKS = masks.up_to(slot_BK if causal else slot_BK[:, -1:].expand_as(slot_BK), span=end)
        return masks.layer_masks(
            seen_BKS,
            query_position_BQ=slot_BK,
            key_position_BS=torch.arange(end, device=slot_BK.device)[None],
            windows=self.drafter.windows,
            dtype=self.drafter.body.dtype,
        )


def load(source: str, model: PreTrainedModel) -> DFlashDrafter:
    """Load a drafter for a dual-view model from a directory or the Hub.

    Raises CheckpointError: as `orthrus.peers.dflash_files.read`; ConfigError: a drafter of another backbone's shape.
    """
    return DFlashDrafter(model, read(Path(locate(source))))
