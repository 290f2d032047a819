"""A soak: many mixed requests at once, with clients that leave and requests that are bad; nothing may be left behind.

    python -m tests.serve.soak --requests 2000      # from the repository, some minutes on one core

Greedy texts must be `orthrus.generate`'s, bad requests must get a 4xx, no job may stay open, and the process may grow
by `GROWTH` bytes at most once a tenth of the requests has been served. With `--stop-after N` the server is sent SIGTERM
at the N-th request: what it has taken on must end as ever, what comes later is refused, and the server ends.
"""

import argparse
import asyncio
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
from openai import APIConnectionError, APIError, APIStatusError, AsyncOpenAI

from tests.serve.conftest import Running

GROWTH: Final = 48 << 20
PROMPTS: Final = 6
LENGTHS: Final = (1, 3, 8, 21)
BAD: Final[list[dict[str, Any]]] = [
    {"temperature": -1},
    {"max_tokens": 10**6},
    {"messages": []},
    {"extra_body": {"nonsense": 1}},
    {"model": "other"},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wizard"}}}},
]


@dataclass
class Outcome:
    """What a soak saw."""

    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    refused: int = 0  # after the signal
    growth: int = 0
    seconds: float = 0.0


def soak(
    server: Running,
    expected: Callable[[str, int], str],
    *,
    requests: int,
    concurrency: int,
    seed: int = 0,
    stop_after: int | None = None,
) -> Outcome:
    """Send so many requests, so many at a time; returns what was wrong with them.

    The server is told to end, as SIGTERM tells it, when `stop_after` of them have been sent.
    """
    outcome = Outcome()
    started = time.monotonic()
    asyncio.run(_all(server, expected, requests, concurrency, seed, stop_after, outcome))
    outcome.seconds = time.monotonic() - started
    return outcome


async def _all(
    server: Running,
    expected: Callable[[str, int], str],
    requests: int,
    concurrency: int,
    seed: int,
    stop_after: int | None,
    outcome: Outcome,
) -> None:
    numbers = iter(range(requests))
    process = psutil.Process()
    early = 0
    stopped = False

    async def worker(client: AsyncOpenAI) -> None:
        nonlocal early, stopped
        for number in numbers:
            if number == requests // 10:
                early = process.memory_info().rss
            draw = random.Random(seed * 1_000_003 + number)
            kind = draw.choices(list(KINDS), weights=[weight for _, weight in KINDS.values()])[0]
            outcome.kinds[kind] += 1
            late = stopped = stopped or number == stop_after
            if number == stop_after:
                server.server.handle_exit(signal.SIGTERM, None)
            try:
                fault = await KINDS[kind][0](client, draw, expected)
            except Exception as error:
                if (stopped and _is_refusal(error)) or (late and isinstance(error, APIConnectionError)):
                    outcome.refused += 1
                    continue
                fault = f"{type(error).__name__}: {error}"
            if fault:
                outcome.wrong.append(f"{number} {kind}: {fault}")

    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        await asyncio.gather(*(worker(client) for _ in range(concurrency)))
    outcome.growth = process.memory_info().rss - early


def _is_refusal(error: Exception) -> bool:
    """Tell what a server that is ending says to new requests."""
    return isinstance(error, APIStatusError) and error.status_code == 503


def _prompt(draw: random.Random) -> tuple[str, int]:
    return f"prompt {draw.randrange(PROMPTS)}", draw.choice(LENGTHS)


async def _greedy(client: AsyncOpenAI, draw: random.Random, expected: Callable[[str, int], str]) -> str:
    prompt, tokens = _prompt(draw)
    made = await client.completions.create(model="tiny", prompt=prompt, max_tokens=tokens)
    return "" if made.choices[0].text == expected(prompt, tokens) else f"{made.choices[0].text!r}"


async def _streamed(client: AsyncOpenAI, draw: random.Random, expected: Callable[[str, int], str]) -> str:
    prompt, tokens = _prompt(draw)
    stream = await client.completions.create(model="tiny", prompt=prompt, max_tokens=tokens, stream=True)
    text = "".join([chunk.choices[0].text async for chunk in stream])
    return "" if text == expected(prompt, tokens) else f"{text!r}"


