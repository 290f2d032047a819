"""Training the diffusion view of a frozen backbone, on answers that the backbone wrote itself.

One frozen AR pass over packed rows gives keys, values and hidden states; many blocks then go through the twin in one
pass over those keys (paper, section 3.3).

Shapes: B rows, T positions, N blocks, K block length, J = K - 1 predicted slots, C hidden size.
"""

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orthrus.checkpoints.files import save
from orthrus.checkpoints.load import device_of
from orthrus.data.packing import PackedRows
from orthrus.data.shards import SHARD
from orthrus.kernels import attention, masks
from orthrus.model.attach import layers_of, windows_of
from orthrus.model.dual import View, ViewName
from orthrus.model.head import output_head
from orthrus.model.markov import markov_of
from orthrus.model.mask_row import inputs_of, mask_of
from orthrus.train import anchors, scoring
from orthrus.train.anchors import Blocks
from orthrus.train.batch import batch
from orthrus.train.heldout import decoded_for_real, evaluated, rates
from orthrus.train.prepare import Prepared, prepare
from orthrus.train.ranks import Ranks
from orthrus.train.recompute import recomputed
from orthrus.train.recurrence import OverBlocks, OverRows
from orthrus.train.sections import ViewRecipe
from orthrus.train.sharding import shard
from orthrus.train.start import in_one_dtype, load_backbone
from orthrus.train.step import Loss, Rows, row_generator


