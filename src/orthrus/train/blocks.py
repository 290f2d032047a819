"""Convert a backbone to a block-diffusion language model: train all weights on masked tokens of its answers.

One pass reads each row twice, masked and clean. Masked blocks see the clean blocks before them. Shapes: B rows, T
positions, C hidden size, M masked tokens, V vocabulary.
"""

import copy
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from orthrus.checkpoints.load import DTYPES
from orthrus.data.packing import PackedRows
from orthrus.decode.options import Options
from orthrus.kernels import masks
from orthrus.model.attach import detach
from orthrus.model.head import output_head
from orthrus.model.twin import in_dtype
from orthrus.peers import blocks
from orthrus.peers.blocks import BlocksConfig, Unmasking
from orthrus.train import frozen, objective
from orthrus.train.answered import AnsweredTask
from orthrus.train.peer_sections import BlocksRecipe
from orthrus.train.prepare import Prepared
from orthrus.train.start import frozen_backbone, mask_token
from orthrus.train.step import Loss, Rows, batch, row_generator

LEAST_NOISE: Final = 1e-3
"""The least share of a text or block that is masked."""


class Noise(NamedTuple):
    """Which tokens are masked, `[B, T]` boolean, and the expected share of masked tokens at each position."""

    masked_BT: Tensor
    share_BT: Tensor


def draw(
    group_BT: Tensor, answer_BT: Tensor, *, least: float, complement: bool, generators: list[torch.Generator]
) -> Noise:
    """Mask a random share of the answer tokens of each group (a document or a block), each token independently.

    `group_BT` holds the position where the group begins. With `complement` the batch has twice as many rows: the second
    half repeats the rows with the other tokens masked.
    """
    drawn_2BT = torch.stack([torch.rand(2, group_BT.shape[1], generator=g) for g in generators], dim=1).to(
        group_BT.device
    )
    share_BT = (least + (1 - least) * drawn_2BT[0]).gather(1, group_BT)
    masked_BT = answer_BT & (drawn_2BT[1] < share_BT)
    if not complement:
        return Noise(masked_BT, share_BT)
    return Noise(torch.cat([masked_BT, answer_BT & ~masked_BT]), torch.cat([share_BT, (1 - share_BT).clamp_min(least)]))


def begins(*parts_BT: Tensor) -> Tensor:
    """Return for each position the index where its group begins; a group is a run of equal values in all parts."""
    T = parts_BT[0].shape[1]
    index_T = torch.arange(T, device=parts_BT[0].device)
    new_BT = torch.zeros_like(parts_BT[0], dtype=torch.bool)
    for part_BT in parts_BT:
        new_BT[:, 1:] |= part_BT[:, 1:] != part_BT[:, :-1]
    return torch.where(new_BT, index_T, 0).cummax(1).values


class BlocksTask(AnsweredTask[BlocksRecipe]):
    """The loop's task for a recipe of the kind "blocks"; rows and answers are made as a view's."""

    model: PreTrainedModel

    def __init__(self, recipe: BlocksRecipe, *, data: Prepared | None = None) -> None:
        super().__init__(recipe, data=data)
        self.model = detach(self._backbone).requires_grad_(True)
        self.model.set_attn_implementation("sdpa")
        blocks.require_full_attention(self.model)
        self._config = BlocksConfig(
            block_size=recipe.model.block_size,
            shift=recipe.model.shift,
            mask=mask_token(recipe.model, self._tokenizer, self.model),
            backbone=recipe.model.backbone,
        )

    def save(self, path: Path) -> None:
        """Write the model in the run's dtype, with its tokenizer and its `BlocksConfig`."""
        blocks.save(in_dtype(copy.deepcopy(self.model), DTYPES[self._recipe.run.dtype]), self._config, path)
        self._tokenizer.save_pretrained(path)

    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        return frozen_backbone(self._recipe, dtype=torch.float32)  # it is trained itself

    def _decoded(self, prompts: list[list[int]]) -> dict[str, float]:
        most, eos = self._recipe.responses.eval_tokens, Options.of(self.model.generation_config).eos_token_id
        with torch.autocast(self.model.device.type, enabled=False):
            written = [
                blocks.write(self.model, self._config, Unmasking(), prompt, max_new_tokens=most, eos=eos)
                for prompt in prompts
            ]
        passes = sum(one.forwards for one in written)
        return {"tokens_per_forward": sum(len(one.token_ids) for one in written) / max(passes, 1)}

    def _loss(self, packed: PackedRows, index: Rows, step: int) -> Loss:
        goal, K = self._recipe.objective, self._config.block_size
        document_BT, position_BT, token_BT, answer_BT = batch(packed, index, self._device)
        block_BT = torch.zeros_like(position_BT) if K is None else position_BT // K
        noise = draw(
            begins(document_BT, block_BT) if goal.noise == "block" else begins(document_BT),
            answer_BT,
            least=LEAST_NOISE,
            complement=goal.complement,
            generators=[row_generator(self._recipe.run.seed, step, int(row)) for row in index],
        )
        if goal.complement:
            document_BT, position_BT, token_BT, answer_BT, block_BT = (
                torch.cat([part, part]) for part in (document_BT, position_BT, token_BT, answer_BT, block_BT)
            )
        noisy_BT = torch.where(noise.masked_BT, self._config.mask, token_BT)
        hidden_BTC = self._hidden(noisy_BT, token_BT, document_BT, position_BT, block_BT)
        chosen_BT = noise.masked_BT
        scores = objective.chunked(
            objective.cross_entropy, hidden_BTC[chosen_BT], None, token_BT[chosen_BT], head=output_head(self.model)
        )
        metrics = {"agreement": (scores.agrees_M.sum(), chosen_BT.sum())}
        if goal.weight == "equal":
            return Loss(total=scores.loss_M.sum(), weight=chosen_BT.sum(), metrics=metrics)
        total = (scores.loss_M / noise.share_BT[chosen_BT]).sum()
        return Loss(total=total, weight=answer_BT.sum(), metrics=metrics)

    def _hidden(
        self, noisy_BT: Tensor, token_BT: Tensor, document_BT: Tensor, position_BT: Tensor, block_BT: Tensor
    ) -> Tensor:
        """Return for each token the hidden state that predicts it, `[B, T, C]`."""
        T = token_BT.shape[1]
        if self._config.block_size is None:
            own_BTT = masks.doubled(document_BT, block_BT)[:, :T, :T]
            output_BTC = clean_BTC = frozen.plain(self.model, noisy_BT, position_BT, own_BTT)
        else:
            output_BUC = frozen.plain(
                self.model,
                torch.cat([noisy_BT, token_BT], 1),
                torch.cat([position_BT, position_BT], 1),
                masks.doubled(document_BT, block_BT),
            )
            output_BTC, clean_BTC = output_BUC[:, :T], output_BUC[:, T:]
        if not self._config.shift:
            return output_BTC
        # The token before a block is in the previous block, which is finished when this one is decoded.
        first_BT1 = (block_BT != block_BT.roll(1, 1))[:, :, None]
        return torch.where(first_BT1, clean_BTC.roll(1, 1), output_BTC.roll(1, 1))
