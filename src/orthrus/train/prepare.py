"""From a recipe to packed rows on disk: prompts, answers in shards, rows with a manifest, made once."""

import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from orthrus.data import responses, shards
from orthrus.data.documents import Document
from orthrus.data.packing import EncodedDocument, PackedRows, are_about, load_rows, pack, save_rows
from orthrus.data.remote import Server, served_answers
from orthrus.data.responses import Answering, Prompt, prompt_of
from orthrus.decode.output import Stats
from orthrus.errors import DataError
from orthrus.model.fingerprint import fingerprint
from orthrus.train.corpus import corpus_about, data_folder, heldout_documents, train_documents
from orthrus.train.drafting import drafting
from orthrus.train.ranks import Ranks
from orthrus.train.sections import AnsweredRecipe, AnswersSection
from orthrus.train.sources import DatasetSource, Source, SyntheticSource, source_name

OnProgress = Callable[[str, int, int], None]
"""Called with the name of a set, prompts answered and all prompts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What a view is trained and measured on: packed rows, and held-out rows and prompts by source."""

    rows: PackedRows
    heldout: dict[str, PackedRows]
    heldout_prompts: dict[str, list[list[int]]]


def prepare(
    recipe: AnsweredRecipe,
    tokenizer: PreTrainedTokenizerFast,
    model: PreTrainedModel | None,
    *,
    ranks: Ranks,
    on_progress: OnProgress | None = None,
) -> Prepared:
    """Make what is missing of `run.output/data` and open it; all processes of a run call it together.

    Args:
        model: the backbone with a view attached; needed where it writes the answers itself.
        on_progress: hears of this process's share.

    Raises:
        DataError: sources or answers that cannot be read or do not fit together, or data made by another recipe.
        ConfigError: a thinking setting that the chat template does not know.
    """
    make, fits = partial(_packed, recipe, tokenizer, model, ranks, on_progress), _how(recipe).fits
    heldout = {
        source_name(source): _heldout_prompts(recipe, tokenizer, source)
        for source in recipe.data.sources
        if source.heldout
    }
    return Prepared(
        rows=make("train", lambda: train_prompts(recipe, tokenizer)),
        heldout={name: make(f"heldout-{name}", partial(list, prompts)) for name, prompts in heldout.items()},
        # Those that are packed, in the documents' order: the first few are decoded, not the shortest.
        heldout_prompts={
            name: [prompt.token_ids for prompt in prompts if fits(prompt)] for name, prompts in heldout.items()
        },
    )


def train_prompts(recipe: AnsweredRecipe, tokenizer: PreTrainedTokenizerFast) -> list[Prompt]:
    """Take prompts from each source by its weight, `responses.prompts` in all; sources start over at their end."""
    data = recipe.data
    whole = sum(source.weight for source in data.sources)
    prompts: list[Prompt] = []
    for source in data.sources:
        share = round(recipe.responses.prompts * source.weight / whole)
        prompts += _prompts(recipe, tokenizer, itertools.islice(_again(source, seed=data.seed), share))
    _check(recipe, prompts)
    random.Random(data.seed).shuffle(prompts)
    return prompts


def made_from(recipe: AnsweredRecipe, model: PreTrainedModel | None) -> dict[str, Any]:
    """What rows depend on; rows made from anything else are made again."""
    about = {
        "data": corpus_about(recipe.data),
        "responses": recipe.responses.model_dump(mode="json", exclude={"rows", "eval_prompts", "eval_tokens"}),
        "backbone": _backbone(recipe, model),
    }
    if (how := _how_asked(recipe)) is not None:
        about["answers"] = how
    return about


def answered_by(recipe: AnsweredRecipe, model: PreTrainedModel | None) -> dict[str, Any]:
    """What answers depend on beside their prompts; those made by anything else are refused."""
    return {
        "backbone": _backbone(recipe, model),
        "max_new_tokens": recipe.responses.max_new_tokens,
        "row_tokens": recipe.data.row_tokens,
        "answers": _how_asked(recipe),
    }


def _backbone(recipe: AnsweredRecipe, model: PreTrainedModel | None) -> str:
    here = recipe.answers.by == "backbone" and model is not None
    return fingerprint(model) if here and model is not None else recipe.model.backbone


def _how_asked(recipe: AnsweredRecipe) -> dict[str, Any] | None:
    how = recipe.answers.model_copy(update={"url": None, "view": None})  # neither changes a word
    return None if how == AnswersSection() else how.model_dump(mode="json", exclude={"url", "view"})


def _packed(
    recipe: AnsweredRecipe,
    tokenizer: PreTrainedTokenizerFast,
    model: PreTrainedModel | None,
    ranks: Ranks,
    on_progress: OnProgress | None,
    name: str,
    ask: Callable[[], list[Prompt]],
) -> PackedRows:
    """Return packed answers, or have them written, all processes together, and packed by the first."""
    path = data_folder(recipe) / name
    about = made_from(recipe, model)
    if ranks.any(not are_about(path, about)):
        prompts = ask()
        if recipe.answers.by == "given":
            if ranks.main:
                documents = list(responses.given_answers(tokenizer, prompts, _how(recipe)))
                _pack(recipe, tokenizer, prompts, documents, path, about, {})
            ranks.wait()
            return load_rows(path, tokenizer=tokenizer, about=about)
        folder = path.with_name(path.name + "-answers")
        spent = Stats(forwards=0)
        with drafting(model, recipe.answers.view) as decode:
            shards.write_answers(
                folder,
                prompts,
                _writer(recipe, tokenizer, model, decode, spent),
                about=answered_by(recipe, model),
                share=(ranks.index, ranks.count),
                on_progress=None if on_progress is None else partial(on_progress, name),
            )
        ranks.wait()
        if ranks.main:
            documents = shards.read_answers(folder, prompts)
            _pack(recipe, tokenizer, prompts, documents, path, about, _gain(recipe, spent))
        ranks.wait()
    return load_rows(path, tokenizer=tokenizer, about=about)


