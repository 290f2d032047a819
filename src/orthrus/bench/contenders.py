"""Who takes part in a measurement: our engine's two modes, Hugging Face's `generate`, llama.cpp.

Every contender becomes one function from prompts' token ids to answers' token ids, so that all of them are timed alike.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.bench.peers import hf, llamacpp
from orthrus.bench.peers.ggufs import Weights, label
from orthrus.decode.api import engine_for
from orthrus.decode.exact import EXACT, Exact
from orthrus.decode.options import Options
from orthrus.decode.rows import Row
from orthrus.decode.stop import until_end
from orthrus.errors import ConfigError
from orthrus.policy import steps as plans

OWN: Final = ("ar", "orthrus")
HF: Final = ("hf", "hf-static", "hf-lookup")
LLAMA: Final = ("llama.cpp", "llama.cpp-lookup")
MODES: Final = OWN + HF + LLAMA
ALONE: Final = ("hf-lookup", "hf-draft", "hf-dflash", "blocks", *LLAMA)
"""Modes, and kinds of peers, that take one prompt at a time."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to decode.

    Attributes:
        mode: one of `MODES`, or a peer's label (`bench.peers.contest`).
        plan: of `orthrus`; of llama.cpp, the label of its weights, None for the file that the backbone came from.
        exact: of our own modes, how exact (`decode.exact`).
    """

    mode: str
    plan: str | None = None
    exact: Exact | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a contender wrote to one prompt.

    Attributes:
        token_ids: the answer's tokens, the end-of-text token included where one was written.
        stats: counts and ratios under the names of `orthrus.decode.output`; peers have `emitted`, `forwards`
            and `tokens_per_forward` only, llama.cpp `drafted`, `accepted`, `first_token_seconds` and its weights too.
        proposed_per_position: how often slot j was drafted.
        accepted_at_position: how often slot j's draft was emitted.
    """

    token_ids: list[int]
    stats: Mapping[str, Any]
    proposed_per_position: list[int]
    accepted_at_position: list[int]


Decoder: TypeAlias = Callable[[Sequence[Sequence[int]], int], list[Answer]]
"""Answer all prompts of one batch, given as token ids, with at most so many new tokens each."""


def contenders(
    modes: Sequence[str],
    plans_asked: Sequence[str] = ("auto",),
    exacts: Sequence[str] = ("distribution",),
    ggufs: Sequence[str] = (),
) -> tuple[Contender, ...]:
    """Put modes together with plans (`orthrus`), exactness (both own modes) and files of weights (llama.cpp).

    Raises ConfigError for an unknown or repeated mode, plan or exactness, or for none at all.
    """
    for name, asked, allowed in (
        ("a mode", modes, MODES),
        ("exact", exacts, EXACT),
        ("a plan", plans_asked, None),
    ):
        if not asked or len(set(asked)) < len(asked):
            raise ConfigError(f"{name} must be named at least once, and each one once; found {list(asked)}")
        for one in asked:
            if allowed is not None and one not in allowed:
                raise ConfigError(f"{name} is one of {', '.join(allowed)}, found {one!r}")
    for plan in plans_asked:
        plans.parse(plan)
    if ggufs and not set(modes) & set(LLAMA):
        raise ConfigError(f"--gguf is of the modes {' and '.join(LLAMA)}, found {list(modes)}: add one of them")
    out: list[Contender] = []
    for mode in modes:
        if mode in LLAMA:
            out += [Contender(mode, label(one)) for one in ggufs] or [Contender(mode)]
            continue
        if mode in HF:
            out.append(Contender(mode))
            continue
        for exact in (exact for exact in EXACT if exact in exacts):
            out += [Contender(mode, plan, exact) for plan in (plans_asked if mode == "orthrus" else [None])]
    return tuple(out)


def fits(contender: Contender, batch: int) -> bool:
    """Tell whether a contender can run batches of this size: some take one prompt at a time."""
    return batch == 1 or contender.mode.partition(":")[0] not in ALONE


