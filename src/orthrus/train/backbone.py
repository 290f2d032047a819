"""Training a small backbone from nothing: a Qwen3 model on packed documents.

Knows the architecture's shape and the next-token loss; the loop, the optimizers and the data are elsewhere.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from orthrus.checkpoints.load import device_of
from orthrus.data.packing import NO_DOCUMENT, PackedRows
from orthrus.errors import ConfigError
from orthrus.kernels import masks
from orthrus.train.checkpoints import load_trainable
from orthrus.train.corpus import data_folder, heldout_rows, mixed_documents, training_rows
from orthrus.train.sections import BackboneRecipe
from orthrus.train.step import Loss, Rows
from orthrus.train.tokenizer import load_tokenizer, train_tokenizer, training_texts
from orthrus.writing import replacing

EVALUATION_ROWS = 16  # rows of one held-out pass


def build_backbone(recipe: BackboneRecipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3 model with random weights from `run.seed`, in float32."""
    torch.manual_seed(recipe.run.seed)
    shape = recipe.model.model_dump(exclude={"rope_theta", "start_from"})
    config = Qwen3Config(
        **shape,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.model.rope_theta},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        attn_implementation="eager",  # a fifth faster on CPUs than sdpa with a mask, at rows of 512
    )
    model = Qwen3ForCausalLM(config).to(recipe.run.device)
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
        self._model = build_backbone(recipe, self._tokenizer)

    @property
    def model(self) -> Qwen3ForCausalLM:
        return self._model

    @property
    def row_count(self) -> int:
        return len(self._rows)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return dict(self._model.named_parameters())

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
        weights = {name: tensor.to(torch.bfloat16) for name, tensor in self._model.state_dict().items()}
        published = Qwen3ForCausalLM(self._model.config).to(torch.bfloat16)
        published.load_state_dict(weights)
        published.save_pretrained(path)
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
        hidden = self._model.model(
            input_ids=ids,
            position_ids=self._tensor(rows.position[index]).long(),
            attention_mask=masks.additive(masks.packed(document), torch.float32)[:, None],
            use_cache=False,
        ).last_hidden_state
        logits = self._model.lm_head(hidden[:, :-1][has_target])
        losses = F.cross_entropy(logits.float(), ids[:, 1:][has_target], reduction="none")
        return losses, answer[has_target]

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.array(array)).to(self._device)  # a copy: memory-mapped rows are read-only


def _tokenizer(recipe: BackboneRecipe, path: Path) -> PreTrainedTokenizerFast:
    """The run's tokenizer, from `path` if it is there, else copied or trained and kept there."""
    if not path.exists():
        with replacing(path) as temporary:
            if recipe.model.start_from is not None:
                shutil.copytree(_started_from(recipe.model.start_from), temporary)
            else:
                _trained_tokenizer(recipe).save_pretrained(temporary)
    tokenizer = load_tokenizer(path)
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
