"""Recipes of peers: what is trained on the same answers as a view, to be compared with it.

Knows the sections and what fits together inside one, as `sections` does.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from orthrus.model.config import BlockAttention
from orthrus.train.sections import AnsweredModel, AnsweredRecipe, BlockObjective, LossName
from orthrus.train.sources import Positive, Section


class _PeerRecipe(AnsweredRecipe):
    """A recipe of a peer: held whole by each process."""

    @model_validator(mode="after")
    def _whole_everywhere(self) -> "_PeerRecipe":
        if self.run.sharding != "none":
            raise ValueError(f"run.sharding must be 'none' for a peer, found {self.run.sharding!r}: drop the key")
        return self


class Eagle3Model(AnsweredModel):
    """Which backbone gets an EAGLE-3 drafter, and what that reads of it."""

    taps: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=3, max_length=3)] | None = Field(
        default=None, description="three decoder layers whose outputs are fused; low, middle and high unless given"
    )
    norm_before_residual: bool = Field(default=False, description="what the layer adds to: normed features, or plain")


class Eagle3Objective(Section):
    """The training-time test: each text position drafts `steps` tokens in a row, each from the draft before it."""

    loss: LossName = "kl"
    lk_decay: float = Field(default=3.0, ge=0, description="how fast lk goes from KL to total variation")
    steps: Positive = 7
    step_decay: Annotated[float, Field(gt=0, le=1)] = Field(default=0.8, description="step i weighs step_decay^(i-1)")


class Eagle3Recipe(_PeerRecipe):
    """Train an EAGLE-3 drafter of a frozen backbone."""

    kind: Literal["eagle3"]
    model: Eagle3Model
    objective: Eagle3Objective = Eagle3Objective()


class DFlashModel(AnsweredModel):
    """Which backbone gets a DFlash drafter, or one of the same body (`shift` and `markov_rank` as DSpark, causal

    `block_attention` as JetSpec), and what that reads of it.
    """

    draft_layers: Positive = Field(default=1, description="decoder layers of the drafter")
    taps: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = Field(
        default=None, description="decoder layers whose outputs are read; three evenly spread ones unless given"
    )
    block_size: Annotated[int, Field(ge=2)] = 16
    shift: bool = Field(default=False, description="a slot predicts the token after its own, the anchor's too")
    block_attention: BlockAttention = Field(
        default="bidirectional", description="what a slot sees of its block: all of it, or up to itself"
    )
    markov_rank: int = Field(default=0, ge=0, description="rank of the correction by the token before a slot; 0: none")
    mask_token: str | None = Field(
        default=None, description="the token that stands for what is not written yet; <|mask|> or the last unless given"
    )


class DFlashRecipe(_PeerRecipe):
    """Train a DFlash drafter of a frozen backbone."""

    kind: Literal["dflash"]
    model: DFlashModel
    objective: BlockObjective


class BlocksModel(AnsweredModel):
    """Which backbone is turned into a block-diffusion language model, and how that predicts."""

    block_size: Positive | None = Field(
        default=None, description="tokens of a block, at multiples of it in the text; the whole text unless given"
    )
    shift: bool = Field(default=True, description="a position predicts the token after it, or its own")
    mask_token: str | None = Field(
        default=None, description="the token that stands for what is not written yet; <|mask|> or the last unless given"
    )


class BlocksObjective(Section):
    """Masked tokens of answers, by cross-entropy with the text.

    A share of the tokens is masked, drawn evenly from `least_noise` to 1: one for each document (`noise` = "document")
    or for each block. With `complement` every row is read twice, the second time with the other tokens masked.
    """

    noise: Literal["document", "block"] = "block"
    complement: bool = False
    weight: Literal["inverse", "equal"] = Field(default="equal", description="by one over the share masked, or alike")
    least_noise: Annotated[float, Field(gt=0, lt=1)] = 1e-3


class BlocksRecipe(_PeerRecipe):
    """Turn a backbone into a block-diffusion language model; all its weights are trained."""

    kind: Literal["blocks"]
    model: BlocksModel
    objective: BlocksObjective = BlocksObjective()

    @model_validator(mode="after")
    def _whole_texts_are_noised_whole(self) -> "BlocksRecipe":
        if self.model.block_size is None and self.objective.noise == "block":
            raise ValueError("objective.noise must be 'document' without model.block_size: there are no blocks")
        return self
