"""`generate(custom_generate=orthrus.hf_generate)` returns what plain `generate` returns, or refuses by name."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TextStreamer,
)

import orthrus
from orthrus.errors import ConfigError, PromptError
from tests.decode.drive import dual
from tests.families import tiny

PROMPTS = [[5, 6, 7], [8], [30, 31, 32, 33, 34, 35, 36]]


def padded(prompts: list[list[int]] = PROMPTS) -> dict[str, Tensor]:
    """A left-padded batch and its mask."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(p)) + p for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return dual()


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    return tiny("qwen3")


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma2", "phi3"])
@pytest.mark.parametrize("mode", ["orthrus", "ar"])
def test_equals_plain_generate(family: str, mode: str) -> None:
    """Greedy, a left-padded ragged batch: the same tensor, padding and all."""
    expected = tiny(family).generate(**padded(), max_new_tokens=12)
    made = dual(family).generate(**padded(), max_new_tokens=12, custom_generate=orthrus.hf_generate, mode=mode)
    assert made.dtype == torch.long
    assert torch.equal(made, expected)


@pytest.mark.parametrize("plan", ["fixed:3", "full", "tree:6", "onepass", "auto"])
def test_plans_pass_through_generate(plan: str, model: PreTrainedModel, plain: PreTrainedModel) -> None:
    """`plan=` is an argument of ours that `generate` hands on."""
    made = model.generate(**padded(), max_new_tokens=12, custom_generate=orthrus.hf_generate, plan=plan)
    assert torch.equal(made, plain.generate(**padded(), max_new_tokens=12))


def end_tokens(plain: PreTrainedModel) -> list[int]:
    """Tokens that end the three texts at different places."""
    out = plain.generate(**padded(), max_new_tokens=12)[:, 7:].tolist()
    return [out[0][4], out[1][8]]


@pytest.mark.parametrize("options", [{}, {"pad_token_id": 77}, {"repetition_penalty": 1.3}, {"temperature": 0.5}])
def test_rows_that_end_are_padded_alike(
    options: dict[str, Any], model: PreTrainedModel, plain: PreTrainedModel
) -> None:
    """End tokens, as a list, in the middle of blocks; the pad token named, or the config's own."""
    asked = {"max_new_tokens": 12, "eos_token_id": end_tokens(plain), **options}
    made = model.generate(**padded(), custom_generate=orthrus.hf_generate, **asked)
    assert torch.equal(made, plain.generate(**padded(), **asked))


