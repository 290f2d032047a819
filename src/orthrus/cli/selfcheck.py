"""Check that decoding is lossless here: drafts of a tiny random model and of the bundled one against plain decoding."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from orthrus.cli.comparing import Comparison, Written

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from orthrus.decode.output import Completion
    from orthrus.decode.rows import Row
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
        return self.identical == self.texts or not self.required

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def check_random(device: str) -> Check:
    """Check a tiny random model in float32 whose twin often drafts wrongly, under every kind of plan."""
    from orthrus.policy.steps import parse

    model = random_model(device)
    plain = _written(model, parse("ar"), rows=1)
    made = [_written(model, parse(plan), rows=len(_PROMPT_LENGTHS)) for plan in _PLANS]
    both = Comparison.total([Comparison(plain=plain, made=one) for one in made])
    return _check("random", model, both, device=device)


def check_loaded(
    name: str,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    prompts: int,
    max_new_tokens: int,
) -> Check:
    from orthrus.data.synthetic import problems
    from orthrus.decode.api import generate

    chats = [problem.messages[:1] for problem in problems(prompts, split="heldout")]
    plain = generate(model, tokenizer, chats, mode="ar", max_new_tokens=max_new_tokens, batch_size=1)
    made = generate(model, tokenizer, chats, plan="full", max_new_tokens=max_new_tokens, batch_size=1)
    both = Comparison(plain=_of(plain), made=_of(made))
    return _check(name, model, both, device=str(model.device))


def _check(name: str, model: "PreTrainedModel", both: Comparison, *, device: str) -> Check:
    from orthrus.model.fingerprint import precision_of

    dtype = precision_of(model)
    return Check(
        model=name,
        dtype=dtype,
        device=device,
        required=dtype == "float32",
        texts=len(both.each),
        identical=sum(both.each),
        tokens_per_cycle=both.made.stats.tokens_per_cycle,
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


def _written(model: "PreTrainedModel", plan: "Plan", *, rows: int) -> Written:
    """Decode prompts of different lengths from their token ids."""
    from orthrus.decode.api import engine_for
    from orthrus.decode.options import Options

    prompts = [[(7 * length + 5 * i) % _VOCABULARY for i in range(length)] for length in _PROMPT_LENGTHS]
    options = Options(max_new_tokens=_TOKENS)
    return _of(engine_for(model, prompts, options, plan, rows=rows).finish(prompts, options))


def _of(done: "Sequence[Row | Completion]") -> Written:
    from orthrus.decode.output import Stats

    return Written(texts=[one.token_ids for one in done], stats=Stats.total(one.stats for one in done))
