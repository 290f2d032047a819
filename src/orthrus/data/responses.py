"""Answers written by a model itself: what a diffusion view is trained to foresee.

Takes prompts from documents, lets the backbone answer them greedily through the engine, and keeps the tokens as
they were written (decoding and encoding again need not give them back). Shards on disk make it resumable. Knows
neither packing nor training.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.data.documents import Document
from orthrus.data.packing import EncodedDocument
from orthrus.decode import plan
from orthrus.decode.engine import Engine
from orthrus.decode.options import Options
from orthrus.errors import DataError

SHARD = 512  # prompts whose answers are written to disk together


@dataclass(frozen=True, kw_only=True, slots=True)
class Answering:
    """How answers are written: at most `max_new_tokens` each, `rows` at once, prompt and answer within `row_tokens`."""

    max_new_tokens: int
    rows: int
    row_tokens: int


def prompt_ids(tokenizer: PreTrainedTokenizerBase, document: Document, *, choice: int) -> list[int]:
    """Return the tokens a model answers to: one of a chat's assistant turns, or the first third of a text.

    `choice` picks the turn (modulo their number), so that a corpus sees early and late turns alike.
    """
    if document.messages:
        turns = [i for i, message in enumerate(document.messages) if message["role"] == "assistant"]
        end = turns[choice % len(turns)] if turns else len(document.messages)
        ids: list[int] = tokenizer.apply_chat_template(
            list(document.messages[:end]), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return ids
    whole: list[int] = tokenizer(document.text)["input_ids"]
    return whole[: max(1, len(whole) // 3)]


def answer(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    how: Answering,
    *,
    decode: str = "ar",
) -> Iterator[EncodedDocument]:
    """Let the model continue each prompt greedily to its end-of-text token; yields documents as they end.

    Prompts that leave no room for an answer in `row_tokens` are left out. `decode` is a plan ("ar" until a view is
    trained; the text is the same).
    """
    room = how.row_tokens - 1
    usable = sorted((list(p) for p in prompts if 0 < len(p) < room), key=len)
    if not usable:
        return
    scheme = plan.parse(decode)
    width = max(step.scratch for step in scheme.steps(model.orthrus_config.block_size))
    engine = Engine(
        model, rows=how.rows, capacity=how.row_tokens + width, plan=scheme, admit_free=max(1, how.rows // 4)
    )
    options = Options.of(model.generation_config)
    for ids in usable:
        new = min(how.max_new_tokens, how.row_tokens - len(ids))
        engine.add(ids, Options(max_new_tokens=new, eos_token_id=options.eos_token_id))
    while engine.busy:
        for progress in engine.step():
            row = progress.row
            if row.finish_reason is not None:
                written = np.arange(len(row.prompt_ids) + len(row.token_ids)) >= len(row.prompt_ids)
                tokens = np.array(row.prompt_ids + row.token_ids, dtype=np.int32)
                yield EncodedDocument(token_ids=tokens, answer=written)


def answered(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    how: Answering,
    folder: Path,
    *,
    on_shard: Callable[[int, int], None] | None = None,
) -> Iterable[EncodedDocument]:
    """Return answers to all prompts, shard by shard from `folder`; shards that are missing are written first.

    `on_shard` is called with (done, all) after each one.

    Raises:
        DataError: a shard in the folder is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(prompts), SHARD)
    documents: list[EncodedDocument] = []
    for number, start in enumerate(starts):
        path = folder / f"{number:05d}.npz"
        if not path.exists():
            _write(path, list(answer(model, prompts[start : start + SHARD], how)))
        documents += _read(path)
        if on_shard is not None:
            on_shard(number + 1, len(starts))
    (folder / "done.json").write_text(json.dumps({"prompts": len(prompts), "answers": len(documents)}) + "\n")
    return documents


def _write(path: Path, documents: Sequence[EncodedDocument]) -> None:
    lengths = np.array([len(d.token_ids) for d in documents], dtype=np.int64)
    empty: list[np.ndarray] = [np.empty(0, dtype=np.int32)]
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez(
            file,
            lengths=lengths,
            token_ids=np.concatenate([d.token_ids for d in documents] or empty),
            answer=np.concatenate([d.answer for d in documents] or empty).astype(np.bool_),
        )
    temporary.replace(path)


def _read(path: Path) -> list[EncodedDocument]:
    try:
        with np.load(path) as arrays:
            cuts = np.cumsum(arrays["lengths"])[:-1]
            ids, answers = np.split(arrays["token_ids"], cuts), np.split(arrays["answer"], cuts)
            count = len(arrays["lengths"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: a shard of answers is required, found {error}; delete it to write it again") from None
    return [EncodedDocument(token_ids=i, answer=a) for i, a in zip(ids[:count], answers[:count], strict=False)]
