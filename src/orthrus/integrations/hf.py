"""Orthrus inside Hugging Face's `generate`: `model.generate(**inputs, custom_generate=orthrus.hf_generate)`.

Whatever `generate` hands over and this decoder does not honour is refused by name. Shapes: B rows, T prompt positions,
padding included.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput
from transformers.generation import logits_process as processing

from orthrus.decode.api import Mode, engine_for, plan_of
from orthrus.decode.engine import Engine
from orthrus.decode.exact import Exact
from orthrus.decode.options import REFUSED, Options, from_generation_config
from orthrus.decode.processing import Kept
from orthrus.decode.processors import Request, constrained
from orthrus.decode.rows import Row
from orthrus.errors import ConfigError
from orthrus.model.attach import config_of

_PROCESSORS = {
    # What `Sampling` does for all slots at once: the option, and the processor's own name for its value.
    processing.RepetitionPenaltyLogitsProcessor: ("repetition_penalty", "penalty"),
    processing.TemperatureLogitsWarper: ("temperature", "temperature"),
    processing.TopKLogitsWarper: ("top_k", "top_k"),
    processing.TopPLogitsWarper: ("top_p", "top_p"),
    processing.MinPLogitsWarper: ("min_p", "min_p"),
}
_STATEFUL = {
    processing.UnbatchedClassifierFreeGuidanceLogitsProcessor: "guidance_scale",
    processing.SynthIDTextWatermarkLogitsProcessor: "watermarking_config",
}
_WITHOUT_EFFECT = ("use_cache", "logits_to_keep", "cache_position")
_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__


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
) -> Tensor | GenerateDecoderOnlyOutput:
    """Decode a padded batch for `generate(custom_generate=orthrus.hf_generate)`; returns `[B, T + longest]` ids.

    A sampled call takes its seed from torch's default generator, so `torch.manual_seed` reproduces it; a `seed` in
    the generation config goes before. Logits processors and stopping criteria, the caller's own too, see the texts that
    they see in `generate`, one row at a time and padding included; processors are called for every slot of a block, so
    they must be functions of their arguments, and criteria get no scores. For stop strings give
    `stopping_criteria=[StopStringCriteria(tokenizer, [...])]`: transformers keeps the tokenizer from custom functions.

    Args:
        input_ids: prompts `[B, T]`, padded where `attention_mask` is 0.
        mode, plan, exact: as for `orthrus.generate`; pass them to `generate` itself.
        streamer: gets the prompt and then every token, for a single prompt; `generate`'s own is found by itself.
        **model_kwargs: `attention_mask`, and what `generate` adds to it.

    With `return_dict_in_generate`, `scores` and `logits` hold the backbone's for each token where they are asked for,
    zeros after a row's end, and there is no cache.

    Raises:
        ConfigError: an option, processor or model argument that is not honoured.
        PromptError: a row without tokens, or longer than the model's context.
        Exception: what a processor or criterion raised.
    """
    outer = _arguments_of_generate(model)
    prompted = streamer is None and outer.get("streamer") is not None  # `generate` has given it the prompt
    streamer = streamer or outer.get("streamer")
    try:
        if outer.get("assistant_model") is not None:
            raise ConfigError(f"assistant_model is not honoured by this decoder: {REFUSED['assistant_model']}")
        config_of(model)
        options = _options(generation_config, logits_processor, stopping_criteria, input_ids.shape[1])
        prompts = _prompts(input_ids, model_kwargs)
        if streamer is not None and len(prompts) > 1:
            raise ConfigError(f"a streamer needs a single prompt, found {len(prompts)}: stream them one by one")
        engine = engine_for(model, prompts, options, plan_of(mode, plan), rows=len(prompts), exact=exact)
        padding_BT = _padding(input_ids, model_kwargs)
        for index, prompt in enumerate(prompts):
            pads_P = input_ids[index, padding_BT[index]]
            engine.add(prompt, _for_row(options, logits_processor, stopping_criteria, pads_P, index), index=index)
        if streamer is not None and not prompted:
            streamer.put(input_ids.cpu())
        rows, kept = _run(engine, streamer)
    finally:
        if streamer is not None:
            streamer.end()  # whatever happens: somebody may be reading
    # As in transformers, the first end-of-text token pads where no other is named; without either nothing ends early.
    pad = generation_config.pad_token_id
    if pad is None:
        pad = (*Options.of(generation_config).eos_token_id, 0)[0]
    ids = _padded(input_ids, [row.token_ids for row in rows], pad=pad)
    if not generation_config.return_dict_in_generate:
        return ids
    logits, scores = (_steps(kept, which) for which in ("logits_NV", "scores_NV"))
    return GenerateDecoderOnlyOutput(
        sequences=ids,
        scores=scores if generation_config.output_scores else None,
        logits=logits if generation_config.output_logits else None,
    )


def _arguments_of_generate(model: PreTrainedModel) -> Mapping[str, Any]:
    """Return the arguments of the `generate` that called: it keeps some of them from custom functions.

    Transformers 5.23 drops `streamer` and `assistant_model` without a word where `custom_generate` is a function.
    """
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        if frame.f_code is _GENERATE and frame.f_locals.get("self") is model:
            return dict(frame.f_locals)
        frame = frame.f_back
    return {}


def _run(engine: Engine, streamer: BaseStreamer | None) -> tuple[list[Row], list[list[Kept]]]:
    """Decode; returns the rows in order and what each of them kept."""
    rows: dict[int, Row] = {}
    kept: dict[int, list[Kept]] = {}
    for progress in engine.run():
        rows[progress.row.id] = progress.row
        if progress.kept is not None:
            kept.setdefault(progress.row.id, []).append(progress.kept)
        if streamer is not None:
            for token in progress.token_ids:
                streamer.put(torch.tensor([token]))
    for row in rows.values():
        if row.error is not None:
            raise row.error
    return [rows[id] for id in sorted(rows)], [kept[id] for id in sorted(kept)]


def _padded(input_ids: Tensor, texts: list[list[int]], *, pad: int) -> Tensor:
    longest = max(map(len, texts))
    new = [text + [pad] * (longest - len(text)) for text in texts]
    return torch.cat([input_ids, torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device)], dim=1)


def _steps(kept: list[list[Kept]], which: str) -> tuple[Tensor, ...]:
    """Return what rows kept as `generate` has it: for each step, `[B, V]`."""
    texts = [torch.cat([getattr(part, which) for part in parts]) for parts in kept]
    whole_BNV = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True) if texts else torch.empty(0, 0, 0)
    return tuple(whole_BNV.unbind(1))


# ---------------------------------------------------------------- options


def _options(
    config: GenerationConfig, processors: LogitsProcessorList, criteria: StoppingCriteriaList, prompt_length: int
) -> Options:
    """Take the options; `generate` has settled how long the rows may get, padding included, in a criterion."""
    if config.stop_strings:
        raise ConfigError(
            "stop_strings is not honoured inside generate(): give stopping_criteria=[StopStringCriteria(tokenizer, "
            "[...])], or use orthrus.generate(stop_strings=...)"
        )
    for processor in processors:
        if type(processor) in _STATEFUL:
            name = _STATEFUL[type(processor)]
            reason = REFUSED.get(name, "this watermark keeps a state from token to token, which drafts would spoil")
            raise ConfigError(f"generation option {name!r} is not honoured by this decoder: {reason}")
    left = copy.copy(config)
    left.num_return_sequences = None  # `generate` has repeated the rows already
    left.output_scores = left.output_logits = None  # taken below
    left.max_time = None  # a criterion
    left.watermarking_config = None  # a processor, checked above
    lengths = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
    longest = min(lengths, default=config.max_length)
    options = from_generation_config(left, max_new_tokens=max(longest - prompt_length, 1))
    ends = any(_is_end(criterion, options.eos_token_id) for criterion in criteria)
    return replace(
        options,
        eos_token_id=options.eos_token_id if ends else (),
        processors=None,  # `generate` has made them
        keep_logits=bool(config.return_dict_in_generate and (config.output_scores or config.output_logits)),
    )


def _for_row(
    options: Options,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    pads_P: Tensor,
    index: int,
) -> Options:
    """Return one row's options: with its own processors, unless `Sampling` says it all, and criteria."""
    before = pads_P if len(pads_P) else None
    rules = [c for c in criteria if type(c) is not MaxLengthCriteria and not _is_end(c, options.eos_token_id)]
    made: Callable[[Request], LogitsProcessorList] | None = None
    if not all(_is_simple(processor, options) for processor in processors):
        listed = LogitsProcessorList(_with_padding(_of_row(p, index), before) for p in processors)
        made = lambda _: listed  # noqa: E731
    return replace(options, processors=made, stopping_criteria=tuple(_with_padding(rule, before) for rule in rules))


