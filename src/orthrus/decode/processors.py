"""Options that depend on a row's text: transformers' logits processors, in its order, with one row's own values.

A processor is a function of a text and the logits after it, so it can be applied to every slot of a block. Those that
keep a state from call to call cannot, and are refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, WatermarkingConfig
from transformers.generation import logits_process as hf

from orthrus.errors import ConfigError
from orthrus.kernels.vocabulary import NucleusWarper


class Request(NamedTuple):
    """What processors are made for.

    Attributes:
        prompt: tokens in the prompt.
        number: which prompt of its call it is.
        max_new_tokens: tokens that may be written.
        eos: tokens that end the text.
        vocabulary: tokens there are.
        device: where the logits are.
    """

    prompt: int
    number: int
    max_new_tokens: int
    eos: tuple[int, ...]
    vocabulary: int
    device: torch.device

    @property
    def ends(self) -> Tensor:
        """The tokens that end the text, as a tensor."""
        return torch.tensor(self.eos, dtype=torch.long, device=self.device)


class CountPenalty:
    """Lower the logits of tokens written before: by `presence` once, and by `frequency` for each time.

    As OpenAI's options of these names; the prompt does not count.
    """

    def __init__(self, prompt: int, *, presence: float = 0.0, frequency: float = 0.0) -> None:
        self.prompt, self.presence, self.frequency = prompt, presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores `[B, V]` after texts `[B, L]`."""
        written = input_ids[:, self.prompt :]
        counts = torch.zeros_like(scores).scatter_add_(1, written, torch.ones_like(written, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)


Make: TypeAlias = Callable[[Any, Request], Any]

BEFORE: Final[dict[str, Make]] = {
    "sequence_bias": lambda value, _: hf.SequenceBiasLogitsProcessor(value),
    "repetition_penalty": lambda value, _: hf.RepetitionPenaltyLogitsProcessor(float(value)),
    "presence_penalty": lambda value, row: CountPenalty(row.prompt, presence=float(value)),
    "frequency_penalty": lambda value, row: CountPenalty(row.prompt, frequency=float(value)),
    "no_repeat_ngram_size": lambda value, _: hf.NoRepeatNGramLogitsProcessor(value),
    "bad_words_ids": lambda value, row: hf.NoBadWordsLogitsProcessor(value, row.ends if row.eos else None),
    "min_length": lambda value, row: hf.MinLengthLogitsProcessor(value, row.ends) if row.eos else None,
    "min_new_tokens": lambda value, row: (
        hf.MinNewTokensLengthLogitsProcessor(row.prompt, value, row.ends) if row.eos else None
    ),
    "prefix_allowed_tokens_fn": lambda value, row: constrained(value, row.number),
    "forced_bos_token_id": lambda value, _: hf.ForcedBOSTokenLogitsProcessor(value),
    "forced_eos_token_id": lambda value, row: hf.ForcedEOSTokenLogitsProcessor(
        row.prompt + row.max_new_tokens, value, device=str(row.device)
    ),
    "remove_invalid_values": lambda _, __: hf.InfNanRemoveLogitsProcessor(),
    "exponential_decay_length_penalty": lambda value, row: hf.ExponentialDecayLengthPenalty(
        value, row.ends, row.prompt
    ),
    "suppress_tokens": lambda value, row: hf.SuppressTokensLogitsProcessor(value, device=str(row.device)),
    "begin_suppress_tokens": lambda value, row: hf.SuppressTokensAtBeginLogitsProcessor(
        value, row.prompt, device=str(row.device)
    ),
}
"""Options that move greedy choices too, in the order they are applied."""

WARPERS: Final[dict[str, Make]] = {
    "temperature": lambda value, _: hf.TemperatureLogitsWarper(float(value)),
    "top_h": lambda value, _: hf.TopHLogitsWarper(value),
    "top_k": lambda value, _: hf.TopKLogitsWarper(value),
    "top_p": lambda value, _: NucleusWarper(value),
    "min_p": lambda value, _: hf.MinPLogitsWarper(value),
    "typical_p": lambda value, _: hf.TypicalLogitsWarper(value),
    "epsilon_cutoff": lambda value, _: hf.EpsilonLogitsWarper(value),
    "eta_cutoff": lambda value, row: hf.EtaLogitsWarper(value, device=str(row.device)),
}
"""Options of sampling; they come after those above and the caller's own processors."""

LAST: Final[dict[str, Make]] = {
    "watermarking_config": lambda value, row: _watermark(value).construct_processor(row.vocabulary, row.device),
    "renormalize_logits": lambda _, __: hf.LogitNormalization(),
}
"""Options that come after the warpers, sampling or not."""

OFF: Final[dict[str, Any]] = {
    "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "no_repeat_ngram_size": 0,
    "min_length": 0, "min_new_tokens": 0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
    "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "remove_invalid_values": False,
    "renormalize_logits": False,
}  # fmt: skip
"""Values that ask for nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a row's processors are made.

    Attributes:
        asked: options by name, those of sampling included.
        callers: the caller's own processors; one of a type that an option makes too takes its place.
        do_sample: whether warpers apply.
    """

    asked: Mapping[str, Any]
    callers: Sequence[LogitsProcessor] = ()
    do_sample: bool = False

    def __call__(self, request: Request) -> LogitsProcessorList:
        """Make the list for one row; raises ConfigError for a value that its processor refuses."""
        listed = made(BEFORE, self.asked, request)
        out = LogitsProcessorList(
            next((processor for processor in self.callers if type(processor) is type(p)), p) for p in listed
        )
        out.extend(processor for processor in self.callers if processor not in out)
        if self.do_sample:
            out.extend(made(WARPERS, self.asked, request))
        out.extend(made(LAST, self.asked, request))
        return out


def made(makers: Mapping[str, Make], asked: Mapping[str, Any], request: Any = None) -> list[LogitsProcessor]:
    """Make the processors of the options that ask for something; raises ConfigError for a value that one refuses."""
    out = []
    for name, make in makers.items():
        value = asked.get(name)
        if value is None or (name in OFF and value == OFF[name]):
            continue
        try:
            processor = make(value, request)
        except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
            raise ConfigError(f"{name} cannot be {value!r}: {error}") from error
        if processor is not None:
            out.append(processor)
    return out


def constrained(allowed: Callable[[int, Tensor], list[int]], number: int) -> LogitsProcessor:
    """Return the processor of `prefix_allowed_tokens_fn` for the prompt of this number."""
    return hf.PrefixConstrainedLogitsProcessor(lambda _, text: allowed(number, text), 1)


def _watermark(config: Any) -> WatermarkingConfig:
    if isinstance(config, Mapping):
        config = WatermarkingConfig.from_dict(dict(config))
    if not isinstance(config, WatermarkingConfig):
        raise ConfigError(
            f"watermarking_config must be a WatermarkingConfig, found {type(config).__name__}: other watermarks keep a "
            "state from token to token, which drafts would spoil"
        )
    return config