def test_without_a_pad_token_the_end_token_pads(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    """As transformers does when nothing names one."""
    config = GenerationConfig(max_new_tokens=12, eos_token_id=end_tokens(plain))
    before, model.generation_config = model.generation_config, GenerationConfig()
    made = model.generate(**padded(), generation_config=config, custom_generate=orthrus.hf_generate)
    model.generation_config = before
    texts = plain.generate(**padded(), max_new_tokens=12, eos_token_id=end_tokens(plain), pad_token_id=77)
    expected = torch.where(texts == 77, end_tokens(plain)[0], texts)
    assert torch.equal(made, expected)


def test_max_length_counts_the_padded_prompt(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    """As `generate` has it, and so does its default of 20 new tokens."""
    made = model.generate(**padded(), max_length=15, custom_generate=orthrus.hf_generate)
    assert made.shape == (3, 15)
    assert torch.equal(made, plain.generate(**padded(), max_length=15))
    made = model.generate(**padded(), custom_generate=orthrus.hf_generate)
    assert torch.equal(made, plain.generate(**padded()))


def test_without_a_mask_every_token_counts(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    """A batch of equal length, as `generate` takes it."""
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    made = model.generate(ids, max_new_tokens=9, custom_generate=orthrus.hf_generate)
    assert torch.equal(made, plain.generate(ids, max_new_tokens=9))


def test_sampling_follows_torch_s_seed(model: PreTrainedModel) -> None:
    """torch.manual_seed reproduces a call; the next call goes on; a seed of the config goes before."""

    def sample(**more: Any) -> Tensor:
        options = {"do_sample": True, "temperature": 1.5, "top_k": 0, "max_new_tokens": 12, **more}
        out: Tensor = model.generate(**padded(), custom_generate=orthrus.hf_generate, plan="full", **options)
        return out

    torch.manual_seed(1)
    first, second = sample(), sample()
    torch.manual_seed(1)
    assert torch.equal(sample(), first)
    assert not torch.equal(first, second)
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=12, seed=3)
    both = [model.generate(**padded(), generation_config=config, custom_generate=orthrus.hf_generate) for _ in "ab"]
    assert torch.equal(*both)


def test_greedy_calls_leave_torch_s_generator_alone(model: PreTrainedModel) -> None:
    """Only a sampled call draws a seed."""
    before = torch.random.get_rng_state()
    model.generate(**padded(), max_new_tokens=5, custom_generate=orthrus.hf_generate)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_return_sequences_differ(model: PreTrainedModel) -> None:
    """Every repeated row draws its own noise."""
    torch.manual_seed(0)
    out = model.generate(
        torch.tensor([[5, 6, 7]]),
        do_sample=True,
        top_k=0,
        max_new_tokens=12,
        num_return_sequences=4,
        custom_generate=orthrus.hf_generate,
    )
    assert out.shape == (4, 15)
    assert len({tuple(row) for row in out.tolist()}) == 4


def test_streamer_gets_prompt_and_text(
    model: PreTrainedModel, characters: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    """Transformers 5.23 keeps streamers from custom functions; bound beforehand they stream as ever."""
    ids = torch.tensor([[5, 6, 7]])
    streamer = TextStreamer(characters, skip_prompt=True)
    streaming = functools.partial(orthrus.hf_generate, streamer=streamer)
    out = model.generate(ids, max_new_tokens=12, custom_generate=streaming)
    assert capsys.readouterr().out.strip() == characters.decode(out[0, 3:])
    with pytest.raises(ConfigError, match="a streamer needs a single prompt, found 3"):
        model.generate(**padded(), max_new_tokens=12, custom_generate=streaming)


# ---------------------------------------------------------------- refusals


def own_processor(ids: Tensor, scores: Tensor) -> Tensor:
    return scores


class OwnCriterion(MaxLengthCriteria):
    """A stopping rule of the caller's."""


def filled_cache() -> DynamicCache:
    cache = DynamicCache()
    cache.update(torch.zeros(3, 2, 1, 12), torch.zeros(3, 2, 1, 12), 0)
    return cache


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "beams": (lambda: {"num_beams": 2}, "'num_beams' is not honoured"),
    "least length": (lambda: {"min_new_tokens": 3}, "'min_length' is not honoured|'min_new_tokens' is not honoured"),
    "n-grams": (lambda: {"no_repeat_ngram_size": 2}, "'no_repeat_ngram_size' is not honoured"),
    "dictionary": (lambda: {"return_dict_in_generate": True}, "return_dict_in_generate is not honoured"),
    "scores": (lambda: {"output_scores": True}, "'output_scores' is not honoured"),
    "attentions": (lambda: {"output_attentions": True}, "'output_attentions' is not honoured"),
    "typical": (lambda: {"do_sample": True, "typical_p": 0.5}, "'typical_p' is not honoured"),
    "processor": (
        lambda: {"logits_processor": LogitsProcessorList([own_processor])},
        "logits processor function is not honoured",
    ),
    "other value": (
        lambda: {"do_sample": True, "logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.3)])},
        "logits processor TemperatureLogitsWarper is not honoured",
    ),
    "allowed tokens": (
        lambda: {"prefix_allowed_tokens_fn": lambda *_: [5]},
        "logits processor PrefixConstrainedLogitsProcessor is not honoured",
    ),
    "criterion": (
        lambda: {"stopping_criteria": StoppingCriteriaList([OwnCriterion(9)])},
        "stopping criterion OwnCriterion is not honoured",
    ),
    "embeddings": (lambda: {"inputs_embeds": torch.zeros(3, 7, 48)}, "'inputs_embeds' is not honoured"),
    "cache": (lambda: {"past_key_values": filled_cache()}, "past_key_values must be empty, found 1 positions"),
    "positions": (lambda: {"position_ids": torch.arange(7).expand(3, -1)}, "position_ids must count each row's tokens"),
    "plan": (lambda: {"plan": "best"}, "a plan is"),
    "mode": (lambda: {"mode": "fast"}, "mode must be 'orthrus' or 'ar', found 'fast'"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_honoured_is_refused_by_name(kind: str, model: PreTrainedModel) -> None:
    """Options, processors, criteria and model arguments alike; nothing passes silently."""
    make, message = REFUSED[kind]
    with pytest.raises(ConfigError, match=message):
        model.generate(**{**padded(), "max_new_tokens": 6, **make()}, custom_generate=orthrus.hf_generate)


def test_stop_strings_are_refused(model: PreTrainedModel) -> None:
    """Called by hand (inside `generate`, transformers refuses them itself, for want of the tokenizer)."""
    config = GenerationConfig(max_length=9, stop_strings=["x"])
    with pytest.raises(ConfigError, match=r"stop_strings is not honoured.*orthrus\.generate"):
        orthrus.hf_generate(
            model,
            torch.tensor([[5]]),
            logits_processor=LogitsProcessorList(),
            stopping_criteria=StoppingCriteriaList(),
            generation_config=config,
        )


def test_models_without_a_view_and_rows_without_tokens_are_refused(
    model: PreTrainedModel, plain: PreTrainedModel
) -> None:
    """The message says what to do."""
    with pytest.raises(ConfigError, match=r"needs a model with a diffusion view.*attach"):
        plain.generate(**padded(), max_new_tokens=6, custom_generate=orthrus.hf_generate)
    empty = padded()
    empty["attention_mask"][1] = 0
    with pytest.raises(PromptError, match="must hold at least one token"):
        model.generate(**empty, max_new_tokens=6, custom_generate=orthrus.hf_generate)
