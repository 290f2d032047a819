"""Recipes: what a training run is, key by key, with types and bounds.

A recipe is frozen: a run can be compared with the checkpoint that it resumes.
"""

from collections.abc import Iterator
from typing import Annotated, Final, Literal

from pydantic import Field

from orthrus.model.config import Anchor, BlockAttention
from orthrus.train.sources import CorpusSection, DataSection, Positive, Section

Share = Annotated[float, Field(ge=0, le=1)]
LossName = Literal["kl", "cross_entropy", "tv", "lk"]
NEEDS_TEACHER: Final = frozenset({"kl", "tv", "lk"})
"""Losses that look at the backbone's distribution, and not at its token alone."""
Vocabulary = Annotated[
    Literal["all", "answers"],
    Field(description="tokens that a softmax runs over: all, or those of the training answers (approximate)"),
]
MaskToken = Annotated[
    str | None,
    Field(description="the token that stands for what is not written yet; <|mask|> or the last unless given"),
]


class RecurrentShape(Section):
    """The gated delta rule layers of a Qwen3.5 backbone, in the words of transformers' Qwen3_5TextConfig.

    Every `full_attention_interval`-th layer is attention; all others are recurrent.
    """

    full_attention_interval: Positive = 4
    linear_num_key_heads: Positive
    linear_num_value_heads: Positive
    linear_key_head_dim: Positive
    linear_value_head_dim: Positive
    linear_conv_kernel_dim: Positive = 4


class BackboneModel(Section):
    """The shape of a Qwen3 backbone, or of a Qwen3.5 one, in the words of transformers' configurations.

    `start_from` names the output folder of an earlier run: its tokenizer and its last checkpoint's weights are the
    start of this one, instead of random weights.
    """

    start_from: str | None = None
    recurrent: RecurrentShape | None = Field(
        default=None, description="the recurrent layers of a Qwen3.5 backbone; a Qwen3 one without"
    )

    vocab_size: Positive
    hidden_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    head_dim: Positive
    intermediate_size: Positive
    max_position_embeddings: Positive
    rope_theta: float = Field(default=10_000.0, gt=0)
    tie_word_embeddings: bool = True


class BackboneObjective(Section):
    """Next-token cross-entropy; tokens of answers weigh one."""

    prompt_weight: Share = Field(default=0.3, description="weight of tokens outside answers")


class TokenizerSection(Section):
    """The byte-level BPE tokenizer trained for a backbone; its size is `model.vocab_size`."""

    train_characters: Positive = 8_000_000


class AnsweredModel(Section):
    """Names the frozen backbone whose answers are trained on."""

    backbone: str


class ViewModel(AnsweredModel):
    """Which backbone gets a diffusion view, and the longest block it drafts.

    `start_from` is an Orthrus checkpoint of the same backbone (a directory, a bundled name or a Hub id, either layout)
    whose view is trained further, instead of a copy of the backbone's attention.
    """

    start_from: str | None = None
    block_size: Annotated[int, Field(ge=2)]
    block_attention: BlockAttention = Field(
        default="bidirectional", description="what a slot sees of its block: all of it, or up to itself"
    )
    block_recurrence: BlockAttention = Field(
        default="causal", description="what a slot's recurrent layers read of its block: up to itself, or all of it"
    )
    anchor: Anchor = Field(
        default="twin", description="who reads a block's anchor: the twin, as its first slot, or the backbone before it"
    )
    layers: str | list[int] | None = Field(
        default=None, description='layers with a twin, "last:N", or "attention"; all unless given'
    )
    mask_token: MaskToken = None
    trained_mask: bool = Field(
        default=False, description="give masks an embedding of their own, trained from that token's"
    )
    markov_rank: int = Field(default=0, ge=0, description="rank of the correction by the token before a slot; 0: none")
    gradient_checkpointing: bool = Field(default=False, description="compute the block pass again, layer by layer")

    @property
    def chosen_layers(self) -> str | tuple[int, ...] | None:
        """The layers with a twin as `OrthrusConfig` has them."""
        return tuple(self.layers) if isinstance(self.layers, list) else self.layers


