"""When a text ends: end-of-text tokens, stop strings, the caller's criteria, length, time.

One object per completion, fed a cycle at a time.

Knows a tokenizer only to see stop strings appear; knows no model.
"""

import math
import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList

from orthrus.decode.options import Options
from orthrus.decode.output import FinishReason
from orthrus.decode.text import TextStream
from orthrus.errors import ConfigError


class Stopper:
    """Cut each cycle's tokens where the text ends."""

    def __init__(
        self, options: Options, tokenizer: PreTrainedTokenizerBase | None, *, limit: int, prompt_ids: Sequence[int] = ()
    ) -> None:
        """Prepare for one completion of at most `limit` tokens.

        Stop strings need the tokenizer, the caller's criteria the prompt; seconds count from here.
        """
        if options.stop_strings and tokenizer is None:
            raise ConfigError("stop_strings need a tokenizer, found None: pass the model's tokenizer")
        self._eos = frozenset(options.eos_token_id)
        self._stops = options.stop_strings
        self._reach = max(map(len, options.stop_strings), default=0)
        self._left = limit
        self._criteria = StoppingCriteriaList(options.stopping_criteria)
        self._ids = list(prompt_ids) if self._criteria else []
        self._deadline = math.inf if options.max_time is None else time.monotonic() + options.max_time
        self._text = ""
        self._decoder = None
        if options.stop_strings and tokenizer is not None:
            self._decoder = TextStream(tokenizer, skip_special_tokens=False)  # those may be meant, too

    def cut(self, tokens: Sequence[int]) -> tuple[list[int], FinishReason | None]:
        """Return the tokens that belong to the text, and why it ends there (None: it goes on)."""
        kept = list(tokens[: self._left])
        reason: FinishReason | None = None
        for i, token in enumerate(kept):
            if token in self._eos or self._completes_stop(token) or self._meets_criterion(token):
                reason = "stop"
            elif self._deadline < math.inf and time.monotonic() > self._deadline:
                reason = "length"
            if reason is not None:
                kept = kept[: i + 1]
                break
        self._left -= len(kept)
        return kept, reason or ("length" if self._left <= 0 else None)

    def _meets_criterion(self, token: int) -> bool:
        if not self._criteria:
            return False
        self._ids.append(token)
        return bool(self._criteria(torch.tensor([self._ids]), None))

    def _completes_stop(self, token: int) -> bool:
        if self._decoder is None:
            return False
        # Only the last characters can be part of a stop string that this token completes.
        self._text = self._text[-self._reach :] + self._decoder.push(token)
        text = self._text + self._decoder.pending
        return any(stop in text for stop in self._stops)


def until_end(tokens: Sequence[int], eos: Sequence[int]) -> list[int]:
    """Return a text up to its first end-of-text token, that one included."""
    for index, token in enumerate(tokens):
        if token in eos:
            return list(tokens[: index + 1])
    return list(tokens)
