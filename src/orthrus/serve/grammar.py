"""Texts held to a grammar: JSON schemas and tool calls, compiled by llguidance, as a logits processor.

It is a function of the text before a slot, so drafts are held to the grammar as the backbone's own tokens are.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from orthrus.decode.text import decode
from orthrus.errors import ConfigError, DecodingError
from orthrus.serve.logprobs import Spelling

_COMPACT: Final[Any] = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
_SPACED: Final[Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Compile what a model with this tokenizer is held to. The tokenizer is prepared when it is first needed."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, vocabulary: int, eos: Sequence[int]) -> None:
        self._tokenizer, self._vocabulary, self._eos = tokenizer, vocabulary, list(eos)
        self._prepared: LLTokenizer | None = None
        self._lock = threading.Lock()

    def json(self, schema: Mapping[str, Any]) -> str:
        """Return the grammar of the JSON texts, without spaces, that a schema allows.

        Raises ConfigError: a schema that is none, or that cannot be compiled.
        """
        return self._checked(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_COMPACT))

    def calls(
        self,
        tools: Sequence[Mapping[str, Any]],
        *,
        single: bool = False,
        otherwise: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the grammar of calls of some functions, one after another, in Hermes' form (`orthrus.serve.calls`).

        Where `otherwise` is a schema, a JSON text that it allows may stand in their place.

        Raises ConfigError: parameters that are no schema, or that cannot be compiled.
        """
        schemas = [_call_schema(tool) for tool in tools]
        body = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        more = "" if single else '\n    | call ("\\n" call)+'
        answer = "" if otherwise is None else f"\nanswer: %json {json.dumps({'x-guidance': _COMPACT, **otherwise})}"
        return self._checked(
            LLMatcher.grammar_from_lark(
                f'start: call{more}{" | answer" if answer else ""}\ncall: "<tool_call>\\n" body "\\n</tool_call>"\n'
                f"body: %json {json.dumps({'x-guidance': _SPACED, **body})}{answer}\n"
            )
        )

    def constraint(self, grammar: str, *, prompt: int, after: int | None = None) -> "Constraint":
        """Return the processor of one text that follows a prompt of so many tokens.

        Where `after` is a token, the grammar begins behind its first occurrence (the end of a thought).
        """
        return Constraint(LLMatcher(self.tokenizer, grammar), prompt=prompt, after=after)

    def spell(self, token: int) -> Spelling:
        """Return a token's text and bytes; parts of characters are written as OpenAI does, `bytes:\\xe2\\x82`."""
        try:
            spelled = self.tokenizer.decode_bytes([token])
        except ConfigError:
            spelled = decode(self._tokenizer, [token], skip_special_tokens=False).encode()
        try:
            return Spelling(spelled.decode(), spelled)
        except UnicodeDecodeError:
            return Spelling("bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled), spelled)

    @property
    def tokenizer(self) -> LLTokenizer:
        """The tokenizer as llguidance reads it; raises ConfigError for one that it cannot read."""
        with self._lock:
            if self._prepared is None:
                self._prepared = self._prepare()
            return self._prepared

    def _prepare(self) -> LLTokenizer:
        if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
            raise ConfigError(f"grammars need a fast tokenizer, found {type(self._tokenizer).__name__}")
        try:
            return llguidance.hf.from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=self._eos or None)
        except Exception as error:
            raise ConfigError(f"grammars cannot be used with this model's tokenizer: {error}") from error

    def _checked(self, grammar: str) -> str:
        if not self._eos:
            raise ConfigError("a text held to a grammar ends with an end-of-text token, this model has none")
        fault = LLMatcher.validate_grammar(grammar, self.tokenizer)
        if fault and not fault.startswith("WARNING"):
            raise ConfigError(f"the schema cannot be used: {fault.splitlines()[0]}")
        return grammar


class Constraint:
    """Forbid every token that the grammar does not allow after a text."""

    def __init__(self, matcher: LLMatcher, *, prompt: int, after: int | None) -> None:
        self._matcher, self._prompt, self._after = matcher, prompt, after
        self._consumed: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores `[1, V]` after the text `[1, L]`; forbidden tokens have none (minus infinity)."""
        written: list[int] = input_ids[0, self._prompt :].tolist()
        if self._after is not None:
            if self._after not in written:
                return scores
            written = written[written.index(self._after) + 1 :]
        if not self._move_to(written):
            return scores  # nobody gets here: the text before has a token that is forbidden
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise DecodingError(f"the grammar cannot be followed: {self._matcher.get_error()}")
        allowed = np.zeros(scores.shape[1], dtype=bool)
        flags = np.unpackbits(bits, bitorder="little")[: scores.shape[1]].astype(bool)
        allowed[: len(flags)] = flags
        return scores.masked_fill(~torch.from_numpy(allowed).to(scores.device), -torch.inf)

    def _move_to(self, written: list[int]) -> bool:
        """Bring the matcher behind a text; returns whether the grammar allows all of it."""
        same = 0
        for one, other in zip(self._consumed, written, strict=False):
            if one != other:
                break
            same += 1
        if same < len(self._consumed):
            self._matcher.rollback(len(self._consumed) - same)
            del self._consumed[same:]
        rest = written[same:]
        taken = self._matcher.try_consume_tokens(rest) if rest else 0
        self._consumed += rest[:taken]
        return taken == len(rest)


def _call_schema(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": tool["name"]}, "arguments": tool.get("parameters") or {"type": "object"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
