"""Train an EAGLE-3 drafter for a frozen backbone by the training-time test (arXiv 2503.01840, section 3.1).

Every position of an answer drafts several tokens in a row. The first comes from the backbone's features, each later one
from the drafter's previous output. Input tokens are always those of the text.

Shapes: B rows, T positions, N heads, D head dimension, H hidden size.
"""

import copy
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from orthrus.data.packing import PackedRows
from orthrus.model.head import output_head
from orthrus.model.twin import in_dtype
from orthrus.peers import eagle3_model
from orthrus.peers.eagle3 import Eagle3Drafter
from orthrus.peers.eagle3_model import Eagle3, Eagle3Config
from orthrus.train import anchors, frozen, objective
from orthrus.train.answered import AnsweredTask
from orthrus.train.peer_sections import Eagle3Recipe
from orthrus.train.prepare import Prepared
from orthrus.train.step import Loss, Rows, batch


class Drafted(NamedTuple):
    """The drafter's output at one step, `[B, T, H]`: entry t drafts the token after position t + shift."""

    output_BTH: Tensor
    shift: int


def unrolled(drafter: Eagle3, embedded_BTH: Tensor, g_BTH: Tensor, document_BT: Tensor, steps: int) -> list[Drafted]:
    """Draft `steps` tokens in a row at every position at once.

    Entry t of the first step sees the entries of its document up to itself. At a later step it sees these and its own
    entries of the steps in between. `g_BTH` are fused features of the backbone.
    """
    B, T, _ = embedded_BTH.shape
    index_T = torch.arange(T, device=g_BTH.device)
    follows_BT = torch.zeros_like(document_BT, dtype=torch.bool)
    follows_BT[:, 1:] = (document_BT[:, 1:] == document_BT[:, :-1]) & (document_BT[:, 1:] >= 0)
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    # A document's first token has no entry. An entry that sees nothing else sees itself.
    seen_BTT = same_BTT & (index_T[:, None] >= index_T) & follows_BT[:, None] | torch.eye(
        T, dtype=torch.bool, device=g_BTH.device
    )
    feature_BTH = torch.nn.functional.pad(g_BTH, (0, 0, 1, 0))[:, :-1] * follows_BT[:, :, None]
    keys: list[Tensor] = []
    values: list[Tensor] = []
    out = []
    for step in range(steps):
        joined_BTE = drafter.join(embedded_BTH.roll(-step, 1), feature_BTH)
        position_BT = (index_T + step).expand(B, T)  # only differences matter, so positions in the row will do
        query_BNTD = drafter.queries(joined_BTE, position_BT)
        for kept, part in zip((keys, values), drafter.keys(joined_BTE, position_BT), strict=True):
            kept.append(part.repeat_interleave(query_BNTD.shape[1] // part.shape[1], dim=1))
        scale = query_BNTD.shape[-1] ** -0.5
        score_BNTT = (query_BNTD @ keys[0].transpose(2, 3)).float() * scale
        score_BNTT = score_BNTT.masked_fill(~seen_BTT[:, None], -torch.inf)
        later = [(query_BNTD * key).sum(-1, keepdim=True).float() * scale for key in keys[1:]]
        share = torch.cat([score_BNTT, *later], dim=-1).softmax(-1).to(values[0].dtype)
        attended_BNTD = share[..., :T] @ values[0]
        for index, value in enumerate(values[1:]):
            attended_BNTD = attended_BNTD + share[..., T + index, None] * value
        feature_BTH = drafter.output(attended_BNTD, feature_BTH)
        out.append(Drafted(feature_BTH, step))
    return out


class Eagle3Task(AnsweredTask[Eagle3Recipe]):
    """The loop's task for a recipe of the kind "eagle3"; rows and answers are made as a view's."""

    model: Eagle3

    def __init__(self, recipe: Eagle3Recipe, *, data: Prepared | None = None) -> None:
        super().__init__(recipe, data=data)
        config = Eagle3Config.of(
            self._backbone,
            taps=recipe.model.taps,
            backbone=recipe.model.backbone,
            drafts=recipe.objective.steps,
        )
        self.model = Eagle3(config).to(self._device)
        self._softmax(recipe.objective.vocabulary)

    def save(self, path: Path) -> None:
        """Write the drafter as `speculators` reads it, in the run's dtype."""
        eagle3_model.save(self._decoding(), self._backbone, path)

    def _decoded(self, prompts: list[list[int]]) -> dict[str, float]:
        return self._drafted(prompts, Eagle3Drafter(self._backbone, self._decoding()))

    def _decoding(self) -> Eagle3:
        return in_dtype(copy.deepcopy(self.model), self._backbone.dtype).eval()

    def _loss(self, packed: PackedRows, index: Rows, step: int) -> Loss:
        """Sum the steps' mean losses over the tokens of answers; later steps weigh less."""
        goal = self._recipe.objective
        tokens = self._tokens(step)
        document_BT, position_BT, token_BT, answer_BT = batch(packed, index, self._device)
        read = frozen.read(self._backbone, token_BT, document_BT, position_BT, self.model.config.taps)
        embedded_BTH = self._backbone.get_input_embeddings()(token_BT)
        steps = unrolled(self.model, embedded_BTH, self.model.fuse(read.tapped), document_BT, goal.steps)
        # As where blocks start, but not at a document's first token, which has no feature before it.
        begins_BT = anchors.starts(document_BT, answer_BT) & (position_BT > 0)
        scored_BT, kept_BT = begins_BT, begins_BT
        loss = objective.mixture({goal.loss: 1.0}, lk_decay=goal.lk_decay)
        head, starts = output_head(self._backbone, tokens), begins_BT.sum()
        hidden_RC = read.hidden_BTC.flatten(0, 1)
        total, accepted, agreed = embedded_BTH.new_zeros((), dtype=torch.float32), starts * 0, starts * 0
        for drafted in steps:
            target_BT = token_BT.roll(-drafted.shift - 1, 1)
            if drafted.shift:
                scored_BT = scored_BT & anchors.starts(document_BT, answer_BT).roll(-drafted.shift, 1)
                scored_BT[:, token_BT.shape[1] - drafted.shift :] = False  # the roll brought the row's beginning there
            row_M = scored_BT.flatten().nonzero()[:, 0] + drafted.shift
            target_M = target_BT[scored_BT]
            scores = objective.chunked(
                loss,
                self.model.norm(drafted.output_BTH)[scored_BT],
                objective.Teacher(hidden_RC, row_M) if goal.needs_teacher else None,
                target_M if tokens is None else torch.searchsorted(tokens, target_M),
                head=head,
            )
            count = scored_BT.sum()
            total = total + goal.step_decay**drafted.shift * scores.loss_M.sum() * starts / count.clamp_min(1)
            agree_BT = torch.zeros_like(scored_BT).masked_scatter(scored_BT, scores.agrees_M)
            kept_BT = kept_BT & agree_BT
            accepted = accepted + kept_BT.sum()
            agreed = agreed + (agree_BT.sum() if drafted.shift == 0 else 0)
        metrics = {"agreement": (agreed, starts), "accepted": (accepted, starts)}
        return Loss(total=total, weight=starts, metrics=metrics)
