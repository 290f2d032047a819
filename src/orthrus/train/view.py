"""Training the diffusion view of a frozen backbone, on answers that the backbone wrote itself (paper, section 3.3).

Shapes: B rows, T positions, N blocks, K block length, J = K - 1 predicted slots, C hidden size.
"""

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from orthrus.checkpoints.files import save
from orthrus.data.packing import PackedRows
from orthrus.decode.drafters import ViewDrafter
from orthrus.decode.passes import Passes, Proposal
from orthrus.kernels import masks
from orthrus.model.attach import layers_of
from orthrus.model.dual import View
from orthrus.model.head import output_head
from orthrus.model.markov import markov_of
from orthrus.model.mask_row import inputs_of, mask_of
from orthrus.train import anchors, frozen, scoring
from orthrus.train.anchors import Blocks
from orthrus.train.answered import AnsweredTask
from orthrus.train.prepare import Prepared
from orthrus.train.recurrence import OverBlocks, OverRows, replaced
from orthrus.train.sections import ViewRecipe
from orthrus.train.sharding import shard
from orthrus.train.start import in_one_dtype, load_backbone
from orthrus.train.step import Loss, Rows, batch, row_generator


class TeacherKeys(frozen.PackedKeys):
    """Keys and values of the frozen pass, kept for the block pass; of recurrent layers, what blocks start from."""

    def __init__(self, document_BT: Tensor) -> None:
        super().__init__(document_BT)
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._read: dict[int, OverRows] = {}
        self._anchor_BN: Tensor | None = None

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
            self._read[layer_idx] = super().recurrence(layer_idx)
            return self._read[layer_idx]
        return OverBlocks(self._read[layer_idx], self._anchor_BN)


class Twice(ViewDrafter):
    """Fix the first half of each block's tokens, and draft the rest in a second pass that is shown them."""

    ahead = False

    def propose(self, passes: Passes, rows: slice, anchor_B: Tensor, drafts: int, states: Sequence[Any]) -> Proposal:
        """Return the backbone's own token after the anchor, and the drafts of both passes."""
        made = passes.draft(rows, anchor_B, drafts - 1)
        assert made.first_B1V is not None
        half = max(drafts // 2, 1)
        shown_BJ = torch.cat([made.first_B1V, made.logits_BMV], dim=1)[:, :half].argmax(-1)
        rest_BMV = passes.draft(rows, anchor_B, drafts - half, shown_BJ=shown_BJ).logits_BMV
        return Proposal(torch.cat([made.logits_BMV[:, : half - 1], rest_BMV], dim=1), made.first_B1V, passes=2)


class ViewTask(AnsweredTask[ViewRecipe]):
    """The loop's task for a view recipe; `orthrus.train.prepare` makes its rows, unless they are given."""

    model: PreTrainedModel

    def __init__(self, recipe: ViewRecipe, *, data: Prepared | None = None) -> None:
        super().__init__(recipe, data=data)
        self.model = self._backbone
        self._causal = recipe.model.block_attention == "causal"
        self._both_ways = recipe.model.block_recurrence == "bidirectional"
        self._behind = recipe.model.anchor == "backbone"
        self._layers = layers_of(self.model) if recipe.model.gradient_checkpointing else []
        self._softmax(recipe.objective.vocabulary, markov_of(self.model))
        if recipe.run.sharding != "none":
            shard(self.model, device=self._device, processes=self._ranks.count)

    def save(self, path: Path) -> None:
        """Write the view as an adapter, in the run's dtype; the backbone is named, not copied."""
        with in_one_dtype(self.model):
            save(self.model, path, format="adapter")

    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        recipe = self._recipe
        # A device need not hold a model that is shared out before its first pass.
        waits = recipe.run.sharding != "none" and recipe.answers.by != "backbone"
        return load_backbone(recipe, torch.device("cpu") if waits else self._device)

    def _decoded(self, prompts: list[list[int]]) -> dict[str, float]:
        goal, figures = self._recipe.objective, self._drafted(prompts)
        if goal.blind_anchor_share > 0:
            figures |= self._drafted(prompts, plan="onepass", prefix="onepass_")
        if goal.shown_share > 0:
            figures |= self._drafted(prompts, Twice(markov_of(self.model)), prefix="two_steps_")
        return figures

    def _block_length(self, step: int) -> int:
        if step < 0:
            return self._recipe.model.block_size
        lengths = self._recipe.objective.block_lengths
        return random.Random(f"{self._recipe.run.seed}/{step}").choice(lengths)

    def _loss(self, packed: PackedRows, index: Rows, step: int) -> Loss:
        self.model.eval()
        goal, block_length = self._recipe.objective, self._block_length(step)
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
        keys = TeacherKeys(document_BT)
        teacher_BTC = frozen.read(self.model, token_BT, document_BT, position_BT, keys=keys).hidden_BTC
        # The last slot of a block predicts nothing. Masks behind the backbone's row have none such, and in a causal
        # block no other slot sees it.
        unseen = self._behind or (self._causal and not self._both_ways)
        computed = block_length - (1 if unseen else 0)
        student_BNKC = self._student(keys, token_BT, document_BT, position_BT, blocks, computed)
        tokens = self._tokens(step)
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
        layer_masks = frozen.masks_of(
            self.model, allowed, position_BM, torch.cat([position_BT, position_BM], 1), block=K
        )
        view = View(name="diffusion", masks=layer_masks, both_ways=self._both_ways)
        with recomputed(self._layers if torch.is_grad_enabled() else ()):
            inputs = inputs_of(self.model, token_BNK.flatten(1))
            hidden_BMC = frozen.run(self.model, inputs, position_BM, keys, view)
        return hidden_BMC.view(B, N, K, -1)


def recomputed(layers: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Let the forward passes in this block be computed again in the backward pass, layer by layer."""

    def again(layer: nn.Module) -> partial[Any]:
        return partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)

    return replaced(layers, again)
