"""Check that decoding is lossless on this machine: drafts against plain decoding, token for token.

The models are a tiny random one that needs no files, and the bundled one.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from orthrus.decode.output import Stats
    from orthrus.policy.steps import Plan

_VOCABULARY = 96
_BLOCK = 8
_TOKENS = 32
_PLANS = ("full", "fixed:3", "tree:12", "onepass", "lookup", "auto")
_PROMPT_LENGTHS = (1, 5, 23, 60)
_NOISE = 0.05
"""How far the random model's twin is moved: enough for drafts to be right at times and wrong at times."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """How many of a model's texts were the same in both modes.

    Attributes:
        required: the contract covers this precision: a difference is a defect of this package or machine.
    """

    model: str
    dtype: str
    device: str
    required: bool
    texts: int
    identical: int
    tokens_per_cycle: float

    @property
    def passed(self) -> bool:
        """True unless the contract is broken."""
        return self.identical == self.texts or not self.required

    def to_dict(self) -> dict[str, Any]:
        """Return the check as plain JSON values."""
        return asdict(self) | {"passed": self.passed}


def check_random(device: str) -> Check:
    """Check a tiny random model in float32 whose twin often drafts wrongly, under every kind of plan."""
    from orthrus.decode.output import Stats
    from orthrus.policy.steps import parse

    model = random_model(device)
    plain, _ = _tokens(model, parse("ar"), rows=1)
    runs = [_tokens(model, parse(plan), rows=len(_PROMPT_LENGTHS)) for plan in _PLANS]
    return Check(
        model="random",
        dtype="float32",
        device=device,
        required=True,
        texts=len(plain) * len(_PLANS),
        identical=sum(a == b for made, _ in runs for a, b in zip(made, plain, strict=True)),
        tokens_per_cycle=Stats.total(part for _, parts in runs for part in parts).tokens_per_cycle,
    )


def check_loaded(
    name: str,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    prompts: int,
    max_new_tokens: int,
) -> Check:
    """Check a loaded model on built-in prompts."""
    from orthrus.data.synthetic import problems
    from orthrus.decode.api import generate
    from orthrus.decode.output import Stats

    chats = [problem.messages[:1] for problem in problems(prompts, split="heldout")]
    plain = generate(model, tokenizer, chats, mode="ar", max_new_tokens=max_new_tokens, batch_size=1)
    made = generate(model, tokenizer, chats, plan="full", max_new_tokens=max_new_tokens, batch_size=1)
    dtype = str(model.dtype).removeprefix("torch.")
    return Check(
        model=name,
        dtype=dtype,
        device=str(model.device),
        required=dtype == "float32",
        texts=len(chats),
        identical=sum(a.token_ids == b.token_ids for a, b in zip(made, plain, strict=True)),
        tokens_per_cycle=Stats.total(completion.stats for completion in made).tokens_per_cycle,
    )


def random_model(device: str) -> "PreTrainedModel":
    """Build a tiny Qwen3 with a view, in memory, always the same, with logits too far apart for ties."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from orthrus.model.attach import attach
    from orthrus.model.config import OrthrusConfig

    config = Qwen3Config(
        vocab_size=_VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=256,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.12)
        attach(model, OrthrusConfig(block_size=_BLOCK), attn_implementation="orthrus")
        for name, parameter in model.named_parameters():
            if ".diffusion." in name:
                parameter.add_(torch.randn_like(parameter) * _NOISE)
    return model.float().to(device)


def _tokens(model: "PreTrainedModel", plan: "Plan", *, rows: int) -> tuple[list[list[int]], "list[Stats]"]:
    """Decode prompts of different lengths from their token ids; return texts and statistics in order."""
    from orthrus.decode.api import engine_for
    from orthrus.decode.options import Options

    prompts = [[(7 * length + 5 * i) % _VOCABULARY for i in range(length)] for length in _PROMPT_LENGTHS]
    options = Options(max_new_tokens=_TOKENS)
    done = engine_for(model, prompts, options, plan, rows=rows).finish(prompts, options)
    return [row.token_ids for row in done], [row.stats for row in done]
