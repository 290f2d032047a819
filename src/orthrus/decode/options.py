"""Generation options: Hugging Face's `GenerationConfig` vocabulary, honoured or refused by name.

Knows which options this package implements and what values they may take; knows no model and no tokenizer.
"""

import difflib
import math
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import GenerationConfig

from orthrus.errors import ConfigError

_WITHOUT_EFFECT = {
    # Bookkeeping of transformers that changes no token here.
    "transformers_version",
    "pad_token_id",
    "bos_token_id",
    "use_cache",
    "return_dict_in_generate",
    "custom_generate",
    "max_length",
    # Settings of an assistant model, of which there is none here.
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
}

_ASKS_NOTHING: dict[str, float] = {
    # `generate` writes these into every config before it decodes; other values ask for something.
    "min_length": 0,
    "num_beams": 1,
    "typical_p": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "num_return_sequences": 1,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
}


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
        seed: with the prompt's index, fixes every draw of a sampled row.
    """

    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    eos_token_id: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int = 0

    @classmethod
    def of(cls, defaults: GenerationConfig | None = None, **asked: Any) -> "Options":
        """Check the options asked for and complete them.

        Args:
            defaults: the model's own generation config; only its end-of-text tokens are taken.
            **asked: options by Hugging Face's names; None means not asked for.

        Raises:
            ConfigError: an unknown option, a value out of range, or options that contradict each other.
        """
        given = {name: value for name, value in asked.items() if value is not None}
        known = [*_SAMPLING, "max_new_tokens", "eos_token_id", "stop_strings", "seed"]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise ConfigError(
                    f"generation option {name!r} is not honoured by this decoder"
                    + (f"; did you mean {near[0]!r}?" if near else f"; it honours: {', '.join(sorted(known))}")
                )
        eos = given.get("eos_token_id", None if defaults is None else defaults.eos_token_id)
        stop = given.get("stop_strings", ())
        return cls(
            max_new_tokens=_integer("max_new_tokens", given.get("max_new_tokens", 256), 1),
            sampling=_sampling({name: given[name] for name in _SAMPLING if name in given}),
            eos_token_id=tuple(_integer("eos_token_id", e, 0) for e in _listed(eos)),
            stop_strings=tuple(_stop_string(s) for s in _listed(stop)),
            seed=_integer("seed", given.get("seed", 0), 0),
        )


def from_generation_config(config: GenerationConfig, **asked: Any) -> Options:
    """Take a whole `GenerationConfig`; raises ConfigError for any setting of it that this decoder does not honour."""
    given = {name: value for name, value in config.to_dict().items() if _asks(name, value)}
    if "max_new_tokens" not in given and config.max_length is not None and "max_new_tokens" not in asked:
        raise ConfigError("max_new_tokens is required: max_length counts the prompt too and is not honoured")
    if not given.get("do_sample", False):
        # A greedy config may carry sampling values that transformers ignores too.
        for name in ("temperature", "top_k", "top_p", "min_p"):
            given.pop(name, None)
    return Options.of(None, **{**given, **asked})


def _asks(name: str, value: Any) -> bool:
    """Tell settings that could change a token from bookkeeping and from values that stand for "off"."""
    if value is None or value is False or name in _WITHOUT_EFFECT or name.startswith("_"):
        return False
    return name not in _ASKS_NOTHING or bool(value != _ASKS_NOTHING[name])


def _sampling(given: dict[str, Any]) -> Sampling:
    if not isinstance(given.get("do_sample", False), bool):
        raise ConfigError(f"do_sample must be True or False, found {given['do_sample']!r}")
    idle = [name for name in ("temperature", "top_k", "top_p", "min_p") if name in given]
    if idle and not given.get("do_sample", False):
        raise ConfigError(f"{idle[0]} has an effect only when sampling: add do_sample=True, or leave it out")
    ranges = {
        "temperature": (0.0, math.inf),
        "top_p": (0.0, 1.0),
        "repetition_penalty": (0.0, math.inf),
    }
    for name, (low, high) in ranges.items():
        if name in given:
            _number(name, given[name], f"above {low:g}" + (f" and at most {high:g}" if high < math.inf else ""))
            if not low < given[name] <= high or given[name] == math.inf:
                raise ConfigError(f"{name} must be above {low:g} and at most {high:g}, found {given[name]!r}")
    if "min_p" in given:
        _number("min_p", given["min_p"], "from 0 to 1")
        if not 0.0 <= given["min_p"] <= 1.0:
            raise ConfigError(f"min_p must be from 0 to 1, found {given['min_p']!r}")
    if "top_k" in given:
        _integer("top_k", given["top_k"], 0)
    return Sampling(**given)


def _number(name: str, value: Any, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ConfigError(f"{name} must be a number {allowed}, found {value!r}")


def _integer(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, found {value!r}")
    return value


def _stop_string(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"stop_strings must be non-empty text, found {value!r}")
    return value


def _listed(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple | set) else (value,)


_SAMPLING = tuple(f.name for f in fields(Sampling))
