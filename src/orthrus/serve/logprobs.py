"""Log probabilities of tokens, from the logits of the passes that verified them: exact, and at no pass of their own.

They are the model's own, before temperature, penalties, biases and grammars.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from torch import Tensor

LEAST: Final = -9999.0
"""What stands for an impossible token's log probability: JSON has no infinity."""


class Scored(NamedTuple):
    """A token with its log probability, and the likeliest tokens in its place with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


def scored(logits_NV: Tensor, tokens: Sequence[int], top: int) -> list[Scored]:
    """Score the tokens chosen by these logits, with the `top` likeliest in each one's place."""
    if not tokens:
        return []
    logprobs_NV = logits_NV.float().log_softmax(-1).clamp_min(LEAST)
    chosen = logprobs_NV[range(len(tokens)), list(tokens)].tolist()
    values_NT, ids_NT = logprobs_NV.topk(min(top, logprobs_NV.shape[1]), dim=-1)
    rows = zip(tokens, chosen, ids_NT.tolist(), values_NT.tolist(), strict=True)
    return [Scored(token, value, list(zip(ids, values, strict=True))) for token, value, ids, values in rows]


class Spelling(NamedTuple):
    """A token as text, and its bytes; a part of a character is no text of its own."""

    text: str
    bytes: bytes


def chat_logprobs(tokens: Sequence[Scored], spell: Any) -> dict[str, Any]:
    """Return the `logprobs` of a chat's choice."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        spelled: Spelling = spell(token)
        return {"token": spelled.text, "logprob": logprob, "bytes": list(spelled.bytes)}

    content = [entry(s.token, s.logprob) | {"top_logprobs": [entry(*pair) for pair in s.top]} for s in tokens]
    return {"content": content, "refusal": None}


def text_logprobs(tokens: Sequence[Scored], spell: Any, offset: int) -> dict[str, Any]:
    """Return the `logprobs` of a completion's choice whose first token stands at this character."""
    texts = [spell(s.token).text for s in tokens]
    offsets = [offset]
    for text in texts[:-1]:
        offsets.append(offsets[-1] + len(text))
    return {
        "tokens": texts,
        "token_logprobs": [s.logprob for s in tokens],
        "top_logprobs": [{spell(token).text: value for token, value in s.top} for s in tokens],
        "text_offset": offsets[: len(tokens)],
    }