def _gain(recipe: AnsweredRecipe, spent: Stats) -> dict[str, Any]:
    """What drafting saved, as far as answers were written by this process just now."""
    if recipe.answers.view is None or not spent.forwards:
        return {}
    return {"drafted_by": recipe.answers.view, "tokens_per_forward": round(spent.tokens_per_forward, 3)}


def _writer(
    recipe: AnsweredRecipe,
    tokenizer: PreTrainedTokenizerFast,
    model: PreTrainedModel | None,
    decode: str,
    spent: Stats,
) -> shards.Writer:
    how = _how(recipe)
    if recipe.answers.by == "server":
        served_as = recipe.answers.served_as or recipe.model.backbone
        server = Server(url=str(recipe.answers.url), model=served_as)
        return lambda prompts: served_answers(server, tokenizer, prompts, how)
    if model is None:
        raise DataError("answers.by = 'backbone' needs the backbone, found none loaded; give prepare() the model")
    return lambda prompts: responses.answer(model, prompts, how, decode=decode, spent=spent)


def _how(recipe: AnsweredRecipe) -> Answering:
    return Answering(
        max_new_tokens=recipe.responses.max_new_tokens,
        rows=recipe.responses.rows,
        row_tokens=recipe.data.row_tokens,
    )


def _pack(
    recipe: AnsweredRecipe,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    documents: list[EncodedDocument],
    path: Path,
    about: dict[str, Any],
    gain: dict[str, Any],
) -> None:
    if not documents:
        raise DataError(
            f"{path}: a prompt shorter than data.row_tokens ({recipe.data.row_tokens}) is required; "
            f"found none of {len(prompts)}; make rows longer"
        )
    notes = _notes(recipe, tokenizer, prompts, documents) | gain
    random.Random(recipe.data.seed).shuffle(documents)
    rows = pack(documents, row_tokens=recipe.data.row_tokens, pad_id=int(tokenizer.pad_token_id or 0))
    save_rows(rows, path, tokenizer=tokenizer, about=about, notes=notes)


def _notes(
    recipe: AnsweredRecipe,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    documents: Sequence[EncodedDocument],
) -> dict[str, Any]:
    """What a reader of the manifest wants to know of answers: counts, lengths, tokens, template, sources."""
    written = [document.token_ids[document.answer] for document in documents]
    lengths = Counter(2 ** int(len(answer) - 1).bit_length() for answer in written if len(answer))
    counts = np.bincount(np.concatenate(written))
    top = counts.argsort(kind="stable")[::-1][:20]
    end = tokenizer.eos_token_id
    return {
        "prompts": len(prompts),
        "prompts_too_long": len(prompts) - len(documents),
        "answers_cut_short": sum(1 for answer in written if answer[-1:].tolist() != [end]),
        "answer_lengths_up_to": {str(length): lengths[length] for length in sorted(lengths)},
        "tokens_distinct": int((counts > 0).sum()),
        "tokens_most_frequent": [[int(token), int(counts[token])] for token in top if counts[token]],
        "chat_template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
        "thinking": recipe.answers.thinking,
        "answers_by": recipe.answers.by,
        "backbone_name": recipe.model.backbone,
        "sources": [_source_note(source) for source in recipe.data.sources],
    }


def _source_note(source: Source) -> dict[str, Any]:
    note: dict[str, Any] = {"name": source_name(source), "kind": source.kind, "weight": source.weight}
    if isinstance(source, DatasetSource):
        note |= {"dataset": source.name, "config": source.config, "revision": source.revision}
    if not isinstance(source, SyntheticSource):
        note["licence"] = source.licence
    return note


def _heldout_prompts(recipe: AnsweredRecipe, tokenizer: PreTrainedTokenizerFast, source: Source) -> list[Prompt]:
    documents = heldout_documents(source, seed=recipe.data.seed)
    prompts = _prompts(recipe, tokenizer, zip(documents, itertools.count()))
    _check(recipe, prompts)
    return prompts


def _check(recipe: AnsweredRecipe, prompts: Iterable[Prompt]) -> None:
    if recipe.answers.by == "given":
        responses.check_given(prompts, thinking=recipe.answers.enable_thinking)


def _prompts(
    recipe: AnsweredRecipe, tokenizer: PreTrainedTokenizerFast, documents: Iterable[tuple[Document, int]]
) -> list[Prompt]:
    """Prompts of documents, each with the number that picks its turn."""
    return [
        prompt_of(tokenizer, document, choice=choice, thinking=recipe.answers.enable_thinking)
        for document, choice in documents
    ]


def _again(source: Source, *, seed: int) -> Iterator[tuple[Document, int]]:
    """A source's documents, over and over, each with what picks its turn: its own number and the pass's.

    So a chat answers at the next of its turns in the next pass, however many documents there are.
    """
    for again in itertools.count():
        empty = True
        for number, document in enumerate(train_documents(source, seed=seed)):
            empty = False
            yield document, number + again
        if empty:
            raise DataError(f"{source_name(source)}: no document is left to train on; lower `heldout` or drop it")
