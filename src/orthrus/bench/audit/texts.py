"""The texts that an audit compares: the engine's in every mode, Hugging Face's, and how sure plain decoding was.

Knows engines and tokenizers; knows no suite, no file and no verdict.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orthrus.bench.contenders import Contender
from orthrus.bench.peers import hf
from orthrus.decode.api import engine_for
from orthrus.decode.engine import Engine, Row
from orthrus.decode.exact import Exact
from orthrus.decode.options import Options
from orthrus.decode.passes import Passes
from orthrus.decode.stop import Stopper
from orthrus.policy import steps as plans


@dataclass(frozen=True, slots=True)
class Plain:
    """A text by plain decoding, and for each token its logit's lead over the second best."""

    token_ids: list[int]
    gaps: list[float]


class Margins(Passes):
    """Passes that note, with every verification, how far the last slot's best logit is ahead."""

    gaps: list[float]

    @classmethod
    def watch(cls, engine: Engine) -> "Margins":
        """Take the place of an engine's passes; the engine must have one row, and decode plainly."""
        engine.passes = watching = cls(engine.passes.model, engine.cache, engine.passes.geometry)
        watching.gaps = []
        return watching

    def verify(self, rows: slice, token_BQ: Tensor) -> Tensor:
        """Run the AR view, as `Passes.verify` does."""
        logits = super().verify(rows, token_BQ)
        best, second = logits[0, -1].float().topk(2).values.tolist()
        self.gaps.append(best - second)
        return logits


class Writer:
    """Let one model answer prompts, greedily, by any of its decoders.

    Args:
        model: a dual-view model, in the precision that is audited.
        tokenizer: the model's own.
        max_new_tokens: tokens per text at most (fewer where the model's context ends).
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.options = Options.of(model.generation_config, max_new_tokens=max_new_tokens)
        self.context: int = model.config.get_text_config().max_position_embeddings
        self._backbone = hf.plain(model)

    def plain(self, prompt: list[int], exact: Exact) -> Plain:
        """Answer by plain steps, alone, in an engine that has seen nothing else."""
        engine = self._engine([prompt], Contender("ar", None, exact), 1)
        watching = Margins.watch(engine)
        (row,) = self._finish(engine, [prompt])
        return Plain(row.token_ids, watching.gaps)

    def answers(self, prompts: list[list[int]], who: Contender, rows: int) -> list[Row]:
        """Answer prompts with so many rows at once, which join as others end; returns their rows in order."""
        return self._finish(self._engine(prompts, who, rows), prompts)

    def hf(self, prompt: list[int]) -> list[int]:
        """Answer by transformers' `generate`, with the untouched backbone at the same precision."""
        settings = hf.settings("hf", self.options.eos_token_id, self._limit(prompt))
        return hf.generate(self._backbone, [prompt], settings)[0]

    def _engine(self, prompts: list[list[int]], who: Contender, rows: int) -> Engine:
        plan, exact = plans.parse(who.plan or "ar"), who.exact or "distribution"
        return engine_for(self.model, prompts, self.options, plan, rows=min(rows, len(prompts)), exact=exact)

    def _finish(self, engine: Engine, prompts: list[list[int]]) -> list[Row]:
        stoppers = [Stopper(self.options, self.tokenizer, limit=self._limit(prompt)) for prompt in prompts]
        ids = [engine.add(p, self.options, stopper=s) for p, s in zip(prompts, stoppers, strict=True)]
        rows: dict[int, Row] = {}
        while engine.busy:
            rows.update((progress.row.id, progress.row) for progress in engine.step())
        return [rows[id] for id in ids]

    def _limit(self, prompt: list[int]) -> int:
        return min(self.options.max_new_tokens, self.context - len(prompt))


@torch.inference_mode()
def perplexity(model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Return the perplexity of an answer under the backbone, the whole text read in one pass."""
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    logits = model(input_ids=ids, logits_to_keep=len(answer) + 1, use_cache=False).logits[0, :-1]
    return math.exp(torch.nn.functional.cross_entropy(logits.float(), ids[0, len(prompt) :]).item())
