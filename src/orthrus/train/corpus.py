"""From a recipe's sources to packed rows on disk: shares of tokens, held-out documents, made once."""

import itertools
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from orthrus.data.documents import Document, dataset_documents, jsonl_documents, synthetic_documents
from orthrus.data.packing import EncodedDocument, PackedRows, encode_documents, load_rows, pack, save_rows
from orthrus.errors import ConfigError, DataError
from orthrus.train.sections import Recipe
from orthrus.train.sources import (
    CorpusSection,
    DataSection,
    DatasetSource,
    JsonlSource,
    Source,
    SyntheticSource,
    source_name,
)


def train_documents(source: Source, *, seed: int) -> Iterator[Document]:
    """The training documents of a source, once; endless for the generator. Held-back ones are left out."""
    if isinstance(source, SyntheticSource):
        return synthetic_documents(source.domain, split="train", seed=seed)
    return itertools.islice(_stored(source), source.heldout, None)


def heldout_documents(source: Source, *, seed: int) -> list[Document]:
    """The documents of a source that are never trained on."""
    if isinstance(source, SyntheticSource):
        documents = synthetic_documents(source.domain, split="heldout", seed=seed)
    else:
        documents = _stored(source)
    return list(itertools.islice(documents, source.heldout))


def _stored(source: JsonlSource | DatasetSource) -> Iterator[Document]:
    if isinstance(source, JsonlSource):
        return jsonl_documents(source.path, split_characters=source.split_characters)
    return dataset_documents(
        source.name,
        config=source.config,
        revision=source.revision,
        split=source.split,
        columns=source.columns.model_dump(exclude_none=True),
        streaming=source.streaming,
    )


def mixed_documents(data: DataSection, *, characters: int) -> Iterator[Document]:
    """Documents of every source, each source up to its share of a number of characters."""
    whole = sum(source.weight for source in data.sources)
    for source in data.sources:
        budget = characters * source.weight / whole
        for document in train_documents(source, seed=data.seed):
            yield document
            budget -= len(document.text) + sum(len(message.get("content", "")) for message in document.messages)
            if budget <= 0:
                break


def corpus_about(data: DataSection) -> dict[str, Any]:
    """What a packed corpus depends on: not where it is kept, nor a licence, which is for readers only."""
    return data.model_dump(mode="json", exclude={"folder": True, "sources": {"__all__": {"licence"}}})


def data_folder(recipe: Recipe) -> Path:
    """Where a recipe's rows are kept. Raises ConfigError: a file stands where it asks for a folder."""
    for key, folder in (("run.output", recipe.run.output), ("data.folder", recipe.data.folder)):
        if folder is not None and Path(folder).is_file():
            raise ConfigError(f"{key} must be a folder, found the file {folder}: name another")
    return Path(recipe.run.output) / "data" if recipe.data.folder is None else Path(recipe.data.folder)


def training_rows(data: CorpusSection, tokenizer: PreTrainedTokenizerFast, folder: Path) -> PackedRows:
    """The packed corpus of a recipe, from `folder/train` if it is there, else made and kept there."""
    return _rows(folder / "train", data, tokenizer, _train_encoded(data, tokenizer))


def heldout_rows(data: DataSection, tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, PackedRows]:
    """Packed held-out rows by source, from `folder/heldout-NAME` or made and kept there."""
    return {
        source_name(source): _rows(
            folder / f"heldout-{source_name(source)}",
            data,
            tokenizer,
            encode_documents(tokenizer, heldout_documents(source, seed=data.seed)),
        )
        for source in data.sources
        if source.heldout
    }


def _rows(
    path: Path, data: DataSection, tokenizer: PreTrainedTokenizerFast, encoded: Iterable[EncodedDocument]
) -> PackedRows:
    about = corpus_about(data)
    if not path.exists():
        rows = pack(encoded, row_tokens=data.row_tokens, pad_id=int(tokenizer.pad_token_id or 0))
        save_rows(rows, path, tokenizer=tokenizer, about=about)
    return load_rows(path, tokenizer=tokenizer, about=about)


def _train_encoded(data: CorpusSection, tokenizer: PreTrainedTokenizerFast) -> Iterator[EncodedDocument]:
    whole = sum(source.weight for source in data.sources)
    encoded: list[EncodedDocument] = []
    for source in data.sources:
        encoded += _share(source, data, tokenizer, tokens=round(data.tokens * source.weight / whole))
    random.Random(data.seed).shuffle(encoded)
    yield from encoded


def _share(
    source: Source, data: CorpusSection, tokenizer: PreTrainedTokenizerFast, *, tokens: int
) -> list[EncodedDocument]:
    """Documents of one source until its share of tokens is full; the source starts over when it ends."""
    share: list[EncodedDocument] = []
    documents = (document for document, _ in over_and_over(source, seed=data.seed))
    for document in encode_documents(tokenizer, documents):
        share.append(document)
        tokens -= min(len(document.token_ids), data.row_tokens)
        if tokens <= 0:
            break
    return share


def over_and_over(source: Source, *, seed: int) -> Iterator[tuple[Document, int]]:
    """A source's documents, without end, each with the number that picks the turn a chat answers at.

    Raises DataError: there is none.
    """
    for again in itertools.count():
        number = -1
        for number, document in enumerate(train_documents(source, seed=seed)):
            yield document, number + again
        if number < 0:
            raise DataError(
                f"{source_name(source)}: more documents than `heldout` ({source.heldout}) are required to train on, "
                "found no more; lower `heldout`, or add documents"
            )
