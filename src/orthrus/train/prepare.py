"""From a recipe to packed rows on disk: prompts, answers in shards, rows with a manifest, made once."""

import hashlib
import itertools
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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
from orthrus.train.corpus import corpus_about, data_folder, heldout_documents, over_and_over
from orthrus.train.drafting import drafting
from orthrus.train.ranks import Ranks
from orthrus.train.sections import AnsweredRecipe, AnswersSection
from orthrus.train.sources import DatasetSource, Source, SyntheticSource, source_name


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
) -> Prepared:
    """Make what is missing of `run.output/data` and open it; all processes of a run call it together.

    `model` is the backbone with a view attached; needed where it writes the answers itself.

    Raises:
        DataError: sources or answers that cannot be read or do not fit together, or data made by another recipe.
        ConfigError: a thinking setting that the chat template does not know.
    """
    making = _Making(recipe, tokenizer, model, ranks)
    heldout = {
        source_name(source): _prompts(
            recipe, tokenizer, zip(heldout_documents(source, seed=recipe.data.seed), itertools.count())
        )
        for source in recipe.data.sources
        if source.heldout
    }
    return Prepared(
        rows=making.packed("train", lambda: train_prompts(recipe, tokenizer)),
        heldout={name: making.packed(f"heldout-{name}", partial(list, prompts)) for name, prompts in heldout.items()},
        # Those that are packed, in the documents' order: the first few are decoded, not the shortest.
        heldout_prompts={
            name: [prompt.token_ids for prompt in prompts if making.how.fits(prompt)]
            for name, prompts in heldout.items()
        },
    )


def train_prompts(recipe: AnsweredRecipe, tokenizer: PreTrainedTokenizerFast) -> list[Prompt]:
    """Take prompts from each source by its weight, `responses.prompts` in all; sources start over at their end.

    Warns where some are the same.
    """
    data = recipe.data
    whole = sum(source.weight for source in data.sources)
    documents = (
        itertools.islice(over_and_over(source, seed=data.seed), round(recipe.responses.prompts * source.weight / whole))
        for source in data.sources
    )
    prompts = _prompts(recipe, tokenizer, itertools.chain.from_iterable(documents))
    if (distinct := len({tuple(prompt.token_ids) for prompt in prompts})) < len(prompts):
        warnings.warn(
            f"responses.prompts asks for {len(prompts)} prompts, the sources hold {distinct} different ones: the "
            "rest repeat them; lower it, or add documents",
            stacklevel=2,
        )
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


@dataclass(frozen=True, slots=True)
class _Making:
    """What packed sets of one recipe are made by and of; all processes of a run do it together."""

    recipe: AnsweredRecipe
    tokenizer: PreTrainedTokenizerFast
    model: PreTrainedModel | None
    ranks: Ranks

    @property
    def how(self) -> Answering:
        asked, row_tokens = self.recipe.responses, self.recipe.data.row_tokens
        return Answering(max_new_tokens=asked.max_new_tokens, rows=asked.rows, row_tokens=row_tokens)

    def packed(self, name: str, ask: Callable[[], list[Prompt]]) -> PackedRows:
        """Return packed answers, or have them written, by all processes, and packed by the first."""
        path, data = data_folder(self.recipe) / name, self.recipe.data
        folder = path.with_name(path.name + "-answers")
        about = made_from(self.recipe, self.model)
        if self.ranks.any(not are_about(path, about)):
            prompts, given = ask(), self.recipe.answers.by == "given"
            gain = {} if given else self._write(folder, name, prompts)
            self.ranks.wait()
            if self.ranks.main:
                documents = (
                    list(responses.given_answers(self.tokenizer, prompts, self.how))
                    if given
                    else shards.read_answers(folder, prompts)
                )
                if not documents:
                    raise DataError(
                        f"{path}: a prompt shorter than data.row_tokens ({data.row_tokens}) is required; "
                        f"found none of {len(prompts)}; make rows longer"
                    )
                notes = _notes(self.recipe, self.tokenizer, prompts, documents) | gain
                random.Random(data.seed).shuffle(documents)
                rows = pack(documents, row_tokens=data.row_tokens, pad_id=int(self.tokenizer.pad_token_id or 0))
                save_rows(rows, path, tokenizer=self.tokenizer, about=about, notes=notes)
            self.ranks.wait()
        return load_rows(path, tokenizer=self.tokenizer, about=about)

    def _write(self, folder: Path, name: str, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Write this process's share of the answers; returns what drafting saved, as far as it wrote any just now."""
        spent, view = Stats(forwards=0), self.recipe.answers.view
        with drafting(self.model, view) as decode:
            shards.write_answers(
                folder,
                prompts,
                self._writer(decode, spent),
                about=answered_by(self.recipe, self.model),
                share=(self.ranks.index, self.ranks.count),
                label=name,
            )
        if view is None or not spent.forwards:
            return {}
        return {"drafted_by": view, "tokens_per_forward": round(spent.tokens_per_forward, 3)}

    def _writer(self, decode: str, spent: Stats) -> shards.Writer:
        model, answers = self.model, self.recipe.answers
        if answers.by == "server":
            server = Server(url=str(answers.url), model=answers.served_as or self.recipe.model.backbone)
            return lambda prompts: served_answers(server, self.tokenizer, prompts, self.how)
        if model is None:
            raise DataError("answers.by = 'backbone' needs the backbone, found none loaded; give prepare() the model")
        return lambda prompts: responses.answer(model, prompts, self.how, decode=decode, spent=spent)


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


def _prompts(
    recipe: AnsweredRecipe, tokenizer: PreTrainedTokenizerFast, documents: Iterable[tuple[Document, int]]
) -> list[Prompt]:
    """Prompts of documents, each with the number that picks its turn; given answers are checked."""
    thinking = recipe.answers.enable_thinking
    prompts = [prompt_of(tokenizer, document, choice=choice, thinking=thinking) for document, choice in documents]
    if recipe.answers.by == "given":
        responses.check_given(prompts, thinking=thinking)
    return prompts
