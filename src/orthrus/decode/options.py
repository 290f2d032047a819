"""Generation options: Hugging Face's `GenerationConfig` vocabulary, honoured or refused by name.

Knows which options this package implements and what values they may take; knows no model and no tokenizer.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Final

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, PositiveFloat, ValidationError
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria

from orthrus.decode import processors
from orthrus.decode.processors import Recipe, Request
from orthrus.errors import ConfigError

WITHOUT_EFFECT: Final = {
    # Bookkeeping of transformers that changes no token here.
    "transformers_version",
    "pad_token_id",
    "bos_token_id",
    "use_cache",
    "return_dict_in_generate",
    "custom_generate",
    "max_length",
    "disable_compile",
    "prefill_chunk_size",
    # Settings of an assistant model, of which there is none here.
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
}
"""Settings of a whole `GenerationConfig` that are passed over, for they change no text here."""

_ASKS_NOTHING: Final[dict[str, float]] = {
    # `generate` writes these into every config before it decodes; other values ask for something.
    "num_beams": 1,
    "length_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "num_return_sequences": 1,
    "encoder_repetition_penalty": 1.0,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "guidance_scale": 1.0,
}

_BEAMS: Final = "beam search keeps several texts of a prompt, and drafts follow one"
_OTHER_DRAFTS: Final = "the diffusion view drafts (plan='lookup' copies from the text)"
_OWN_CACHE: Final = "this decoder keeps a cache of its own"
_CONTRASTIVE: Final = "contrastive search needs hidden states of every candidate"
_LOGITS: Final = "hf_generate returns them, and engines give them with keep_logits"
_PASSES: Final = "its passes do not return them"

REFUSED: Final[dict[str, str]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping"), _BEAMS),
    **dict.fromkeys(("constraints", "force_words_ids"), _BEAMS),
    **dict.fromkeys(("penalty_alpha", "low_memory"), _CONTRASTIVE),
    "dola_layers": "DoLa needs the logits of other layers",
    "guidance_scale": "it needs a second pass of the backbone for every token",
    **dict.fromkeys(("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"), _OTHER_DRAFTS),
    **dict.fromkeys(("is_assistant", "max_matching_ngram_size", "assistant_ensemble_weight"), _OTHER_DRAFTS),
    "speculation_type": _OTHER_DRAFTS,
    "inputs_embeds": "drafts and plans need the prompt's tokens: give input_ids",
    **dict.fromkeys(("cache_implementation", "cache_config", "max_cache_len", "past_key_values"), _OWN_CACHE),
    **dict.fromkeys(("output_scores", "output_logits"), _LOGITS),
    **dict.fromkeys(("output_attentions", "output_hidden_states"), _PASSES),
    "compile_config": "orthrus.load(compile=True) compiles its passes",
    "token_healing": "it changes the prompt",
    **dict.fromkeys(("encoder_repetition_penalty", "encoder_no_repeat_ngram_size"), "there is no encoder"),
    "decoder_start_token_id": "there is no encoder",
    "continuous_batching_config": "engines batch by themselves",
    "max_length": "it counts the prompt too: give max_new_tokens",
    "num_return_sequences": "give the prompt as often as texts are wanted",
}
"""Options that are not honoured, and why."""

_MEANT: Final = {"stop": "stop_strings", "max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
"""What options of other libraries are called here."""

LARGEST_SEED: Final = 2**63 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen from the backbone's logits; rows with equal values share one processing step."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Everything a caller may ask of one completion.

    Attributes:
        max_new_tokens: tokens to write at most (fewer when the model's context ends).
        sampling: how each token is chosen.
        eos_token_id: tokens that end the text; empty for none.
        stop_strings: texts that end the completion as soon as they appear (they stay in it, as in transformers).
        stopping_criteria: rules of the caller's, asked after every token with the text so far, `[1, L]`, and no scores.
        max_time: seconds after which no further cycle adds a token (the one that it is noticed at still does).
        seed: with the prompt's index, fixes every draw of a sampled row.
        processors: makes a row's logits processors, warpers included, where options need them; each is called for
            every slot with that slot's own text, twice where it is drafted, so it must be a function of its arguments.
        keep_logits: whether `Progress.kept` holds the logits that tokens were chosen by.
    """

    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    eos_token_id: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    stopping_criteria: tuple[StoppingCriteria, ...] = ()
    max_time: float | None = None
    seed: int = 0
    processors: Callable[[Request], LogitsProcessorList] | None = None
    keep_logits: bool = False

    @classmethod
    def of(cls, defaults: GenerationConfig | None = None, **asked: Any) -> "Options":
        """Check the options asked for and complete them.

        Sampling without a seed takes one from torch's default generator, so that `torch.manual_seed` decides.

        Args:
            defaults: the model's own generation config; only its end-of-text tokens are taken.
            **asked: options by Hugging Face's names; None means not asked for.

        Raises:
            ConfigError: an unknown option, a value out of range, or options that contradict each other.
        """
        given = {name: value for name, value in asked.items() if value is not None}
        for name in given:
            if name not in HONOURED:
                raise ConfigError(_refusal(name))
        if defaults is not None:
            given.setdefault("eos_token_id", defaults.eos_token_id)
        checked = _checked(given)
        if checked.do_sample and "seed" not in given:
            checked.seed = int(torch.randint(LARGEST_SEED, ()))
        sampling = Sampling(**checked.model_dump(include=_SAMPLING))
        settled = {name: value for name, value in checked if name not in (*_SAMPLING, "logits_processor")}
        return cls(**settled, sampling=sampling, processors=_recipe(given, sampling, checked))