async def _options(client: AsyncOpenAI, draw: random.Random, expected: Callable[[str, int], str]) -> str:
    """Sampling, choices, penalties, biases, stop strings, log probabilities: whatever may stand beside others."""
    options: dict[str, Any] = draw.choice(
        [
            {"temperature": 1.0, "seed": draw.randrange(5), "n": 2},
            {"temperature": 0.7, "top_p": 0.9, "extra_body": {"top_k": 20}},
            {"presence_penalty": 1.0},
            {"logit_bias": {"50": -100}},
            {"stop": ["I", "V"]},
            {"logprobs": 2},
        ]
    )
    prompt, tokens = _prompt(draw)
    made = await client.completions.create(model="tiny", prompt=prompt, max_tokens=tokens, **options)
    return "" if len(made.choices) == options.get("n", 1) else f"{len(made.choices)} choices"


async def _leaves(client: AsyncOpenAI, draw: random.Random, expected: Callable[[str, int], str]) -> str:
    """A client that closes its stream after some chunks."""
    stream = await client.completions.create(model="tiny", prompt=_prompt(draw)[0], max_tokens=150, stream=True)
    left = draw.randrange(4)
    async for _ in stream:
        left -= 1
        if left < 0:
            break
    await stream.close()
    return ""


async def _gives_up(client: AsyncOpenAI, draw: random.Random, expected: Callable[[str, int], str]) -> str:
    """A client that does not wait for its answer."""
    asked = client.completions.create(model="tiny", prompt=_prompt(draw)[0], max_tokens=150)
    try:
        await asyncio.wait_for(asked, draw.random() * 0.05)
    except TimeoutError:
        return ""
    return ""


async def _bad(client: AsyncOpenAI, draw: random.Random, expected: Callable[[str, int], str]) -> str:
    change = draw.choice(BAD)
    body: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], **change}
    try:
        await client.chat.completions.create(**body)
    except APIStatusError as error:
        if _is_refusal(error):
            raise
        return "" if 400 <= error.status_code < 500 else f"{error.status_code} for {json.dumps(change)}"
    except APIConnectionError:
        raise
    except APIError as error:
        return str(error)
    return f"no refusal of {json.dumps(change)}"


KINDS: Final[dict[str, tuple[Callable[..., Any], int]]] = {
    "greedy": (_greedy, 6),
    "streamed": (_streamed, 6),
    "options": (_options, 4),
    "leaves": (_leaves, 2),
    "gives up": (_gives_up, 1),
    "bad": (_bad, 2),
}


def main() -> None:
    """Run a long soak over the tiny model; exits with 1 where something was wrong."""
    import orthrus
    from orthrus.data.records import append
    from orthrus.provenance import digest, provenance
    from tests.conftest import made_characters
    from tests.serve.conftest import made_small, running

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop-after", type=int, help="send SIGTERM at this request")
    parser.add_argument("--output", type=Path, help="a file of JSON lines; added to")
    asked = parser.parse_args()
    model, tokenizer = made_small(), made_characters()
    kept: dict[tuple[str, int], str] = {}

    def expected(prompt: str, tokens: int) -> str:
        if (prompt, tokens) not in kept:
            kept[prompt, tokens] = orthrus.generate(model, tokenizer, prompt, max_new_tokens=tokens)[0].text
        return kept[prompt, tokens]

    for number in range(PROMPTS):
        for tokens in LENGTHS:
            expected(f"prompt {number}", tokens)
    with running(model, tokenizer, rows=asked.rows, queue=4 * asked.concurrency) as server:
        outcome = soak(
            server,
            expected,
            requests=asked.requests,
            concurrency=asked.concurrency,
            seed=asked.seed,
            stop_after=asked.stop_after,
        )
        if asked.stop_after is None:
            server.settle()
        else:
            server.thread.join(60)
            outcome.wrong += ["the server did not end"] * server.thread.is_alive()
        left = server.service.loop.open
    record = {
        "kind": "soak",
        "requests": asked.requests,
        "concurrency": asked.concurrency,
        "rows": asked.rows,
        "kinds": dict(outcome.kinds),
        "wrong": outcome.wrong,
        "stop_after": asked.stop_after,
        "refused": outcome.refused,
        "left_open": left,
        "growth_bytes": outcome.growth,
        "growth_allowed": GROWTH,
        "seconds": round(outcome.seconds, 1),
    }
    print(json.dumps(record, indent=1))
    if asked.output is not None:
        facts = provenance(dtypes=["float32"])
        append(
            asked.output,
            [{"kind": "provenance", "id": digest(facts), **facts}, {**record, "provenance": digest(facts)}],
        )
    raise SystemExit(bool(outcome.wrong or left or outcome.growth > GROWTH))


if __name__ == "__main__":
    main()
