"""From prompts to completions: the functions `orthrus.generate` and `orthrus.stream`.

Knows tokenizers, chat templates and the engine; knows no passes, no acceptance, no files.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.decode.allowed import block_of, drafter_for
from orthrus.decode.engine import Engine, Progress
from orthrus.decode.exact import EXACT, Exact
from orthrus.decode.options import Options
from orthrus.decode.output import Chunk, Completion
from orthrus.decode.rows import Row
from orthrus.decode.text import Prompt, TextStream, Tool, as_list, decode, encode
from orthrus.errors import ConfigError
from orthrus.policy import steps as plans

Mode = Literal["orthrus", "ar"]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompt | Sequence[Prompt] | Tensor,
    *,
    mode: Mode = "orthrus",
    plan: str | None = None,
    exact: Exact = "distribution",
    batch_size: int = 8,
    tools: Sequence[Tool] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, Progress], None] | None = None,
    **options: Any,
) -> list[Completion]:
    """Complete one prompt or many; always returns a list, in the order of the prompts.

    Args:
        model: a dual-view model (`orthrus.load`, `orthrus.attach`).
        tokenizer: the model's tokenizer.
        prompts: a text, one chat (a list of {"role", "content"}), token ids (a list of ints, a tensor), or a list of
            these. Texts and ids are continued as they are; chats take the tokenizer's chat template, with
            `tool_calls`, messages of role "tool" and content in text parts as that reads them.
        mode: "orthrus" drafts and verifies, "ar" decodes plainly through the same engine; the text is the same.
        plan: what each cycle does: "auto" (the default), "full", "fixed:K", "tree:N", "onepass", "onepass:M",
            "onepass:M:N", "lookup", "lookup:M", "ar"; or `auto` among fewer kinds of step, as "auto:tree+lookup".
        exact: "distribution", or "token" for the same tokens as `mode="ar", exact="token"` at any precision.
        batch_size: completions in flight at once; as soon as one ends the next begins.
        tools: what a chat's template presents as tools: JSON schemas, or functions with types and a docstring.
        chat_template_kwargs: more variables for the chat template, such as `{"enable_thinking": False}`.
        on_progress: called with the prompt's index after every cycle that moved it.
        **options: by Hugging Face's names, as docs/compatibility.md lists them: max_new_tokens, do_sample,
            temperature, eos_token_id, stop_strings, logits_processor and so on. Without a `seed` torch's generator
            decides what is sampled. What is not honoured is refused.

    Raises:
        ConfigError: an option that is not honoured or out of range.
        PromptError: a prompt that is empty, malformed, longer than the model's context, or holds what the chat
            template does not read.

    A text that fails while it is written (its logits are NaN, say) ends with `finish_reason` "error" and the exception
    as its `error`; the others are unharmed.
    """
    chosen = Options.of(model.generation_config, **options)
    given = as_list(prompts)
    ids = [encode(tokenizer, prompt, tools=tools, chat_template_kwargs=chat_template_kwargs) for prompt in given]
    if not given:
        return []
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, found {batch_size}")
    decoder = plan_of(mode, plan)
    engine = engine_for(model, ids, chosen, decoder, rows=min(batch_size, len(ids)), exact=exact)
    rows: dict[int, Row] = {}
    added = [engine.add(prompt_ids, chosen, tokenizer=tokenizer, index=i) for i, prompt_ids in enumerate(ids)]
    for progress in engine.run():
        rows[progress.row.id] = progress.row
        if on_progress is not None:
            on_progress(added.index(progress.row.id), progress)
    return [_completion(tokenizer, prompt, rows[id]) for prompt, id in zip(given, added, strict=True)]


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt | Tensor,
    *,
    mode: Mode = "orthrus",
    plan: str | None = None,
    exact: Exact = "distribution",
    tools: Sequence[Tool] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    engine: Engine | None = None,
    **options: Any,
) -> Generator[Chunk, None, None]:
    """Complete one prompt and yield each cycle's text as it is decided; arguments as for `generate`.

    Pass the same one-row `engine` again to keep its cache: only tokens that differ from the last text are read. Mode,
    plan and exactness are then the engine's. Closing the iterator early ends the completion and leaves the engine
    ready for the next one.

    Raises:
        ConfigError: as `generate`, or mode, plan or exact beside an engine, or one that is busy with another text.
        Exception: what goes wrong while the text is written, after the chunk that ends with "error".
    """
    if engine is not None and (mode, plan, exact) != ("orthrus", None, "distribution"):
        raise ConfigError(
            f"mode, plan and exact are settled with the engine, found mode={mode!r}, plan={plan!r} and exact={exact!r} "
            "beside one: drop them, or build another engine"
        )
    chosen = Options.of(model.generation_config, **options)
    prompt_ids = encode(tokenizer, prompt, tools=tools, chat_template_kwargs=chat_template_kwargs)
    engine = engine or engine_for(model, [prompt_ids], chosen, plan_of(mode, plan), rows=1, exact=exact)
    return _stream(engine, tokenizer, prompt_ids, chosen)


def _stream(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], options: Options
) -> Generator[Chunk, None, None]:
    if engine.busy:
        raise ConfigError("a stream needs an idle engine, found one with a text in flight: close that stream first")
    decoder = TextStream(tokenizer)
    id = engine.add(prompt_ids, options, tokenizer=tokenizer)
    try:
        for progress in engine.run():
            texts = [decoder.push(token) for token in progress.token_ids]
            if progress.row.finish_reason is not None:
                texts[-1:] = ["".join(texts[-1:]) + decoder.finish()]
            drafts = slice(int(progress.first), progress.first + progress.accepted)
            yield Chunk(
                first_text="".join(texts[: drafts.start]),
                draft_text="".join(texts[drafts]),
                bonus_text="".join(texts[drafts.stop :]),
                token_ids=progress.token_ids,
                accepted=progress.accepted,
                finish_reason=progress.row.finish_reason,
                stats=deepcopy(progress.row.stats),
            )
            if progress.row.error is not None:
                raise progress.row.error
    finally:
        engine.abort(id)


def engine_for(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    options: Options,
    plan: plans.Plan,
    *,
    rows: int,
    exact: Exact = "distribution",
    **more: Any,
) -> Engine:
    """Build an engine with just enough room for these prompts, within the model's context; `more` is `Engine`'s."""
    if exact not in EXACT:
        raise ConfigError(f"exact must be one of {', '.join(EXACT)}, found {exact!r}")
    block = block_of(model, drafter_for(model, plan, more.get("drafter")))
    width = plan.scratch(block)
    context: int = model.config.get_text_config().max_position_embeddings
    lengths = [len(ids) for ids in prompts] or [1]
    capacity = max(Engine.room(n, min(options.max_new_tokens, max(context - n, 0)), width) for n in lengths)
    return Engine(model, rows=rows, capacity=capacity, plan=plan, exact=exact, **more)


def plan_of(mode: str, plan: str | None) -> plans.Plan:
    """Settle mode and plan; raises ConfigError when they contradict each other."""
    if mode not in ("orthrus", "ar"):
        raise ConfigError(f"mode must be 'orthrus' or 'ar', found {mode!r}")
    if mode == "ar" and plan not in (None, "ar"):
        raise ConfigError(f"mode='ar' decodes plainly, but plan {plan!r} asks for drafts: drop one of the two")
    return plans.parse("ar" if mode == "ar" else plan or "auto")


def _completion(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, row: Row) -> Completion:
    text = ""
    try:
        text = decode(tokenizer, row.token_ids)
    except Exception as error:  # a tokenizer that cannot read what this model writes: the others' texts stay
        row.fail(error)
    assert row.finish_reason is not None
    return Completion(
        prompt=prompt,
        text=text,
        token_ids=row.token_ids,
        finish_reason=row.finish_reason,
        stats=row.stats,
        error=row.error,
    )
