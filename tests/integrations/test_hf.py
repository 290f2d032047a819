"""`generate(custom_generate=orthrus.hf_generate)` returns what plain `generate` returns, or refuses by name."""

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    SuppressTokensLogitsProcessor,
    SynthIDTextWatermarkingConfig,
    TextIteratorStreamer,
    TextStreamer,
    WatermarkingConfig,
)

import orthrus
from orthrus.errors import ConfigError, PromptError
from tests.decode.drive import dual
from tests.families import VOCAB, tiny

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


# ---------------------------------------------------------------- options, processors and criteria


def near_forbidden(input_ids: Tensor, scores: Tensor) -> Tensor:
    """A caller's processor that looks at the last token and at how long the text is, padding included."""
    out = scores.clone()
    for row, text in enumerate(input_ids.tolist()):
        out[row, [text[-1], (text[-1] + len(text)) % VOCAB]] = -torch.inf
    return out


class Pairs(StoppingCriteria):
    """A caller's criterion: the last two tokens, or the padded length."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return ((input_ids[:, -2:].sum(1) % 5 == 0) & (input_ids.shape[1] > 9)) | (input_ids.shape[1] > 16)


def allowed(index: int, text: Tensor) -> list[int]:
    """Other tokens for each prompt of the batch, by the last one and the length."""
    return [(int(text[-1]) * 7 + len(text) + step) % VOCAB for step in range(5 + 4 * index)]


HONOURED: dict[str, Callable[[list[list[int]]], dict[str, Any]]] = {
    "sequence bias": lambda t: {"sequence_bias": [[[t[0][2]], -9.0], [[t[1][0], t[1][1]], -9.0]]},
    "penalty": lambda t: {"repetition_penalty": 1.5, "suppress_tokens": [t[2][3]]},
    "n-grams": lambda t: {"no_repeat_ngram_size": 1},
    "bad words": lambda t: {"bad_words_ids": [[t[0][1], t[0][2]], [t[2][0]]]},
    "least length": lambda t: {"min_length": 15, "eos_token_id": [t[0][3], t[2][2]], "pad_token_id": 0},
    "least new tokens": lambda t: {"min_new_tokens": 6, "eos_token_id": t[0][3], "pad_token_id": 0},
    "allowed tokens": lambda t: {"prefix_allowed_tokens_fn": allowed},
    "forced end": lambda t: {"forced_eos_token_id": 9},
    "decay": lambda t: {"exponential_decay_length_penalty": (3, 2.0), "eos_token_id": 11, "pad_token_id": 0},
    "suppressed": lambda t: {"suppress_tokens": [t[0][1], t[1][1]], "begin_suppress_tokens": [t[2][0]]},
    "watermark": lambda t: {"watermarking_config": WatermarkingConfig(bias=6.0)},
    "normalised": lambda t: {"renormalize_logits": True, "remove_invalid_values": True, "suppress_tokens": [t[0][0]]},
    "own processor": lambda t: {"logits_processor": LogitsProcessorList([near_forbidden])},
    "own warper": lambda t: {"logits_processor": LogitsProcessorList([SuppressTokensLogitsProcessor([t[0][0]])])},
    "own length": lambda t: {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(11)])},
    "own end": lambda t: {
        "stopping_criteria": StoppingCriteriaList([EosTokenCriteria(t[0][4])]),
        "eos_token_id": t[0][2],
        "pad_token_id": 0,
    },
    "own criterion": lambda t: {
        "stopping_criteria": StoppingCriteriaList([Pairs()]),
        "eos_token_id": 95,
        "pad_token_id": 0,
    },
}


@pytest.mark.parametrize("name", HONOURED)
def test_options_equal_plain_generate_in_a_padded_batch(
    name: str, model: PreTrainedModel, plain: PreTrainedModel
) -> None:
    """The same tensor under a chain, a tree and a fused pass; and another one than without the option."""
    without = plain.generate(**padded(), max_new_tokens=12)
    asked = HONOURED[name](without[:, 7:].tolist())
    expected = plain.generate(**padded(), max_new_tokens=12, **asked)
    assert expected.tolist() != without.tolist()
    for plan in ("full", "tree:6", "onepass:2"):
        made = model.generate(**padded(), max_new_tokens=12, plan=plan, custom_generate=orthrus.hf_generate, **asked)
        assert made.tolist() == expected.tolist(), plan


def test_stop_strings_stop_as_a_criterion(
    model: PreTrainedModel, plain: PreTrainedModel, characters: PreTrainedTokenizerBase
) -> None:
    """Transformers keeps the tokenizer from custom functions, not so its criterion."""
    text = characters.decode(plain.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=12)[0, 6:8])
    asked = {
        "max_new_tokens": 12,
        "stopping_criteria": StoppingCriteriaList([StopStringCriteria(characters, [text.replace(" ", "")])]),
    }
    expected = plain.generate(torch.tensor([[5, 6, 7]]), **asked)
    made = model.generate(torch.tensor([[5, 6, 7]]), custom_generate=orthrus.hf_generate, **asked)
    assert made.tolist() == expected.tolist()
    assert made.shape[1] < 15


def test_a_batch_padded_on_the_right_is_read_without_its_padding(
    model: PreTrainedModel, plain: PreTrainedModel
) -> None:
    """Texts follow as if it were padded on the left (transformers warns of it by itself)."""
    left = padded()
    expected = plain.generate(**left, max_new_tokens=8)[:, 7:]
    right = {
        "input_ids": torch.tensor([p + [0] * (7 - len(p)) for p in PROMPTS]),
        "attention_mask": left["attention_mask"].flip(1),
    }
    made = model.generate(**right, max_new_tokens=8, custom_generate=orthrus.hf_generate)
    assert torch.equal(made[:, 7:], expected)
    assert torch.equal(made[:, :7], right["input_ids"])


@pytest.mark.parametrize("ends", ["tensor", "list", -1])
def test_end_tokens_come_in_every_form(ends: Any, model: PreTrainedModel, plain: PreTrainedModel) -> None:
    """A tensor, a list, and -1 for none."""
    found = end_tokens(plain)
    given = torch.tensor(found) if ends == "tensor" else found if ends == "list" else -1
    asked = {"max_new_tokens": 12, "pad_token_id": 0}
    made = model.generate(**padded(), **asked, eos_token_id=given, custom_generate=orthrus.hf_generate)
    assert torch.equal(made, plain.generate(**padded(), **asked, eos_token_id=given))


@pytest.mark.parametrize("asked", [{}, {"repetition_penalty": 1.4, "min_new_tokens": 5}])
@pytest.mark.parametrize("plan", ["full", "tree:6", "ar"])
def test_dictionaries_hold_the_logits_that_tokens_were_chosen_by(
    plan: str, asked: dict[str, Any], model: PreTrainedModel, plain: PreTrainedModel
) -> None:
    """As `generate` has them, up to each row's end and with zeros after it."""
    more: dict[str, Any] = {
        "max_new_tokens": 12, "eos_token_id": end_tokens(plain), "pad_token_id": 0,
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True, **asked,
    }  # fmt: skip
    expected = plain.generate(**padded(), **more)
    made = model.generate(**padded(), **more, plan=plan, custom_generate=orthrus.hf_generate)
    assert made.sequences.tolist() == expected.sequences.tolist()
    assert (made.attentions, made.hidden_states, made.past_key_values) == (None, None, None)
    live = torch.ones(3, dtype=torch.bool)
    for own, other in ((made.scores, expected.scores), (made.logits, expected.logits)):
        assert len(own) == len(other)
        live[:] = True
        for step, (one, two) in enumerate(zip(own, other, strict=True)):
            torch.testing.assert_close(one[live], two[live], rtol=0, atol=1e-4)
            assert not one[~live].any()
            live &= ~torch.isin(expected.sequences[:, 7 + step], torch.tensor(more["eos_token_id"]))
    alone = model.generate(
        **padded(), max_new_tokens=3, return_dict_in_generate=True, custom_generate=orthrus.hf_generate
    )
    assert (alone.scores, alone.logits) == (None, None)


