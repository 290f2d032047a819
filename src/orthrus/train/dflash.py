"""Train DFlash, DSpark or JetSpec for a frozen backbone, on answers that the backbone wrote.

One frozen pass over packed rows gives hidden states. One pass of the drafter then fills many blocks; each block sees
the text before its anchor and its own slots. Rows, anchors, masks and losses are those of a view.

Shapes: B rows, T positions, N blocks, K slots of a block, M of them predicted, C hidden size, F tapped states in a row.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from orthrus.data.packing import PackedRows
from orthrus.kernels import masks
from orthrus.model.head import output_head
from orthrus.peers import dflash_files
from orthrus.peers.dflash import DFlash, DFlashConfig
from orthrus.peers.dflash_drafter import DFlashDrafter
from orthrus.train import anchors, frozen, scoring
from orthrus.train.anchors import Blocks
from orthrus.train.batch import batch
from orthrus.train.drafter_task import DrafterTask
from orthrus.train.heldout import decoded_by, evaluated, rates
from orthrus.train.peer_sections import DFlashRecipe
from orthrus.train.prepare import Prepared
from orthrus.train.start import mask_token
from orthrus.train.step import Loss, Rows, row_generator


def drafter_of(recipe: DFlashRecipe, backbone: PreTrainedModel, *, mask: int) -> DFlash:
    """Make the untrained drafter of a recipe."""
    wanted = recipe.model
    config = DFlashConfig.of(
        backbone,
        layers=wanted.draft_layers,
        taps=wanted.taps,
        block_size=wanted.block_size,
        mask_token_id=mask,
        shift=wanted.shift,
        causal=wanted.block_attention == "causal",
        sliding_causal=wanted.block_attention == "causal",
        markov_rank=wanted.markov_rank,
        backbone=wanted.backbone,
    )
    return DFlash(config)


def filled(
    drafter: DFlash,
    backbone: PreTrainedModel,
    context_BTF: Tensor,
    token_BT: Tensor,
    document_BT: Tensor,
    position_BT: Tensor,
    blocks: Blocks,
) -> Tensor:
    """Run a drafter over all blocks of packed rows at once; returns hidden states `[B, N, K, C]`.

    Args:
        drafter: fills the blocks.
        backbone: gives the embeddings.
        context_BTF: tapped hidden states side by side.
        token_BT: the rows' tokens.
        document_BT: which document a position belongs to.
        position_BT: positions in the documents.
        blocks: where blocks start.
    """
    config, (B, N), device = drafter.config, blocks.anchor_BN.shape, token_BT.device
    token_BNK = torch.full((B, N, config.block_size), config.mask_token_id, device=device)
    token_BNK[:, :, 0] = token_BT.gather(1, blocks.anchor_BN)
    position_BN = position_BT.gather(1, blocks.anchor_BN)
    position_BM = (position_BN[:, :, None] + torch.arange(config.block_size, device=device)).flatten(1)
    position = torch.cat([position_BT, position_BM], 1)
    full, sliding = (
        _masks(drafter, document_BT, blocks, position_BM, position, causal=causal)
        for causal in (config.causal, config.sliding_causal)
    )
    dtype = drafter.body.dtype
    embedded_BMC = drafter.embedded(backbone, token_BNK.flatten(1)).to(dtype)
    hidden_BMC: Tensor = drafter(embedded_BMC, context_BTF.to(dtype), position, full, sliding)
    return hidden_BMC.view(B, N, config.block_size, -1)


def _masks(
    drafter: DFlash, document_BT: Tensor, blocks: Blocks, query_BM: Tensor, key: Tensor, *, causal: bool
) -> masks.LayerMasks:
    block = drafter.config.block_size
    allowed = masks.training(document_BT, blocks.anchor_BN, blocks.valid_BN, block=block, causal=causal)
    positions = {"query_position_BQ": query_BM, "key_position_BS": key}
    if key.device.type == "cuda":
        return masks.block_masks(allowed, windows=drafter.windows, **positions)
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else drafter.body.dtype
    return masks.in_blocks(allowed, block=block, windows=drafter.windows, dtype=dtype, trained=True, **positions)


class DFlashTask(DrafterTask[DFlash]):
    """The loop's task for a recipe of the kind "dflash"; rows and answers are made as a view's."""

    def __init__(self, recipe: DFlashRecipe, *, data: Prepared | None = None) -> None:
        super().__init__(recipe, data)
        self._recipe = recipe
        mask = mask_token(recipe.model.mask_token, self._tokenizer, backbone=recipe.model.backbone)
        mask = self._backbone.get_input_embeddings().weight.shape[0] - 1 if mask is None else mask
        self.model = drafter_of(recipe, self._backbone, mask=mask).to(self._backbone.device)
        self._tokens = None
        if recipe.objective.vocabulary == "answers":
            self._tokens = scoring.tokens_of_answers(self._data.rows, self.model.markov, self._backbone.device)

    def loss(self, rows: Rows, step: int) -> Loss:
        """The weighted loss of the drafts of freshly drawn blocks."""
        return self._loss(self._data.rows, rows, step=step)

    def evaluate(self, step: int) -> dict[str, float]:
        """Loss and agreement per held-out source, and what real decoding of its prompts gives."""
        drafter, most = DFlashDrafter(self._backbone, copy.deepcopy(self.model)), self._recipe.responses
        return evaluated(
            self._data,
            lambda packed, rows: self._loss(packed, rows, step=-1),
            lambda prompts: rates(decoded_by(self._backbone, prompts, most.eval_tokens, drafter)),
            prompts=most.eval_prompts,
        )

    def save(self, path: Path) -> None:
        """Write the drafter in the published layout, in the run's dtype."""
        dflash_files.save(copy.deepcopy(self.model).to(self._backbone.dtype), path)

    def _loss(self, packed: PackedRows, index: Rows, *, step: int) -> Loss:
        goal, config = self._recipe.objective, self.model.config
        document_BT, position_BT, token_BT, answer_BT = batch(packed, index, self._backbone.device)
        blocks = anchors.sample(
            document_BT,
            answer_BT,
            blocks=goal.blocks_per_row,
            block_length=config.proposals + 1,
            blind_share=0.0,
            generators=[row_generator(self._recipe.run.seed, step, int(row)) for row in index],
        )
        read = frozen.read(self._backbone, token_BT, document_BT, position_BT, config.taps)
        student_BNKC = filled(
            self.model, self._backbone, torch.cat(read.tapped, -1), token_BT, document_BT, position_BT, blocks
        )
        tokens = self._tokens if step >= 0 else None  # held-out answers hold others too
        return scoring.score(
            goal,
            student_BNKC[:, :, config.block_size - config.proposals :],
            read.hidden_BTC,
            token_BT,
            blocks,
            head=output_head(self._backbone, tokens),
            markov=self.model.markov,
            tokens=tokens,
        )