class BlockObjective(Section):
    """Loss over the slots of blocks anchored inside answers, whoever fills them."""

    loss: LossName = "kl"
    terms: Annotated[dict[LossName, Annotated[float, Field(gt=0)]], Field(min_length=1)] | None = Field(
        default=None, description="a weighted sum of losses instead of `loss` alone"
    )
    lk_decay: float = Field(default=3.0, ge=0, description="how fast lk goes from KL to total variation")
    slot_decay: float | None = Field(default=None, gt=0, description="slot j weighs exp(-(j-1)/slot_decay)")
    acceptance: Literal["target", "overlap"] = Field(
        default="target", description="chance of being kept in the next three: of greedy decoding, or of sampling"
    )
    prefix_weighting: bool = Field(default=False, description="slots weigh the chance that all before are kept")
    first_error_focus: float = Field(default=0.0, ge=0, description="extra weight of the first slot refused")
    chain_weight: float = Field(default=0.0, ge=0, description="weight of the expected accepted length")
    blocks_per_row: Positive
    vocabulary: Vocabulary = "all"

    @property
    def mixture(self) -> dict[str, float]:
        """Losses by name with their weights: `terms`, or `loss` alone."""
        return {self.loss: 1.0} if self.terms is None else {str(name): weight for name, weight in self.terms.items()}

    @property
    def needs_teacher(self) -> bool:
        return self.acceptance == "overlap" or bool(NEEDS_TEACHER & self.mixture.keys())


class ViewObjective(BlockObjective):
    """Loss of the diffusion view over the masked slots of its blocks."""

    block_lengths: Annotated[list[Annotated[int, Field(ge=2)]], Field(min_length=1)]
    blind_anchor_share: Share = 0.0
    shown_share: Share = Field(
        default=0.0,
        description="share of the other blocks that are shown their first tokens, as a second step would be",
    )


class ResponsesSection(Section):
    """The backbone's own answers: how many prompts, how long, how many are decoded at an evaluation."""

    prompts: Positive
    max_new_tokens: Positive = 256
    rows: Positive = Field(default=64, description="answers written at once")
    eval_prompts: Positive = 16
    eval_tokens: Positive = 128


class AnswersSection(Section):
    """Who answers the prompts, and whether it thinks first.

    `backbone` writes them here, through the engine; `given` takes those of the documents as they are; `server` asks
    an OpenAI-compatible server that serves the backbone as `served_as` under `url`. `view` names an adapter of the same
    backbone that drafts while the backbone writes: the same answers, in fewer passes.
    """

    by: Literal["backbone", "given", "server"] = "backbone"
    thinking: Literal["on", "off", "template"] = Field(
        default="template", description="enable_thinking of the chat template, or its own default"
    )
    url: str | None = Field(default=None, description="the server's address up to /v1")
    served_as: str | None = None
    view: str | None = Field(default=None, description="an adapter: a directory, a bundled name or a Hub id")

    def faults(self) -> Iterator[str]:
        if (self.by == "server") != (self.url is not None):
            yield "url is required with by = 'server' and has no meaning without it"
        if self.view is not None and self.by != "backbone":
            yield "view drafts what the backbone writes here: leave it out, or take by = 'backbone'"

    @property
    def enable_thinking(self) -> bool | None:
        """What the chat template is told; None leaves it alone."""
        return None if self.thinking == "template" else self.thinking == "on"


class OptimizerSection(Section):
    """Muon for hidden matrices and AdamW for the rest, or AdamW for everything.

    `muon_lr` is scaled to the update size of AdamW (torch's `adjust_lr_fn="match_rms_adamw"`), so that both
    rates live on one scale whatever the shape of a matrix.
    """

    name: Literal["muon+adamw", "adamw"]
    lr: float = Field(gt=0)
    muon_lr: float | None = Field(default=None, gt=0)
    muon_by: Literal["matrix", "head"] = Field(default="matrix", description="what Muon orthogonalises at once")
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[Share, Share] = (0.9, 0.95)
    clip: float | None = Field(default=1.0, gt=0, description="largest norm of the whole gradient")

    def faults(self) -> Iterator[str]:
        if (self.name == "muon+adamw") != (self.muon_lr is not None):
            yield "muon_lr is required with name = 'muon+adamw' and has no meaning without it"