# ---------------------------------------------------------------- streamers


@pytest.mark.parametrize("bound", [False, True])
def test_streamer_gets_prompt_and_text(
    bound: bool, model: PreTrainedModel, characters: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given to `generate`, which keeps it from custom functions (transformers 5.23), or bound beforehand."""
    ids = torch.tensor([[5, 6, 7]])
    streamer = TextStreamer(characters, skip_prompt=True)
    if bound:
        out = model.generate(
            ids, max_new_tokens=12, custom_generate=functools.partial(orthrus.hf_generate, streamer=streamer)
        )
    else:
        out = model.generate(ids, max_new_tokens=12, streamer=streamer, custom_generate=orthrus.hf_generate)
    assert capsys.readouterr().out.strip() == characters.decode(out[0, 3:])
    streaming = functools.partial(orthrus.hf_generate, streamer=streamer)
    with pytest.raises(ConfigError, match="a streamer needs a single prompt, found 3"):
        model.generate(**padded(), max_new_tokens=12, custom_generate=streaming)


@pytest.mark.parametrize("fails", [False, True])
def test_a_reader_in_another_thread_gets_the_text_and_its_end(
    fails: bool, model: PreTrainedModel, characters: PreTrainedTokenizerBase
) -> None:
    """Also where the call is refused: nobody waits for ever."""
    streamer = TextIteratorStreamer(characters, skip_prompt=True, timeout=20)
    pieces: list[str] = []
    reader = threading.Thread(target=lambda: pieces.extend(streamer))
    reader.start()
    asked = {"max_new_tokens": 12, "streamer": streamer, "custom_generate": orthrus.hf_generate}
    if fails:
        with pytest.raises(ConfigError, match="cache_implementation"):
            model.generate(torch.tensor([[5, 6, 7]]), cache_implementation="static", **asked)
    else:
        out = model.generate(torch.tensor([[5, 6, 7]]), **asked)
    reader.join(timeout=20)
    assert not reader.is_alive()
    assert fails or "".join(pieces).strip() == characters.decode(out[0, 3:])


# ---------------------------------------------------------------- refusals


def filled_cache() -> DynamicCache:
    cache = DynamicCache()
    cache.update(torch.zeros(3, 2, 1, 12), torch.zeros(3, 2, 1, 12), 0)
    return cache


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "beams": (lambda: {"num_beams": 2}, "'num_beams' is not honoured by this decoder: beam search"),
    "guidance": (
        lambda: {"guidance_scale": 1.5},
        "'guidance_scale' is not honoured by this decoder: it needs a second",
    ),
    "assistant": (
        lambda: {"assistant_model": tiny("qwen3")},
        "assistant_model is not honoured by this decoder: the diff",
    ),
    "lookup": (lambda: {"prompt_lookup_num_tokens": 3}, "'prompt_lookup_num_tokens' is not honoured.*plan='lookup'"),
    "cache kind": (lambda: {"cache_implementation": "static"}, "'cache_implementation' is not honoured.*its? own"),
    "state": (
        lambda: {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[1], ngram_len=3)},
        "'watermarking_config' is not honoured by this decoder: this watermark keeps a state",
    ),
    "attentions": (
        lambda: {"output_attentions": True, "return_dict_in_generate": True},
        "'output_attentions' is not honoured",
    ),
    "hidden states": (
        lambda: {"output_hidden_states": True, "return_dict_in_generate": True},
        "'output_hidden_states' is not honoured",
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
    """Options and arguments alike, with the reason; nothing passes silently."""
    make, message = REFUSED[kind]
    with pytest.raises(ConfigError, match=message):
        model.generate(**{**padded(), "max_new_tokens": 6, **make()}, custom_generate=orthrus.hf_generate)


def test_what_a_processor_raises_is_raised(model: PreTrainedModel) -> None:
    """As `generate` does, whichever row it was."""

    def broken(input_ids: Tensor, scores: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        model.generate(
            **padded(),
            max_new_tokens=6,
            logits_processor=LogitsProcessorList([broken]),
            custom_generate=orthrus.hf_generate,
        )


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