class TeacherKeys:
    """Keys and values of the frozen pass, kept for the block pass; stands in for a cache by duck typing.

    Of recurrent layers it keeps what blocks need to start from any token (`orthrus.train.recurrence`).
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._read: dict[int, OverRows] = {}
        self._anchor_BN: Tensor | None = None
        self.document_BT = torch.empty(0)

    def start_blocks(self, anchor_BN: Tensor) -> None:
        """End the frozen pass: what comes now are blocks that start at these anchors."""
        self._anchor_BN = anchor_BN

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep what the frozen pass writes; put it before what the block pass brings."""
        if self._anchor_BN is None:
            self._kept[layer_idx] = (key, value)
            return key, value
        kept_key, kept_value = self._kept[layer_idx]
        return torch.cat([kept_key, key], dim=2), torch.cat([kept_value, value], dim=2)

    def recurrence(self, layer_idx: int) -> OverRows | OverBlocks:
        """Return what a recurrent layer reads packed rows by, or the blocks."""
        if self._anchor_BN is None:
            self._read[layer_idx] = OverRows(self.document_BT)
            return self._read[layer_idx]
        return OverBlocks(self._read[layer_idx], self._anchor_BN)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: both passes are given their positions."""
        return 0


class ViewTask:
    """The loop's task for a view recipe; `orthrus.train.prepare` makes its rows, unless they are given."""

    def __init__(self, recipe: ViewRecipe, *, data: Prepared | None = None) -> None:
        self._recipe = recipe
        ranks = Ranks(recipe.run.device)  # before the device is touched: it gives each process its own
        self._device = device_of(recipe.run.device)
        if recipe.run.threads is not None:
            torch.set_num_threads(recipe.run.threads)
        sharded = recipe.run.sharding != "none"
        # A device need not hold a model that is shared out before its first pass.
        home = torch.device("cpu") if sharded and recipe.answers.by != "backbone" else self._device
        self.model, self._tokenizer = load_backbone(recipe, home)
        self._causal = recipe.model.block_attention == "causal"
        self._both_ways = recipe.model.block_recurrence == "bidirectional"
        self._behind = recipe.model.anchor == "backbone"
        self._windows = windows_of(self.model)
        self._layers = layers_of(self.model) if recipe.model.gradient_checkpointing else []
        self._data = data or prepare(recipe, self._tokenizer, self.model, ranks=ranks, on_progress=_report)
        self.row_count = len(self._data.rows)
        self._answer_tokens = None
        if recipe.objective.vocabulary == "answers":
            self._answer_tokens = scoring.tokens_of_answers(self._data.rows, markov_of(self.model), self._device)
        if sharded:
            shard(self.model, device=self._device, processes=ranks.count)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The twin's parameters."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def loss(self, rows: Rows, step: int) -> Loss:
        """The weighted loss of the masked slots of freshly drawn blocks."""
        self.model.eval()
        return self._loss(self._data.rows, rows, block_length=self._block_length(step), step=step)

    def evaluate(self, step: int) -> dict[str, float]:
        """Loss and agreement per held-out source, and what real decoding of its prompts gives."""
        block = self._recipe.model.block_size
        return evaluated(
            self._data,
            lambda packed, rows: self._loss(packed, rows, block_length=block, step=-1),
            self._decoded,
            prompts=self._recipe.responses.eval_prompts,
        )

    def save(self, path: Path) -> None:
        """Write the view as an adapter, in the run's dtype; the backbone is named, not copied."""
        with in_one_dtype(self.model):
            save(self.model, path, format="adapter")

    def _decoded(self, prompts: list[list[int]]) -> dict[str, float]:
        most, goal = self._recipe.responses.eval_tokens, self._recipe.objective
        figures = rates(decoded_for_real(self.model, prompts, most))
        if goal.blind_anchor_share > 0:
            figures |= rates(decoded_for_real(self.model, prompts, most, onepass=True), "onepass_")
        if goal.shown_share > 0:
            figures |= rates(decoded_for_real(self.model, prompts, most, steps=2), "two_steps_")
        return figures

    def _block_length(self, step: int) -> int:
        lengths = self._recipe.objective.block_lengths
        return random.Random(f"{self._recipe.run.seed}/{step}").choice(lengths)

    def _loss(self, packed: PackedRows, index: Rows, *, block_length: int, step: int) -> Loss:
        goal = self._recipe.objective
        document_BT, position_BT, token_BT, answer_BT = batch(packed, index, self._device)
        blocks = anchors.sample(
            document_BT,
            answer_BT,
            blocks=goal.blocks_per_row * self._recipe.model.block_size // block_length,
            block_length=block_length,
            blind_share=1.0 if self._behind else goal.blind_anchor_share,
            shown_share=goal.shown_share,
            inside=self._behind,
            generators=[row_generator(self._recipe.run.seed, step, int(row)) for row in index],
        )
        keys = TeacherKeys()
        with torch.no_grad():
            teacher_BTC = self._teacher(keys, token_BT, document_BT, position_BT)
        # The last slot of a block predicts nothing. Masks behind the backbone's row have none such, and in a causal
        # block no other slot sees it.
        unseen = self._behind or (self._causal and not self._both_ways)
        computed = block_length - (1 if unseen else 0)
        student_BNKC = self._student(keys, token_BT, document_BT, position_BT, blocks, computed)
        tokens = self._answer_tokens if step >= 0 else None  # held-out answers hold others too
        return scoring.score(
            goal,
            student_BNKC[:, :, : block_length - 1],
            teacher_BTC,
            token_BT,
            blocks,
            head=output_head(self.model, tokens),
            markov=markov_of(self.model),
            tokens=tokens,
            apart=not self._behind,
        )

    def _teacher(self, keys: TeacherKeys, token_BT: Tensor, document_BT: Tensor, position_BT: Tensor) -> Tensor:
        """Run the frozen view over packed rows, keeping its keys; returns hidden states `[B, T, C]`."""
        keys.document_BT = document_BT
        allowed = masks.packed(document_BT)
        return self._forward(keys, token_BT, position_BT, position_BT, allowed, view="ar")

    def _student(
        self,
        keys: TeacherKeys,
        token_BT: Tensor,
        document_BT: Tensor,
        position_BT: Tensor,
        blocks: Blocks,
        K: int,
    ) -> Tensor:
        """Run the twin over all blocks at once; returns hidden states `[B, N, K, C]`."""
        B, N = blocks.anchor_BN.shape
        mask = mask_of(self.model)
        token_BNK = torch.full((B, N, K), mask, device=self._device)
        token_BNK[:, :, 0] = torch.where(blocks.blind_BN, mask, token_BT.gather(1, blocks.anchor_BN))
        text_BNJ = token_BT.gather(1, blocks.target_BNJ.flatten(1)).view_as(blocks.target_BNJ)[:, :, : K - 1]
        shown_BNJ = torch.arange(K - 1, device=self._device) < blocks.shown_BN[:, :, None]
        token_BNK[:, :, 1:] = torch.where(shown_BNJ, text_BNJ, mask)
        position_BN = position_BT.gather(1, blocks.anchor_BN)
        position_BM = (position_BN[:, :, None] + torch.arange(K, device=self._device)).flatten(1)
        allowed = masks.training(document_BT, blocks.anchor_BN, blocks.valid_BN, block=K, causal=self._causal)
        keys.start_blocks(blocks.anchor_BN)
        with recomputed(self._layers if torch.is_grad_enabled() else ()):
            hidden_BMC = self._forward(
                keys,
                token_BNK.flatten(1),
                position_BM,
                torch.cat([position_BT, position_BM], 1),
                allowed,
                view="diffusion",
                block=K,
            )
        return hidden_BMC.view(B, N, K, -1)

    def _forward(
        self,
        keys: TeacherKeys,
        tokens: Tensor,
        query: Tensor,
        key: Tensor,
        allowed: Tensor,
        *,
        view: ViewName,
        block: int = 1,
    ) -> Tensor:
        layer_masks = self._masks(query, key, allowed, block)
        full = layer_masks.full
        hidden: Tensor = self.model.base_model(
            **({"input_ids": tokens} if view == "ar" else inputs_of(self.model, tokens)),
            position_ids=query,
            # The model's own mask, which a view's replaces: any mask that is one already saves it making its own.
            attention_mask=full.groups[0].additive[None, None] if isinstance(full, masks.InBlocks) else full,
            past_key_values=keys,
            use_cache=True,
            view=View(name=view, masks=layer_masks, both_ways=self._both_ways and view == "diffusion"),
        ).last_hidden_state
        return hidden

    def _masks(self, query: Tensor, key: Tensor, allowed: Tensor, block: int) -> masks.LayerMasks:
        """Make a pass's masks; `block` is the length of its blocks, 1 for the backbone's own pass."""
        cast = torch.get_autocast_dtype(self._device.type) if torch.is_autocast_enabled(self._device.type) else None
        dtype = cast or self.model.dtype
        positions = {"query_position_BQ": query, "key_position_BS": key}
        if self._device.type == "cuda":
            return masks.block_masks(allowed, windows=self._windows, **positions)
        # FlexAttention has no backward pass on CPUs.
        if self.model.config._attn_implementation != attention.NAME:
            return masks.layer_masks(allowed, windows=self._windows, dtype=dtype, **positions)
        return masks.in_blocks(allowed, block=block, windows=self._windows, dtype=dtype, trained=False, **positions)


def _report(name: str, done: int, whole: int) -> None:
    if done % SHARD == 0 or done == whole:
        print(f"{name}: {done} of {whole} prompts answered", flush=True)
