"""The parts of a recipe that say which documents a run reads."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from orthrus.data.synthetic import Domain

Positive = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """A frozen table of a recipe that accepts no unknown key and converts no types."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    def faults(self) -> Iterator[str]:
        """Say what keys that are right by themselves cannot be together."""
        yield from ()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if faults := list(self.faults()):
            raise ValueError("; ".join(faults))
        return self


class _Source(Section):
    weight: float = Field(gt=0)
    heldout: int = Field(default=0, ge=0, description="first documents, kept back to evaluate on")


class SyntheticSource(_Source):
    """Problems of one domain of the procedural generator, `orthrus.data.synthetic`, with a split to hold out."""

    kind: Literal["synthetic"]
    domain: Domain


class JsonlSource(_Source):
    """Records of a JSONL file, `.gz` too, repeated when they are fewer than their share."""

    kind: Literal["jsonl"]
    path: str
    split_characters: Positive | None = Field(
        default=None, description="cut texts longer than this into pieces, at blank lines where possible"
    )
    licence: str | None = Field(default=None, description="for the manifest")


class DatasetColumns(Section):
    """Which column holds whole chats (`messages`), a question and its answer (`prompt`, `answer`), or a `text`."""

    messages: str | None = None
    prompt: str | None = None
    answer: str | None = None
    text: str | None = None

    def faults(self) -> Iterator[str]:
        if [self.messages, self.prompt, self.text].count(None) != 2 or (self.answer and not self.prompt):
            yield "one of messages, prompt and text is required, and answer with prompt only"


class DatasetSource(_Source):
    """A Hugging Face dataset by Hub id or directory, repeated when it has fewer rows than its share."""

    kind: Literal["dataset"]
    name: str
    config: str | None = None
    revision: str | None = Field(default=None, description="a commit or tag; without one, whatever is newest")
    split: str = "train"
    columns: DatasetColumns
    streaming: bool = True
    licence: str | None = Field(default=None, description="for the manifest")


Source = Annotated[SyntheticSource | JsonlSource | DatasetSource, Field(discriminator="kind")]


def source_name(source: Source) -> str:
    """A short name of a source: its domain, its file's name without endings, or its dataset's with the split."""
    match source:
        case JsonlSource():
            return Path(source.path).name.split(".")[0]
        case DatasetSource():
            return f"{Path(source.name).name}-{source.split}"
    return source.domain


class DataSection(Section):
    """Which documents, in which proportions, packed into rows of which length."""

    sources: Annotated[list[Source], Field(min_length=1)]
    row_tokens: Positive
    seed: int = 0
    folder: str | None = Field(default=None, description="where rows are kept; run.output/data unless recipes share it")

    def faults(self) -> Iterator[str]:
        seen: dict[str, int] = {}
        for number, source in enumerate(self.sources):
            name = source_name(source)
            if source.heldout and name in seen:
                yield (
                    f"sources that hold documents back must have different names, found {name!r} for "
                    f"{_origin(self.sources[seen[name]])} (sources.{seen[name]}) and {_origin(source)} "
                    f"(sources.{number}): rename a file or folder, or set heldout = 0 in all but one"
                )
            if source.heldout:
                seen[name] = number


class CorpusSection(DataSection):
    """Documents that are trained on as they are."""

    tokens: Positive = Field(description="size of the packed corpus, shared out by the sources' weights")


def _origin(source: Source) -> str:
    """Where a source's documents are from, in full."""
    match source:
        case JsonlSource():
            return source.path
        case DatasetSource():
            return f"{source.name} ({', '.join(filter(None, (source.config, source.split)))})"
    return source.domain
