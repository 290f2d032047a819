"""Drafters inside vLLM on one backbone, each in an engine of its own: texts, passes and vLLM's own counters."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orthrus
from orthrus.checkpoints.load import backbone_with_tokenizer
from tests.vllm.drive import BASE, serve, texts

ENGINE = {
    **BASE,
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 1024,
    "enable_prefix_caching": False,
}
"""The same for all. A context well above the longest text: near its end vLLM lets no stock drafter draft."""
VIEW, PLAIN, NGRAM = "orthrus", "plain", "ngram"


@dataclass(frozen=True)
class Entry:
    """A participant: how vLLM calls its method (`orthrus`: this package's plugin), its weights, drafts a step."""

    method: str
    source: Path | None = None
    drafts: int = 0

    @classmethod
    def parse(cls, text: str) -> "Entry":
        """Read `METHOD=FOLDER@DRAFTS`, with a folder where the method has weights; `plain` has no drafts."""
        rest, _, drafts = text.partition("@")
        method, _, source = rest.partition("=")
        return cls(method, Path(source) if source else None, int(drafts or 0))

    def engine(self, model: Path) -> dict[str, Any]:
        """Return what the engine is told beside `ENGINE`, for the model that it serves."""
        if self.method == PLAIN:
            return {}
        method = "draft_model" if self.method == VIEW else self.method
        spec: dict[str, Any] = {"method": method, "num_speculative_tokens": self.drafts}
        if self.method == NGRAM:
            spec |= {"prompt_lookup_min": 2, "prompt_lookup_max": 5}
        else:
            spec |= {"model": str(model if self.method == VIEW else self.source)}
        return {"speculative_config": spec}


@dataclass(frozen=True)
class Count:
    """What vLLM did for some texts.

    Attributes:
        passes: the backbone's for each text, its prompt's own not counted.
        steps: those of them that verified drafts, by vLLM's counter.
        accepted: drafts kept at each position, by vLLM's counter; what stands behind a text's end is among them.
        tokens: what the passes wrote, without the token that a prompt's own pass gives.
    """

    texts: list[list[int]]
    passes: int
    tokens: int
    steps: int
    accepted: list[int]

    @classmethod
    def of(cls, call: dict[str, Any]) -> "Count":
        written = [passes[1:] for passes in call["written"]]
        return cls(
            texts=texts(call),
            passes=sum(len(one) for one in written),
            tokens=sum(sum(one) for one in written),
            steps=call.get("drafts", 0),
            accepted=call.get("accepted_at", []),
        )

    @classmethod
    def total(cls, counts: Sequence["Count"]) -> "Count":
        """Return the sum of several."""
        return cls(
            texts=[text for count in counts for text in count.texts],
            passes=sum(count.passes for count in counts),
            tokens=sum(count.tokens for count in counts),
            steps=sum(count.steps for count in counts),
            accepted=[sum(kept) for kept in zip(*(count.accepted for count in counts), strict=True)],
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values, texts left out."""
        return {
            "texts": len(self.texts),
            "passes": self.passes,
            "tokens": self.tokens,
            "steps_with_drafts": self.steps,
            "accepted_at_position": self.accepted,
            "accepted_per_step": sum(self.accepted) / self.steps if self.steps else None,
            "tokens_per_pass": self.tokens / self.passes,
        }


def backbone(name: str, folder: Path) -> Path:
    """Write a plain copy of a backbone, since vLLM loads every tensor of a folder; returns the folder."""
    model, tokenizer = backbone_with_tokenizer(name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def official(name: str, folder: Path) -> Path:
    """Write a backbone and its view in the layout that the plugin serves; returns the folder."""
    model, tokenizer = orthrus.load(name)
    orthrus.save(model, folder, format="official")
    tokenizer.save_pretrained(folder)
    return folder


def run(
    entry: Entry, model: Path, suites: Sequence[list[list[int]]], tokens: int, **more: Any
) -> tuple[list[Count], dict[str, Any]]:
    """Answer suites of prompts greedily in a fresh engine; returns a count for each, and what serves."""
    sampling = {"temperature": 0.0, "max_tokens": tokens}
    calls = [{"prompts": prompts, "sampling": sampling, "by_pass": True} for prompts in suites]
    found = serve(model, {**ENGINE, **entry.engine(model)}, calls, processes=False, **more)
    names = ("model_class", "drafter_class", "draft_model_class")
    return [Count.of(call) for call in found], {name: found[0][name] for name in names if name in found[0]}