class ScheduleSection(Section):
    """Learning rate over steps: linear warm-up, then down to `final_fraction` of the full rate.

    With kind = "constant" only the last `decay_steps` go down, on a line; until they begin, a run may be given other
    steps.
    """

    steps: Positive
    warmup_steps: int = Field(default=0, ge=0)
    kind: Literal["cosine", "linear", "constant"] = "cosine"
    final_fraction: Share = 0.0
    decay_steps: int = Field(default=0, ge=0)

    def faults(self) -> Iterator[str]:
        if self.decay_steps and (self.kind != "constant" or self.decay_steps > self.steps - self.warmup_steps):
            yield (
                f"decay_steps are the last of a constant rate, steps - warmup_steps at most, found {self.decay_steps} "
                f"of {self.steps} with kind = {self.kind!r}"
            )


class RunSection(Section):
    """How and where a run happens.

    `batch_rows` is the rows of one optimizer step, computed in `grad_accumulation` equal parts; "auto" takes as few as
    fit in memory. `sharding` shares the parameters of a view's model out over the processes, instead of every process
    holding all of them.
    """

    output: str
    batch_rows: Positive
    grad_accumulation: Positive | Literal["auto"] = 1
    sharding: Literal["none", "fsdp2"] = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    seed: int = 0
    threads: Positive | None = None
    checkpoint_every: Positive = 500
    log_every: Positive = 10
    eval_every: Positive = 500
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)

    def faults(self) -> Iterator[str]:
        if self.grad_accumulation != "auto" and self.batch_rows % self.grad_accumulation:
            yield f"batch_rows ({self.batch_rows}) must be a multiple of grad_accumulation ({self.grad_accumulation})"
        if self.sharding != "none" and self.grad_accumulation == "auto":
            yield (
                "grad_accumulation must be a number with sharding, found 'auto': one process that runs out of memory "
                "would leave the others waiting for its part"
            )


class BackboneRecipe(Section):
    """Train a small backbone from nothing."""

    kind: Literal["backbone"]
    model: BackboneModel
    tokenizer: TokenizerSection = TokenizerSection()
    data: CorpusSection
    objective: BackboneObjective = BackboneObjective()
    optimizer: OptimizerSection
    schedule: ScheduleSection
    run: RunSection

    def faults(self) -> Iterator[str]:
        if self.run.sharding != "none":
            yield f"run.sharding must be 'none' for a backbone, found {self.run.sharding!r}: drop the key"
        rows, context = self.data.row_tokens, self.model.max_position_embeddings
        if rows > context:
            yield (
                f"data.row_tokens must be at most model.max_position_embeddings ({context}), found {rows}: make rows "
                "shorter, or the context longer"
            )


class AnsweredRecipe(Section):
    """Train on answers that a frozen backbone wrote: its view, or what is compared with that."""

    kind: str
    model: AnsweredModel
    data: DataSection
    responses: ResponsesSection
    answers: AnswersSection = AnswersSection()
    optimizer: OptimizerSection
    schedule: ScheduleSection
    run: RunSection


class ViewRecipe(AnsweredRecipe):
    """Train the diffusion view of a frozen backbone."""

    kind: Literal["view"]
    model: ViewModel
    objective: ViewObjective

    def faults(self) -> Iterator[str]:
        goal = self.objective
        if max(goal.block_lengths) > self.model.block_size:
            yield (
                f"objective.block_lengths must be at most model.block_size ({self.model.block_size}), found "
                f"{goal.block_lengths}: no longer block is ever decoded"
            )
        if self.model.anchor == "backbone" and (goal.blind_anchor_share or goal.shown_share):
            yield (
                "blind_anchor_share and shown_share must be 0 with model.anchor = 'backbone', found "
                f"{goal.blind_anchor_share} and {goal.shown_share}: its blocks are masks alone"
            )
        for name in ("markov_rank", "trained_mask"):
            value = getattr(self.model, name)
            if value and self.run.sharding != "none":
                yield (
                    f"model.{name} must be {type(value)()} with run.sharding = {self.run.sharding!r}, found {value}: "
                    "what stands beside the layers is not shared out; drop one of the two"
                )


Recipe = BackboneRecipe | AnsweredRecipe