def from_generation_config(config: GenerationConfig, **asked: Any) -> Options:
    """Take a whole `GenerationConfig`; raises ConfigError for any setting of it that this decoder does not honour."""
    given = {name: value for name, value in vars(config).items() if _asks(name, value)}
    if "max_new_tokens" not in given and config.max_length is not None and "max_new_tokens" not in asked:
        raise ConfigError("max_new_tokens is required: max_length counts the prompt too and is not honoured")
    if not given.get("do_sample", False):
        # A greedy config may carry sampling values that transformers ignores too.
        for name in processors.WARPERS:
            given.pop(name, None)
    return Options.of(None, **{**given, **asked})


def _asks(name: str, value: Any) -> bool:
    """Tell settings that could change a token from bookkeeping and from values that stand for "off"."""
    if value is None or value is False or name in WITHOUT_EFFECT or name.startswith("_"):
        return False
    if name in processors.OFF and name not in _SAMPLING:
        return bool(value != processors.OFF[name])
    return name not in _ASKS_NOTHING or bool(value != _ASKS_NOTHING[name])


def _refusal(name: str) -> str:
    if name in REFUSED:
        return f"generation option {name!r} is not honoured by this decoder: {REFUSED[name]}"
    near = [_MEANT[name]] if name in _MEANT else difflib.get_close_matches(name, HONOURED, n=1, cutoff=0.75)
    hint = f"; did you mean {near[0]!r}?" if near else f"; it honours: {', '.join(sorted(HONOURED))}"
    return f"generation option {name!r} is not honoured by this decoder{hint}"


def _checked(given: dict[str, Any]) -> "_Checked":
    """Check the values of options; raises ConfigError for the first that is out of range, or has no effect."""
    try:
        checked = _Checked(**given)
    except ValidationError as error:
        fault = error.errors()[0]
        raise ConfigError(f"{fault['loc'][0]}: {fault['msg']}, found {fault['input']!r}") from None
    idle = [name for name in processors.WARPERS if name in given and (name in _SAMPLING or _asks(name, given[name]))]
    if idle and not checked.do_sample:
        raise ConfigError(f"{idle[0]} has an effect only when sampling: add do_sample=True, or leave it out")
    if given.get("exponential_decay_length_penalty") and not checked.eos_token_id:
        raise ConfigError("exponential_decay_length_penalty needs an eos_token_id to favour, found none")
    return checked


def _recipe(given: dict[str, Any], sampling: Sampling, checked: "_Checked") -> Recipe | None:
    """Return how rows' processors are made, or None where `Sampling` says it all."""
    asked = {name: given[name] for name in _PROCESSED if name in given and _asks(name, given[name])}
    if not (asked or checked.logits_processor):
        return None
    recipe = Recipe(
        asked={**asked, **{name: getattr(sampling, name) for name in _SAMPLING}},
        callers=checked.logits_processor,
        do_sample=sampling.do_sample,
    )
    # Making them once refuses values out of range.
    recipe(Request(1, 0, checked.max_new_tokens, checked.eos_token_id, 1 << 10, torch.device("cpu")))
    return recipe


def _listed(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    value = value.tolist() if isinstance(value, Tensor) else value
    return tuple(value) if isinstance(value, list | tuple | set) else (value,)


def _ends(value: Any) -> tuple[Any, ...]:
    """Return the tokens that end a text; -1 stands for none."""
    return tuple(token for token in _listed(value) if not (type(token) is int and token == -1))


class _Checked(BaseModel):
    """Options whose values are checked here; those of processors are checked by these."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")

    max_new_tokens: Annotated[int, Field(gt=0)] = 256
    do_sample: bool = False
    temperature: PositiveFloat = 1.0
    top_k: NonNegativeInt = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: PositiveFloat = 1.0
    logits_processor: Annotated[tuple[Callable[..., Any], ...], BeforeValidator(_listed)] = ()
    eos_token_id: Annotated[tuple[NonNegativeInt, ...], BeforeValidator(_ends)] = ()
    stop_strings: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_listed)] = ()
    stopping_criteria: Annotated[tuple[Callable[..., Any], ...], BeforeValidator(_listed)] = ()
    max_time: float | None = None
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] = 0


_SAMPLING = {one.name for one in fields(Sampling)}
_PROCESSED = [name for name in (*processors.BEFORE, *processors.WARPERS, *processors.LAST) if name not in _SAMPLING]

HONOURED: Final = (*_Checked.model_fields, *_PROCESSED)
"""Options by the names they are asked for."""
