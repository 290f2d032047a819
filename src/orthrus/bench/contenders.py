"""Who takes part in a measurement: our engine's two modes, Hugging Face's `generate`, llama.cpp; all timed alike."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.bench.peers import hf, llamacpp
from orthrus.bench.peers.ggufs import Weights, label
from orthrus.bench.race import Answer, Contender, Decoder
from orthrus.bench.session import require_named
from orthrus.decode.api import engine_for
from orthrus.decode.exact import EXACT
from orthrus.decode.options import Options
from orthrus.errors import ConfigError
from orthrus.policy import steps as plans

OWN: Final = ("ar", "orthrus")
HF: Final = ("hf", "hf-static", "hf-lookup")
LLAMA: Final = ("llama.cpp", "llama.cpp-lookup")
MODES: Final = OWN + HF + LLAMA
ALONE: Final = ("hf-lookup", "hf-draft", "hf-dflash", "blocks", *LLAMA)
"""Modes, and kinds of peers, that take one prompt at a time."""


def contenders(
    modes: Sequence[str],
    plans_asked: Sequence[str] = ("auto",),
    exacts: Sequence[str] = ("distribution",),
    ggufs: Sequence[str] = (),
) -> tuple[Contender, ...]:
    """Put modes together with plans (`orthrus`), exactness (both own modes) and files of weights (llama.cpp).

    Raises ConfigError for an unknown or repeated mode, plan or exactness, or for none at all.
    """
    require_named(modes=modes, exact=exacts, plans=plans_asked)
    for name, asked, allowed in (("a mode", modes, MODES), ("exact", exacts, EXACT)):
        if unknown := [one for one in asked if one not in allowed]:
            raise ConfigError(f"{name} is one of {', '.join(allowed)}, found {unknown[0]!r}")
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
    """Make each contender's decoder over the weights of one dual-view model; `engine` goes to each engine of our own.

    `weights` are llama.cpp's, by label; `context` is prompt and answer together, where 0 takes the model's.
    """
    wanted = list(wanted)
    eos = Options.of(model.generation_config).eos_token_id
    backbone = hf.plain(model) if any(c.mode in HF for c in wanted) else None
    out: dict[Contender, Decoder] = {}
    for contender in wanted:
        if backbone is not None and contender.mode in HF:
            out[contender] = hf.decoder(backbone, contender.mode, eos)
        elif contender.mode in LLAMA:
            longest = context or model.config.get_text_config().max_position_embeddings
            lookup = contender.mode == "llama.cpp-lookup"
            out[contender] = llamacpp.decoder(weights[contender.plan], eos, context=longest, lookup=lookup)
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
        return [Answer.of(row) for row in engine.finish(prompts, options, tokenizer=tokenizer)]

    return decode
