"""Run a list of prompts in one mode, on the clock, with progress on the terminal.

A record's turns are answered one after another, each with the answers before it in the chat.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from orthrus.cli.common import ExactName, Watch
from orthrus.cli.comparing import Written
from orthrus.data.prompts import Message, PromptRecord
from orthrus.errors import PromptError
from orthrus.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from orthrus.decode import engine
    from orthrus.decode.output import Completion

Mode = Literal["orthrus", "ar"]

_WARM_UP_TOKENS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What to run.

    Attributes:
        raw: continue texts as they are, without the chat template.
        plan: how each cycle drafts; plain decoding takes none.
        exact: what both modes promise (`orthrus.generate`).
        options: generation options by Hugging Face's names.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    records: list[PromptRecord]
    raw: bool
    plan: str | None
    exact: ExactName
    batch_size: int
    options: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One completion, and which turn of which record it answers."""

    record: PromptRecord
    turn: int
    completion: "Completion"

    def to_dict(self) -> dict[str, Any]:
        """Return the completion as plain JSON values, named by its record where that has a name."""
        named: dict[str, Any] = {"id": self.record.id} if self.record.id else {}
        if len(self.record.turns) > 1:
            named["turn"] = self.turn
        return named | self.completion.to_dict()


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """All answers of one mode, in the order of records and turns, and the seconds they took."""

    answers: list[Answer]
    seconds: float

    @property
    def written(self) -> Written:
        from orthrus.decode.output import Stats

        return Written(
            texts=[answer.completion.token_ids for answer in self.answers],
            stats=Stats.total(answer.completion.stats for answer in self.answers),
            seconds=self.seconds,
        )


def check(job: Job) -> None:
    """Encode every record's first turn; raises PromptError, with its id, if one cannot be answered."""
    context = job.model.config.get_text_config().max_position_embeddings
    for record in job.records:
        try:
            length = len(_encoded(job, record, _prompt(list(record.turns[0]), job.raw)))
            if length >= context:
                raise PromptError(f"the model reads at most {context} tokens, the prompt has {length}: shorten it")
        except PromptError as error:
            raise PromptError(f"{record.id}: {error}" if record.id else str(error)) from None


def run(job: Job, mode: Mode) -> Run:
    """Answer every turn of every record; the model's own answers stand between a record's turns."""
    watch = Watch()
    chats: list[list[Message]] = [[] for _ in job.records]
    answers: list[tuple[int, Answer]] = []
    label, turns, written = "Orthrus" if mode == "orthrus" else "plain", sum(len(r.turns) for r in job.records), 0
    with Progress(label, turns, lines=0, transient=True) as progress:

        def note(_: int, step: "engine.Progress") -> None:
            nonlocal written
            written += len(step.token_ids)
            progress.advance(int(step.row.finish_reason is not None), f"{written} tokens")

        for turn in range(max(len(record.turns) for record in job.records)):
            asked = [i for i, record in enumerate(job.records) if turn < len(record.turns)]
            for i in asked:
                chats[i] = [*chats[i], *job.records[i].turns[turn]]
            prompts = [_prompt(chats[i], job.raw) for i in asked]
            with watch:
                ids = [_encoded(job, job.records[i], prompt) for i, prompt in zip(asked, prompts, strict=True)]
                completions = _generate(job, mode, ids, note)
            for i, prompt, completion in zip(asked, prompts, completions, strict=True):
                chats[i] = [*chats[i], {"role": "assistant", "content": completion.text}]
                answer = Answer(record=job.records[i], turn=turn, completion=replace(completion, prompt=prompt))
                answers.append((i, answer))
    answers.sort(key=lambda pair: pair[0])
    return Run(answers=[answer for _, answer in answers], seconds=watch.seconds)


def warm_up(job: Job, modes: Sequence[Mode]) -> None:
    """Run a few tokens in each mode, so that none of them pays for first calls."""
    records = job.records[: job.batch_size]
    prompts = [_encoded(job, record, _prompt(list(record.turns[0]), job.raw)) for record in records]
    tokens = min(_WARM_UP_TOKENS, job.options["max_new_tokens"])
    for mode in modes:
        _generate(job, mode, prompts, max_new_tokens=tokens)


def _generate(
    job: Job,
    mode: Mode,
    prompts: list[list[int]],
    note: "Callable[[int, engine.Progress], None] | None" = None,
    **more: Any,
) -> "list[Completion]":
    from orthrus.decode.api import generate

    return generate(
        job.model,
        job.tokenizer,
        prompts,
        mode=mode,
        plan=job.plan if mode == "orthrus" else None,
        exact=job.exact,
        batch_size=job.batch_size,
        on_progress=note,
        **{**job.options, **more},
    )


def _encoded(job: Job, record: PromptRecord, prompt: str | list[Message]) -> list[int]:
    from orthrus.decode.text import encode

    return encode(job.tokenizer, prompt, tools=record.tools)


def _prompt(chat: list[Message], raw: bool) -> str | list[Message]:
    if not raw:
        return chat
    if len(chat) != 1:
        raise PromptError(f"a prompt to continue as it is must be one text, found a chat of {len(chat)} messages")
    return str(chat[0]["content"])
