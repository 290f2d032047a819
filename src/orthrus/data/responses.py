"""Prompts and the answers to them, which a view is trained to foresee: the backbone's own tokens, or given texts."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.data.documents import Document
from orthrus.data.packing import EncodedDocument
from orthrus.decode.engine import Engine
from orthrus.decode.options import Options
from orthrus.decode.output import Stats
from orthrus.decode.text import encode
from orthrus.errors import ConfigError, DataError, PromptError
from orthrus.model.attach import config_of
from orthrus.policy import steps

LOOP_TOKENS: Final = 12  # a shorter repetition may be meant
LOOP_PERIOD: Final = 64

_WINDOW: Final = 16  # times the rows written at once: prompts among which those of a length are written together

_THOUGHT = re.compile(r"<think>\s*\S.*?</think>", re.DOTALL)


class Prompt(NamedTuple):
    """What a model is asked, as tokens, and the answer that its document gives (None for texts and open chats).

    `origin` is the document's file and line.
    """

    token_ids: list[int]
    answer: str | None = None
    origin: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answering:
    """How answers are written: at most `max_new_tokens` each, `rows` at once, prompt and answer within `row_tokens`."""

    max_new_tokens: int
    rows: int
    row_tokens: int

    def room(self, prompt: Prompt) -> int:
        """How many tokens an answer may have; 0 where the prompt fills its row."""
        return max(0, min(self.max_new_tokens, self.row_tokens - len(prompt.token_ids)))

    def fits(self, prompt: Prompt) -> bool:
        """Whether a prompt leaves room for two tokens of an answer."""
        return 0 < len(prompt.token_ids) < self.row_tokens - 1

    def usable(self, prompts: Iterable[Prompt]) -> list[Prompt]:
        """Prompts that fit, the shortest of a window first: so whoever stops has answered a sample of them all."""
        fitting = list(filter(self.fits, prompts))
        windows = (fitting[at : at + _WINDOW * self.rows] for at in range(0, len(fitting), _WINDOW * self.rows))
        return [prompt for window in windows for prompt in sorted(window, key=lambda prompt: len(prompt.token_ids))]


def prompt_of(
    tokenizer: PreTrainedTokenizerBase, document: Document, *, choice: int, thinking: bool | None = None
) -> Prompt:
    """Return what a model answers to: a chat's open question, one of its assistant turns, or a text's first third.

    `choice` picks the turn (modulo their number), so that a corpus sees early and late turns alike. `thinking` is
    given to the chat template as `enable_thinking`; None leaves the template's default.

    Raises ConfigError: thinking is set, but the chat template knows no such thing.
    """
    if not document.messages:
        whole: list[int] = tokenizer(document.text)["input_ids"]
        return Prompt(whole[: max(1, len(whole) // 3)], origin=document.origin)
    turns = [i for i, message in enumerate(document.messages) if message["role"] == "assistant"]
    if document.messages[-1]["role"] == "user":
        turns = []  # the whole chat leads up to a question that is open
    end = turns[choice % len(turns)] if turns else len(document.messages)
    setting = {} if thinking is None else {"enable_thinking": thinking}
    if setting and "enable_thinking" not in str(tokenizer.chat_template):
        raise ConfigError(
            f"answers.thinking = '{'on' if thinking else 'off'}' needs a chat template that knows enable_thinking, "
            "found one that does not: leave it to the 'template'"
        )
    try:
        ids = encode(tokenizer, document.messages[:end], tools=document.tools, chat_template_kwargs=setting)
    except PromptError as error:
        raise DataError(f"{document.origin}: {error}") from None
    return Prompt(ids, document.messages[end].get("content") if turns else None, document.origin)


def answer(
    model: PreTrainedModel, prompts: Sequence[Prompt], how: Answering, *, decode: str = "ar", spent: Stats | None = None
) -> Iterator[EncodedDocument]:
    """Let the model continue each prompt greedily to its end-of-text token; yields documents as they end.

    An answer that begins to loop ends there (`before_loop`). Prompts that leave no room for an answer in `row_tokens`
    are left out. `decode` is a plan ("ar" until a view is trained; the text is the same); what rows took is added to
    `spent`.
    """
    usable = how.usable(prompts)
    if not usable:
        return
    scheme = steps.parse(decode)
    width = scheme.scratch(config_of(model).proposals + 1)
    engine = Engine(
        model, rows=how.rows, capacity=how.row_tokens + width, plan=scheme, admit_free=max(1, how.rows // 4)
    )
    options = Options.of(model.generation_config)
    for prompt in usable:
        engine.add(prompt.token_ids, Options(max_new_tokens=how.room(prompt), eos_token_id=options.eos_token_id))
    for progress in engine.run():
        row = progress.row
        if row.error is not None:
            raise row.error
        kept = before_loop(row.token_ids, added=len(progress.token_ids))
        if row.finish_reason is None and kept == len(row.token_ids):
            continue
        if row.finish_reason is None:
            engine.abort(row.id)
        if spent is not None:
            spent.add(row.stats)
        yield joined(row.prompt_ids, row.token_ids[:kept])


def before_loop(token_ids: Sequence[int], *, added: int = 1) -> int:
    """Return how many tokens of a text to keep: up to the second repetition, once its end repeats itself.

    A text loops when its last tokens, `LOOP_TOKENS` at least, are one passage three times or more, of at most
    `LOOP_PERIOD` tokens. `added` is how many tokens are new since the text was last looked at.
    """
    for length in range(len(token_ids) - added + 1, len(token_ids) + 1):
        last = token_ids[length - 1]
        for period in range(1, min(LOOP_PERIOD, length // 3) + 1):
            if token_ids[length - 1 - period] != last:
                continue
            times = max(3, -(-LOOP_TOKENS // period))
            start = length - times * period
            if start >= 0 and token_ids[start : length - period] == token_ids[start + period : length]:
                return length - (times - 2) * period
    return len(token_ids)


def given_answers(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], how: Answering
) -> Iterator[EncodedDocument]:
    """Take the documents' own answers as they are, ended by the end-of-text token, cut where `how` leaves no room."""
    for prompt in how.usable(prompts):
        assert prompt.answer is not None
        ids = tokenizer(prompt.answer, add_special_tokens=False)["input_ids"] + [int(tokenizer.eos_token_id or 0)]
        yield joined(prompt.token_ids, ids[: how.room(prompt)])


def check_given(prompts: Iterable[Prompt], *, thinking: bool | None) -> None:
    """Refuse prompts whose answers are missing, empty, or think where others or the setting do not.

    Raises DataError: with the file and line of the document.
    """
    first, settled_by = thinking, "answers.thinking"
    for prompt in prompts:
        if prompt.answer is None or not prompt.answer.strip():
            raise DataError(f"{prompt.origin}: an answer is required (answers.by = 'given'), found none; leave it out")
        thinks = _THOUGHT.search(prompt.answer) is not None
        if first is None:
            first, settled_by = thinks, prompt.origin
        if thinks != first:
            raise DataError(
                f"{prompt.origin}: an answer that {'thinks' if first else 'does not think'} is required, as "
                f"{settled_by} has it, found one that {'thinks' if thinks else 'does not'}: a view foresees little of "
                "the kind that it was not trained on; separate them"
            )


def joined(prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> EncodedDocument:
    tokens = np.array([*prompt_ids, *answer_ids], dtype=np.int32)
    return EncodedDocument(token_ids=tokens, answer=np.arange(len(tokens)) >= len(prompt_ids))
