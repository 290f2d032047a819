"""Answers from an OpenAI-compatible server, through `/completions` and with prompts as token ids.

Token ids leave the server no chat template to apply, so prompts are the same as with the local backbone.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from transformers import PreTrainedTokenizerBase

from orthrus.data.packing import EncodedDocument
from orthrus.data.responses import Answering, Prompt, joined
from orthrus.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """Address and behaviour of the server.

    Attributes:
        url: address up to `/v1`.
        timeout: seconds that a request may take.
        attempts: requests per prompt, the first one included.
        pause: seconds before the second attempt; doubled before each further one.
    """

    url: str
    model: str
    timeout: float = 600.0
    attempts: int = 5
    pause: float = 2.0


def served_answers(
    server: Server, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], how: Answering
) -> Iterator[EncodedDocument]:
    """Yield the server's greedy answer to each prompt, `how.rows` requests at once, in the order they finish.

    Tokens are the server's own where it returns them (`return_token_ids`, as vLLM does), else its text encoded again.

    Raises DataError: the address is invalid, or the server cannot be reached, refuses, or returns no completion.
    """
    _check_address(server.url)
    usable = how.usable(prompts)
    with ThreadPoolExecutor(max_workers=how.rows) as pool:
        asked = {pool.submit(_complete, server, prompt, how.room(prompt)): prompt for prompt in usable}
        try:
            for future in as_completed(asked):
                prompt = asked.pop(future)
                yield joined(prompt.token_ids, _tokens(future.result(), tokenizer)[: how.room(prompt)])
        finally:
            pool.shutdown(cancel_futures=True)


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise DataError(f"answers.url must be an address such as http://localhost:8000/v1, found {url!r}: correct it")


def _tokens(choice: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = choice.get("token_ids") or tokenizer(choice["text"], add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    return [*ids, end] if choice.get("finish_reason") == "stop" and ids[-1:] != [end] else list(ids)


def _complete(server: Server, prompt: Prompt, max_tokens: int) -> dict[str, Any]:
    url = server.url.rstrip("/") + "/completions"
    body = {
        "model": server.model,
        "prompt": prompt.token_ids,
        "max_tokens": max_tokens,
        "temperature": 0,
        "return_token_ids": True,
    }
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    reason = ""
    for attempt in range(server.attempts):
        if attempt:
            time.sleep(server.pause * 2 ** (attempt - 1))
        try:
            with urllib.request.urlopen(request, timeout=server.timeout) as response:
                reply = response.read()
        except urllib.error.HTTPError as error:
            reason = f"status {error.code}: {error.read(200).decode(errors='replace')}"
            if error.code < 500 and error.code != 429:
                break
        except (OSError, HTTPException, ValueError) as error:
            reason = str(error)
        else:
            return _choice(reply, url)
    raise DataError(f"{url}: a server that completes prompts of token ids is required; {reason}; shards done are kept")


def _choice(reply: bytes, url: str) -> dict[str, Any]:
    try:
        answer = json.loads(reply)
    except ValueError:
        answer = reply
    match answer:
        case {"choices": [{"text": str()} as choice, *_]}:
            return dict(choice)
    raise DataError(f"{url}: a completion with choices[0].text is required, found {str(answer)[:200]}")
