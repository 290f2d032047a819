"""Recipes of peers, which are trained on the same answers as a view and compared with it."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from orthrus.model.config import BlockAttention
from orthrus.train.sections import (
    NEEDS_TEACHER,
    AnsweredModel,
    AnsweredRecipe,
    BlockObjective,
    LossName,
    MaskToken,
    Vocabulary,
)
from orthrus.train.sources import Positive, Section


class _PeerRecipe(AnsweredRecipe):
    """A recipe of a peer; each process holds the whole model."""

    def faults(self) -> Iterator[str]:
        if self.run.sharding != "none":
            yield f"run.sharding must be 'none' for a peer, found {self.run.sharding!r}: drop the key"
        taps = getattr(self.model, "taps", None) or []
        if taps != sorted(set(taps)):
            yield f"model.taps must rise, since vLLM reads layers in that order, found {taps}: sort them"


class Eagle3Model(AnsweredModel):
    """The backbone of an EAGLE-3 drafter, and the layers that the drafter reads."""

    taps: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=3, max_length=3)] | None = Field(
        default=None, description="three decoder layers whose outputs are fused; low, middle and high by default"
    )


class Eagle3Objective(Section):
    """The training-time test: each position drafts `steps` tokens in a row, each from the previous output."""

    loss: LossName = "kl"
    lk_decay: float = Field(default=3.0, ge=0, description="how fast lk goes from KL to total variation")
    steps: Positive = 7
    step_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.8, description="step i has weight step_decay^(i-1)"
    )
    vocabulary: Vocabulary = "all"

    @property
    def needs_teacher(self) -> bool:
        return self.loss in NEEDS_TEACHER


class Eagle3Recipe(_PeerRecipe):
    """Train an EAGLE-3 drafter of a frozen backbone."""

    kind: Literal["eagle3"]
    model: Eagle3Model
    objective: Eagle3Objective = Eagle3Objective()


class DFlashModel(AnsweredModel):
    """The backbone of a DFlash drafter, and the drafter's shape.

    `shift` and `markov_rank` make it DSpark, causal `block_attention` makes it JetSpec.
    """

    draft_layers: Positive = Field(default=1, description="decoder layers of the drafter")
    taps: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = Field(
        default=None, description="decoder layers whose outputs are read; three evenly spread ones by default"
    )
    block_size: Annotated[int, Field(ge=2)] = 16
    shift: bool = Field(default=False, description="a slot predicts the next token, also the anchor's slot")
    block_attention: BlockAttention = Field(
        default="bidirectional", description="the part of its block that a slot sees: all, or up to itself"
    )
    markov_rank: int = Field(default=0, ge=0, description="rank of the correction by the previous token; 0: none")
    mask_token: MaskToken = None


class DFlashRecipe(_PeerRecipe):
    """Train a DFlash drafter of a frozen backbone."""

    kind: Literal["dflash"]
    model: DFlashModel
    objective: BlockObjective


class DraftModel(AnsweredModel):
    """The backbone whose first layers a draft model starts from."""

    layers: Positive = Field(default=1, description="decoder layers of the draft model")


class DraftRecipe(_PeerRecipe):
    """Train a small draft model on a backbone's answers, by cross-entropy."""

    kind: Literal["draft"]
    model: DraftModel


class BlocksModel(AnsweredModel):
    """The backbone to convert to a block-diffusion language model, and how the result predicts."""

    block_size: Positive | None = Field(default=None, description="tokens of a block; the whole text by default")
    shift: bool = Field(default=True, description="a position predicts the next token, or its own")
    mask_token: MaskToken = None


class BlocksObjective(Section):
    """Cross-entropy of masked tokens of answers.

    The masked share is drawn uniformly up to 1, for each document (`noise` = "document") or for each
    block. With `complement` every row is read twice, the second time with the other tokens masked.
    """

    noise: Literal["document", "block"] = "block"
    complement: bool = False
    weight: Literal["inverse", "equal"] = Field(
        default="equal", description="weight of a token: 1 / masked share, or 1"
    )


class BlocksRecipe(_PeerRecipe):
    """Turn a backbone into a block-diffusion language model; all its weights are trained."""

    kind: Literal["blocks"]
    model: BlocksModel
    objective: BlocksObjective = BlocksObjective()

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.model.block_size is None and self.objective.noise == "block":
            yield "objective.noise must be 'document' without model.block_size: there are no blocks"
