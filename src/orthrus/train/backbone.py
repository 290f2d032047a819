"""Training a small backbone from nothing: a Qwen3 or Qwen3.5 model on packed documents."""

import copy
import math
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from orthrus.checkpoints.load import device_of
from orthrus.data.packing import NO_DOCUMENT, PackedRows
from orthrus.errors import ConfigError
from orthrus.kernels import masks
from orthrus.model.mixer import mixes
from orthrus.model.twin import in_dtype
from orthrus.train import frozen
from orthrus.train.checkpoints import load_trainable
from orthrus.train.corpus import data_folder, heldout_rows, mixed_documents, training_rows
from orthrus.train.recurrence import documents_apart
from orthrus.train.sections import BackboneModel, BackboneRecipe
from orthrus.train.step import Loss, Rows
from orthrus.train.tokenizer import train_tokenizer, training_texts
from orthrus.writing import replacing

EVALUATION_ROWS = 16  # rows of one held-out pass


def backbone_config(shape: BackboneModel, **others: object) -> PreTrainedConfig:
    """The configuration of a backbone of this shape, as transformers knows it, and what else it is to say."""
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": shape.rope_theta}
    fields = shape.model_dump(exclude={"rope_theta", "start_from", "recurrent"}) | {"rope_parameters": rope}
    if shape.recurrent is None:
        return AutoConfig.for_model("qwen3", **fields, **others)
    rope |= {"partial_rotary_factor": 0.25}
    return AutoConfig.for_model("qwen3_5_text", **fields, **shape.recurrent.model_dump(), **others)


def build_backbone(recipe: BackboneRecipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A model with random weights from `run.seed`, in float32."""
    torch.manual_seed(recipe.run.seed)
    config = backbone_config(
        recipe.model,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        attn_implementation="eager",  # a fifth faster on CPUs than sdpa with a mask, at rows of 512
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).to(recipe.run.device)
    _let_remember(model)
    if recipe.model.start_from is not None:
        load_trainable(dict(model.named_parameters()), Path(recipe.model.start_from) / "checkpoints")
    return model


def next_token_targets(rows: PackedRows, index: Rows | slice) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Where the next token belongs to the same document, and where it belongs to an answer: [B, T-1] bool."""
    document = rows.document[index]
    has_target = (document[:, 1:] == document[:, :-1]) & (document[:, 1:] != NO_DOCUMENT)
    return has_target, rows.answer[index][:, 1:]


class BackboneTask:
    """The loop's task for a backbone recipe; `folder` keeps the tokenizer and the packed rows."""

    def __init__(self, recipe: BackboneRecipe) -> None:
        self._recipe = recipe
        self._device = device_of(recipe.run.device)
        folder = Path(recipe.run.output)
        self._tokenizer = _tokenizer(recipe, folder / "tokenizer")
        self._rows = training_rows(recipe.data, self._tokenizer, data_folder(recipe))
        self._heldout = heldout_rows(recipe.data, self._tokenizer, data_folder(recipe))
        self.model = build_backbone(recipe, self._tokenizer)
        self.row_count = len(self._rows)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.model.named_parameters())

    def loss(self, rows: Rows, step: int) -> Loss:
        losses, answer = self._token_losses(self._rows, rows)
        weight = torch.where(answer, 1.0, self._recipe.objective.prompt_weight)
        return Loss(
            total=(losses * weight).sum(),
            weight=weight.sum(),
            metrics={
                "answer_loss": (losses.detach()[answer].sum(), answer.sum()),
                "prompt_loss": (losses.detach()[~answer].sum(), (~answer).sum()),
            },
        )

    def evaluate(self, step: int) -> dict[str, float]:
        """Mean loss per source: of answers, and of the whole text where a source has none."""
        return {f"heldout/{name}": self._heldout_loss(rows) for name, rows in self._heldout.items()}

    def save(self, path: Path) -> None:
        """Write bfloat16 weights, the configuration and the tokenizer, as `from_pretrained` reads them."""
        in_dtype(copy.deepcopy(self.model), torch.bfloat16).save_pretrained(path)
        self._tokenizer.save_pretrained(path)

    def _heldout_loss(self, rows: PackedRows) -> float:
        total = count = 0.0
        for start in range(0, len(rows), EVALUATION_ROWS):
            losses, answer = self._token_losses(rows, slice(start, start + EVALUATION_ROWS))
            chosen = answer if rows.answer.any() else torch.ones_like(answer)
            total += float(losses[chosen].sum())
            count += float(chosen.sum())
        return total / count

    def _token_losses(self, rows: PackedRows, index: Rows | slice) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every predictable token, [N] float32, and whether it belongs to an answer, [N]."""
        has_target, answer = (self._tensor(a) for a in next_token_targets(rows, index))
        ids = self._tensor(rows.token_ids[index]).long()
        document = self._tensor(rows.document[index])
        with documents_apart(self.model, document):
            position = self._tensor(rows.position[index]).long()
            hidden = frozen.plain(self.model, ids, position, masks.packed(document), dtype=torch.float32)
        logits = self.model.get_output_embeddings()(hidden[:, :-1][has_target])
        losses = F.cross_entropy(logits.float(), ids[:, 1:][has_target], reduction="none")
        return losses, answer[has_target]

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.array(array)).to(self._device)  # a copy: memory-mapped rows are read-only


def _let_remember(model: PreTrainedModel) -> None:
    """Start recurrent layers with steps of 0.001 to 0.1, as OLMo-Hybrid does; transformers' ones forget at once."""
    for module in model.modules():
        if mixes(module):
            bias = module.dt_bias
            assert isinstance(bias, torch.nn.Parameter)
            step = torch.exp(torch.rand_like(bias) * math.log(100) + math.log(0.001))
            with torch.no_grad():
                bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus undone


def _tokenizer(recipe: BackboneRecipe, path: Path) -> PreTrainedTokenizerFast:
    """The run's tokenizer, from `path` if it is there, else copied or trained and kept there."""
    if not path.exists():
        with replacing(path) as temporary:
            if recipe.model.start_from is not None:
                shutil.copytree(_started_from(recipe.model.start_from), temporary)
            else:
                _trained_tokenizer(recipe).save_pretrained(temporary)
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(path)
    if len(tokenizer) != recipe.model.vocab_size:
        raise ConfigError(
            f"{path}: a tokenizer of model.vocab_size ({recipe.model.vocab_size}) entries is required, found one of "
            f"{len(tokenizer)}: set model.vocab_size to that, or take another run.output"
        )
    return tokenizer


def _started_from(run: str) -> Path:
    folder = Path(run) / "tokenizer"
    if not folder.is_dir():
        raise ConfigError(
            f"model.start_from must be the folder of a backbone's run, with its tokenizer, found no {folder}"
        )
    return folder


def _trained_tokenizer(recipe: BackboneRecipe) -> PreTrainedTokenizerFast:
    characters = recipe.tokenizer.train_characters
    texts = training_texts(mixed_documents(recipe.data, characters=characters), characters=characters)
    return train_tokenizer(texts, vocab_size=recipe.model.vocab_size, max_length=recipe.model.max_position_embeddings)
