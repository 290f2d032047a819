"""Train a small draft model on a backbone's answers: the backbone's own first layers, its embedding and its head."""

import copy
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from orthrus.checkpoints.load import DTYPES, backbone_with_tokenizer
from orthrus.data.packing import PackedRows
from orthrus.errors import ConfigError
from orthrus.kernels import masks
from orthrus.model.head import output_head
from orthrus.model.twin import in_dtype
from orthrus.peers.blocks import require_full_attention
from orthrus.peers.draft import DraftModel
from orthrus.train import anchors, frozen, objective
from orthrus.train.answered import AnsweredTask
from orthrus.train.peer_sections import DraftRecipe
from orthrus.train.prepare import Prepared
from orthrus.train.step import Loss, Rows, batch


def shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Return a configuration with the first layers alone; raises ConfigError where it has no more than that."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    if layers >= text.num_hidden_layers:
        raise ConfigError(
            f"model.layers must be less than the backbone's {text.num_hidden_layers}, found {layers}: a draft model is "
            "smaller"
        )
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return short


def first_layers(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """Return a new model in float32 with the first layers of one without a view, its embedding, norm and head."""
    small = type(model)(shortened(model.config, layers)).float()
    missing, _ = small.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    return small


class DraftTask(AnsweredTask[DraftRecipe]):
    """The loop's task for a recipe of the kind "draft"; rows and answers are made as a view's."""

    model: PreTrainedModel

    def __init__(self, recipe: DraftRecipe, *, data: Prepared | None = None) -> None:
        super().__init__(recipe, data=data)
        whole, _ = backbone_with_tokenizer(recipe.model.backbone)
        require_full_attention(whole, "training a draft model")
        self.model = first_layers(whole, recipe.model.layers).to(self._device)
        self.model.set_attn_implementation("sdpa")

    def save(self, path: Path) -> None:
        """Write the model in the run's dtype, with the backbone's tokenizer."""
        in_dtype(copy.deepcopy(self.model), DTYPES[self._recipe.run.dtype]).save_pretrained(path)
        self._tokenizer.save_pretrained(path)

    def _decoded(self, prompts: list[list[int]]) -> dict[str, float]:
        small = in_dtype(copy.deepcopy(self.model), self._backbone.dtype)
        return self._drafted(prompts, DraftModel(self._backbone, small))

    def _loss(self, packed: PackedRows, index: Rows, step: int) -> Loss:
        document_BT, position_BT, token_BT, answer_BT = batch(packed, index, self._device)
        hidden_BTC = frozen.plain(self.model, token_BT, position_BT, masks.packed(document_BT))
        scored_BT = anchors.starts(document_BT, answer_BT)
        scores = objective.chunked(
            objective.cross_entropy,
            hidden_BTC[scored_BT],
            None,
            token_BT.roll(-1, 1)[scored_BT],
            head=output_head(self.model),
        )
        count = scored_BT.sum()
        return Loss(total=scores.loss_M.sum(), weight=count, metrics={"agreement": (scores.agrees_M.sum(), count)})
