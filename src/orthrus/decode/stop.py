"""When a text ends: end-of-text tokens, stop strings, length. One object per completion, fed a cycle at a time.

Knows a tokenizer only to see stop strings appear; knows no model.
"""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from orthrus.decode.options import Options
from orthrus.decode.output import FinishReason
from orthrus.errors import ConfigError


class Stopper:
    """Cut each cycle's tokens where the text ends."""

    def __init__(self, options: Options, tokenizer: PreTrainedTokenizerBase | None, *, limit: int) -> None:
        """Prepare for one completion of at most `limit` tokens; stop strings need the tokenizer."""
        if options.stop_strings and tokenizer is None:
            raise ConfigError("stop_strings need a tokenizer, found None: pass the model's tokenizer")
        self._eos = frozenset(options.eos_token_id)
        self._stops = options.stop_strings
        self._reach = max(map(len, options.stop_strings), default=0)
        self._left = limit
        self._text = ""
        self._decoder = None
        if options.stop_strings and tokenizer is not None:
            self._decoder = TextStream(tokenizer, skip_special_tokens=False)  # those may be meant, too

    def cut(self, tokens: Sequence[int]) -> tuple[list[int], FinishReason | None]:
        """Return the tokens that belong to the text, and why it ends there (None: it goes on)."""
        kept = list(tokens[: self._left])
        reason: FinishReason | None = None
        for i, token in enumerate(kept):
            if token in self._eos or self._completes_stop(token):
                kept, reason = kept[: i + 1], "stop"
                break
        self._left -= len(kept)
        return kept, reason or ("length" if self._left <= 0 else None)

    def _completes_stop(self, token: int) -> bool:
        if self._decoder is None:
            return False
        piece = self._decoder.push(token)
        # Only the last characters can be part of a stop string that this piece completes.
        self._text = self._text[-self._reach :] + piece
        return bool(piece) and any(stop in self._text for stop in self._stops)


class TextStream:
    """Turn tokens into text as they come; a character split over tokens appears with its last one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool = True) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f"streaming and stop strings need a fast tokenizer, found {type(tokenizer).__name__}: load it with "
                "AutoTokenizer.from_pretrained(..., use_fast=True)"
            )
        self._backend = backend
        self._skip = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._tokens: list[int] = []
        self._given = ""

    def push(self, token: int) -> str:
        """Return the text that this token completes."""
        piece = self._stream.step(self._backend, token) or ""
        self._tokens.append(token)
        self._given += piece
        return piece

    def rest(self) -> str:
        """Return what is left of an unfinished character once no token will follow."""
        whole: str = self._backend.decode(self._tokens, skip_special_tokens=self._skip)
        return whole[len(self._given) :] if whole.startswith(self._given) else ""