def _is_simple(processor: Any, options: Options) -> bool:
    """Tell a processor that `generate` derived from an option which `Sampling` has."""
    option, attribute = _PROCESSORS.get(type(processor), (None, ""))
    if option is None or getattr(processor, attribute) != getattr(options.sampling, option):
        return False
    return not isinstance(getattr(processor, "prompt_ignore_length", None), int)


def _of_row(processor: Any, index: int) -> Any:
    """Return the processor that does to one row what this one does to it in the batch."""
    if isinstance(processor, processing.PrefixConstrainedLogitsProcessor):
        return constrained(processor._prefix_allowed_tokens_fn, index)
    ignored = getattr(processor, "prompt_ignore_length", None)
    if isinstance(processor, processing.RepetitionPenaltyLogitsProcessor) and isinstance(ignored, Tensor):
        return processing.RepetitionPenaltyLogitsProcessor(processor.penalty, prompt_ignore_length=int(ignored[index]))
    return processor


def _with_padding(function: Any, pads_P: Tensor | None) -> Any:
    """Let a processor or criterion see the padding before a row's text, as in `generate`."""
    return function if pads_P is None else _Padded(function, pads_P)


class _Padded:
    """A processor or criterion as an object, whose `__call__` transformers looks at."""

    def __init__(self, function: Any, pads_P: Tensor) -> None:
        self.function = function
        self.pads_P = pads_P

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        return self.function(torch.cat([self.pads_P.to(input_ids.device)[None], input_ids], dim=1), scores)


def _is_end(criterion: Any, tokens: Sequence[int]) -> bool:
    """Tell the criterion that ends a text at just these tokens."""
    return type(criterion) is EosTokenCriteria and {*criterion.eos_token_id.tolist()} == {*tokens}


# ---------------------------------------------------------------- prompts


def _padding(input_ids: Tensor, model_kwargs: Mapping[str, Any]) -> Tensor:
    """Return which positions are padding: `[B, T]`."""
    mask = model_kwargs.get("attention_mask")
    return torch.zeros_like(input_ids, dtype=torch.bool) if mask is None else (mask == 0).to(input_ids.device)


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
    return [row[wanted].tolist() for row, wanted in zip(input_ids, mask.to(input_ids.device), strict=True)]
