"""Train DFlash, DSpark or JetSpec for a frozen backbone, on answers that the backbone wrote, as a view is trained.

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
from orthrus.model.twin import in_dtype
from orthrus.peers import dflash_files
from orthrus.peers.dflash import DFlash, DFlashConfig
from orthrus.peers.dflash_drafter import DFlashDrafter
from orthrus.train import anchors, frozen, scoring
from orthrus.train.anchors import Blocks
from orthrus.train.answered import AnsweredTask
from orthrus.train.peer_sections import DFlashRecipe
from orthrus.train.prepare import Prepared
from orthrus.train.start import mask_token
from orthrus.train.step import Loss, Rows, batch, row_generator


def drafter_of(recipe: DFlashRecipe, backbone: PreTrainedModel, *, mask: int) -> DFlash:
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

    `context_BTF` are tapped hidden states side by side; `backbone` gives the embeddings.
    """
    config, (B, N), device = drafter.config, blocks.anchor_BN.shape, token_BT.device
    token_BNK = torch.full((B, N, config.block_size), config.mask_token_id, device=device)
    token_BNK[:, :, 0] = token_BT.gather(1, blocks.anchor_BN)
    position_BN = position_BT.gather(1, blocks.anchor_BN)
    position_BM = (position_BN[:, :, None] + torch.arange(config.block_size, device=device)).flatten(1)
    position = torch.cat([position_BT, position_BM], 1)
    K, dtype = config.block_size, drafter.body.dtype

    def masks_of(causal: bool) -> masks.LayerMasks:
        allowed = masks.training(document_BT, blocks.anchor_BN, blocks.valid_BN, block=K, causal=causal)
        return frozen.pass_masks(
            allowed, position_BM, position, windows=drafter.windows, dtype=dtype, block=K, trained=True
        )

    embedded_BMC = drafter.embedded(backbone, token_BNK.flatten(1)).to(dtype)
    hidden_BMC: Tensor = drafter(
        embedded_BMC, context_BTF.to(dtype), position, masks_of(config.causal), masks_of(config.sliding_causal)
    )
    return hidden_BMC.view(B, N, config.block_size, -1)


class DFlashTask(AnsweredTask[DFlashRecipe]):
    """The loop's task for a recipe of the kind "dflash"; rows and answers are made as a view's."""

    model: DFlash

    def __init__(self, recipe: DFlashRecipe, *, data: Prepared | None = None) -> None:
        super().__init__(recipe, data=data)
        mask = mask_token(recipe.model, self._tokenizer, self._backbone)
        self.model = drafter_of(recipe, self._backbone, mask=mask).to(self._device)
        self._softmax(recipe.objective.vocabulary, self.model.markov)

    def save(self, path: Path) -> None:
        """Write the drafter in the published layout, in the run's dtype."""
        dflash_files.save(in_dtype(copy.deepcopy(self.model), self._backbone.dtype), path)

    def _decoded(self, prompts: list[list[int]]) -> dict[str, float]:
        return self._drafted(prompts, DFlashDrafter(self._backbone, copy.deepcopy(self.model)))

    def _loss(self, packed: PackedRows, index: Rows, step: int) -> Loss:
        goal, config = self._recipe.objective, self.model.config
        document_BT, position_BT, token_BT, answer_BT = batch(packed, index, self._device)
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
        tokens = self._tokens(step)
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