def decoders(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Iterable[Contender],
    *,
    engine: Mapping[str, Any] = MappingProxyType({}),
    weights: Mapping[str | None, Weights] = MappingProxyType({}),
    context: int = 0,
) -> dict[Contender, Decoder]:
    """Make each contender's decoder over the weights of one dual-view model.

    Args:
        engine: arguments for each engine of our own, beyond those that a contender names.
        weights: llama.cpp's, by label.
        context: how long a prompt and its answer become together, which llama.cpp must be told; 0 takes the model's.
    """
    wanted = list(wanted)
    eos = Options.of(model.generation_config).eos_token_id
    backbone = hf.plain(model) if any(c.mode in HF for c in wanted) else None
    out: dict[Contender, Decoder] = {}
    for contender in wanted:
        if backbone is not None and contender.mode in HF:
            out[contender] = _peer(backbone, contender.mode, eos)
        elif contender.mode in LLAMA:
            longest = context or model.config.get_text_config().max_position_embeddings
            out[contender] = _llama(contender, eos, weights[contender.plan], longest)
        else:
            out[contender] = _ours(model, tokenizer, contender, eos, engine)
    return out


def _ours(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contender: Contender,
    eos: tuple[int, ...],
    more: Mapping[str, Any],
) -> Decoder:
    """Decode with the engine, as `orthrus.generate` does between tokenizing and joining text."""
    plan, exact = plans.parse(contender.plan or "ar"), contender.exact or "distribution"

    def decode(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Answer]:
        options = Options(max_new_tokens=max_new_tokens, eos_token_id=eos)
        engine = engine_for(model, prompts, options, plan, rows=len(prompts), exact=exact, **more)
        return [answered(row) for row in engine.finish(prompts, options, tokenizer=tokenizer)]

    return decode


def answered(row: Row, **more: float) -> Answer:
    """Return what the engine wrote; `more` goes to the statistics."""
    return Answer(
        token_ids=row.token_ids,
        stats=row.stats.to_dict() | more,
        proposed_per_position=row.stats.proposed_per_position,
        accepted_at_position=row.stats.accepted_at_position,
    )


def _peer(backbone: PreTrainedModel, mode: str, eos: tuple[int, ...]) -> Decoder:
    def decode(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Answer]:
        config = hf.settings(mode, eos, max_new_tokens)
        if mode != "hf-lookup":
            # One pass a token; a hook would stand in the way of a compiled forward.
            return [_peer_answer(tokens, len(tokens)) for tokens in hf.generate(backbone, prompts, config)]
        with hf.counted(backbone) as passes:
            written = hf.generate(backbone, prompts, config)
        return [_peer_answer(tokens, len(passes)) for tokens in written]

    return decode


def _peer_answer(token_ids: list[int], forwards: int) -> Answer:
    stats = {"emitted": len(token_ids), "forwards": forwards, "tokens_per_forward": len(token_ids) / forwards}
    return Answer(token_ids=token_ids, stats=stats, proposed_per_position=[], accepted_at_position=[])


def _llama(contender: Contender, eos: tuple[int, ...], weights: Weights, context: int) -> Decoder:
    lookup = contender.mode == "llama.cpp-lookup"
    server = llamacpp.Server(weights, threads=torch.get_num_threads(), context=context, lookup=lookup)

    def decode(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Answer]:
        return [_llama_answer(server.answer(prompt, max_new_tokens), eos, weights) for prompt in prompts]

    return decode


def _llama_answer(written: llamacpp.Written, eos: tuple[int, ...], weights: Weights) -> Answer:
    """Count a pass for each token but those that a draft gave."""
    answer = _peer_answer(until_end(written.token_ids, eos), len(written.token_ids) - written.accepted)
    more = {
        "drafted": written.drafted,
        "accepted": written.accepted,
        "first_token_seconds": written.first_token_seconds,
        **weights.to_dict(),
    }
    return replace(answer, stats={**answer.stats, **more})
