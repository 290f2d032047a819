"""Texts that are compared: the engine's in every mode, Hugging Face's, and how sure plain decoding was."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.bench.peers import hf
from orthrus.bench.race import PLAIN, Contender
from orthrus.decode.api import engine_for
from orthrus.decode.engine import Engine
from orthrus.decode.exact import Exact
from orthrus.decode.frames import Reading
from orthrus.decode.geometry import Geometry
from orthrus.decode.options import Options
from orthrus.decode.passes import Logits, Passes, Proposal
from orthrus.decode.rows import Row
from orthrus.model.cache import ScratchCache
from orthrus.policy import steps as plans


@dataclass(frozen=True, slots=True)
class Plain:
    """A text by plain decoding, and for each token its logit's lead over the second best."""

    token_ids: list[int]
    gaps: list[float]


class Margins(Passes):
    """Passes of one row that decodes plainly, which note with every token how far its logit is ahead."""

    def __init__(self, model: PreTrainedModel, cache: ScratchCache, geometry: Geometry | None = None) -> None:
        super().__init__(model, cache, geometry)
        self.gaps: list[float] = []

    def run(self, rows: slice, reading: Reading) -> Logits:
        logits = super().run(rows, reading)
        self._note(logits.ar_BQV[0, -1])
        return logits

    def prefill(self, rows: slice, pending: Sequence[Sequence[int]], **how: Any) -> Proposal | None:
        made = super().prefill(rows, pending, **how)
        if made is not None and made.first_B1V is not None:
            self._note(made.first_B1V[0, 0])
        return made

    def _note(self, logits_V: torch.Tensor) -> None:
        best, second = logits_V.float().topk(2).values.tolist()
        self.gaps.append(best - second)


class Writer:
    """Let one model answer prompts, greedily, by any of its decoders, with so many tokens at most."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.options = Options.of(model.generation_config, max_new_tokens=max_new_tokens)
        self.context: int = model.config.get_text_config().max_position_embeddings

    def greedy(self, prompt: list[int]) -> list[int]:
        """Answer by plain steps, alone."""
        return self.answers([prompt], PLAIN, 1)[0].token_ids

    def plain(self, prompt: list[int], exact: Exact) -> Plain:
        """Answer by plain steps, alone, and note how far each token was ahead."""
        engine = self._engine([prompt], PLAIN._replace(exact=exact), 1, passes=Margins)
        (row,) = engine.finish([prompt], self.options, tokenizer=self.tokenizer)
        assert isinstance(engine.passes, Margins)
        return Plain(row.token_ids, engine.passes.gaps)

    def answers(self, prompts: list[list[int]], who: Contender, rows: int) -> list[Row]:
        """Answer prompts with so many rows at once, which join as others end; returns their rows in order."""
        return self._engine(prompts, who, rows).finish(prompts, self.options, tokenizer=self.tokenizer)

    def hf(self, prompt: list[int]) -> list[int]:
        """Answer by transformers' `generate`, with the untouched backbone at the same precision."""
        limit = min(self.options.max_new_tokens, self.context - len(prompt))
        settings = hf.settings("hf", self.options.eos_token_id, limit)
        return hf.generate(self._backbone, [prompt], settings)[0]

    @cached_property
    def _backbone(self) -> PreTrainedModel:
        return hf.plain(self.model)

    def _engine(self, prompts: list[list[int]], who: Contender, rows: int, **more: Any) -> Engine:
        plan, exact = plans.parse(who.plan or "ar"), who.exact or "distribution"
        return engine_for(self.model, prompts, self.options, plan, rows=min(rows, len(prompts)), exact=exact, **more)


def answer_logits(model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Return the backbone's logits for each token of an answer `[T, V]` in float32, the text read in one pass."""
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    logits: torch.Tensor = model(input_ids=ids, logits_to_keep=len(answer) + 1, use_cache=False).logits
    return logits[0, :-1].float()


@torch.inference_mode()
def perplexity(model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Return the perplexity of an answer under the backbone, the whole text read in one pass."""
    logits_TV = answer_logits(model, prompt, answer)
    return math.exp(cross_entropy(logits_TV, torch.tensor(answer, device=model.device)).item())
