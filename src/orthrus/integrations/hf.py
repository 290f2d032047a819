"""Orthrus inside Hugging Face's `generate`: `model.generate(**inputs, custom_generate=orthrus.hf_generate)`.

Knows what `generate` hands to a custom decoding function and what it expects back; every part of it that this
decoder does not honour is refused by name. Knows no text: tokens in, tokens out.

Shapes: B rows, T prompt positions, padding included.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import BaseStreamer

from orthrus.decode.api import Mode, engine_for, plan_of
from orthrus.decode.engine import Engine
from orthrus.decode.exact import Exact
from orthrus.decode.options import Options, from_generation_config
from orthrus.errors import ConfigError
from orthrus.model.attach import config_of

_PROCESSORS = {
    # What `generate` derives from honoured options: the option, and the processor's own name for its value.
    RepetitionPenaltyLogitsProcessor: ("repetition_penalty", "penalty"),
    TemperatureLogitsWarper: ("temperature", "temperature"),
    TopKLogitsWarper: ("top_k", "top_k"),
    TopPLogitsWarper: ("top_p", "top_p"),
    MinPLogitsWarper: ("min_p", "min_p"),
}
_WITHOUT_EFFECT = ("use_cache", "logits_to_keep", "cache_position")


def hf_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    mode: Mode = "orthrus",
    plan: str | None = None,
    exact: Exact = "distribution",
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Tensor:
    """Decode a padded batch for `generate(custom_generate=orthrus.hf_generate)`; returns `[B, T + longest]` ids.

    A sampled call takes its seed from torch's default generator, so `torch.manual_seed` reproduces it; a `seed` in
    the generation config goes before. Stop strings and streamers do not reach custom decoding functions in
    transformers 5.23: use `orthrus.generate` for the former, and for the latter
    `custom_generate=functools.partial(orthrus.hf_generate, streamer=...)`.

    Args:
        model: a dual-view model.
        input_ids: prompts `[B, T]`, padded on the left where `attention_mask` is 0.
        logits_processor: what `generate` built from the options; anything else is refused.
        stopping_criteria: the same.
        generation_config: the options, completed by `generate`.
        mode: as for `orthrus.generate`; pass it to `generate` itself, like `plan` and `exact`.
        plan: what each cycle does.
        exact: strength of the promise.
        streamer: gets the prompt and then every token, for a single prompt.
        **model_kwargs: `attention_mask`, and what `generate` adds to it.

    Raises:
        ConfigError: an option, processor, criterion or model argument that is not honoured.
        PromptError: a row without tokens, or longer than the model's context.
    """
    config_of(model)
    options = _options(generation_config, input_ids.shape[1])
    _check_processors(logits_processor, options)
    _check_criteria(stopping_criteria, generation_config, options)
    prompts = _prompts(input_ids, model_kwargs)
    if streamer is not None and len(prompts) > 1:
        raise ConfigError(f"a streamer needs a single prompt, found {len(prompts)}: stream them one by one")
    engine = engine_for(model, prompts, options, plan_of(mode, plan), rows=len(prompts), exact=exact)
    for index, prompt in enumerate(prompts):
        engine.add(prompt, options, index=index)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    texts = _run(engine, streamer)
    # As in transformers, the first end-of-text token pads where no other is named; without either nothing ends early.
    pad = (
        generation_config.pad_token_id if generation_config.pad_token_id is not None else (*options.eos_token_id, 0)[0]
    )
    return _padded(input_ids, texts, pad=pad)


def _run(engine: Engine, streamer: BaseStreamer | None) -> list[list[int]]:
    texts: dict[int, list[int]] = {}
    for progress in engine.run():
        if progress.row.error is not None:
            raise progress.row.error
        texts[progress.row.id] = progress.row.token_ids
        if streamer is not None:
            for token in progress.token_ids:
                streamer.put(torch.tensor([token]))
    if streamer is not None:
        streamer.end()
    return [texts[id] for id in sorted(texts)]


def _padded(input_ids: Tensor, texts: list[list[int]], *, pad: int) -> Tensor:
    longest = max(map(len, texts))
    new = [text + [pad] * (longest - len(text)) for text in texts]
    return torch.cat([input_ids, torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device)], dim=1)


def _options(config: GenerationConfig, prompt_length: int) -> Options:
    """Take the options; `generate` has settled how long the rows may get, padding included, in `max_length`."""
    if config.return_dict_in_generate:
        raise ConfigError("return_dict_in_generate is not honoured: hf_generate returns the token ids")
    if config.stop_strings:
        raise ConfigError("stop_strings is not honoured inside generate(): use orthrus.generate(stop_strings=...)")
    own = copy.copy(config)
    own.num_return_sequences = None  # `generate` has repeated the rows already
    asked: dict[str, int] = {"max_new_tokens": config.max_length - prompt_length}
    if config.do_sample and config.to_dict().get("seed") is None:
        asked["seed"] = int(torch.randint(2**62, ()))
    return from_generation_config(own, **asked)


def _check_processors(processors: LogitsProcessorList, options: Options) -> None:
    for processor in processors:
        option, attribute = _PROCESSORS.get(type(processor), (None, ""))
        if option is None or getattr(processor, attribute) != getattr(options.sampling, option):
            raise ConfigError(
                f"logits processor {type(processor).__name__} is not honoured: this decoder takes only those that "
                "generate() derives from its options"
            )


def _check_criteria(criteria: StoppingCriteriaList, config: GenerationConfig, options: Options) -> None:
    for criterion in criteria:
        length = isinstance(criterion, MaxLengthCriteria) and criterion.max_length == config.max_length
        eos = isinstance(criterion, EosTokenCriteria) and {*criterion.eos_token_id.tolist()} == {*options.eos_token_id}
        if not (length or eos):
            raise ConfigError(
                f"stopping criterion {type(criterion).__name__} is not honoured: this decoder takes only those that "
                "generate() derives from its options"
            )


def _prompts(input_ids: Tensor, model_kwargs: Mapping[str, Any]) -> list[list[int]]:
    """Return each row's own tokens; raises ConfigError for model arguments that would change what it reads."""
    given = {name: value for name, value in model_kwargs.items() if value is not None and name not in _WITHOUT_EFFECT}
    mask = given.pop("attention_mask", torch.ones_like(input_ids)).bool()
    positions = given.pop("position_ids", None)
    cache = given.pop("past_key_values", None)
    if given:
        raise ConfigError(f"model argument {sorted(given)[0]!r} is not honoured: give the prompt as input_ids")
    if cache is not None and cache.get_seq_length() > 0:
        raise ConfigError(
            f"past_key_values must be empty, found {cache.get_seq_length()} positions: this decoder keeps its own cache"
        )
    if positions is not None and bool((positions != mask.long().cumsum(1) - 1)[mask].any()):
        raise ConfigError("position_ids must count each row's tokens from 0, found others: leave them out")
    return [row[own].tolist() for row, own in zip(input_ids, mask.to(input_ids.device), strict=True)]
