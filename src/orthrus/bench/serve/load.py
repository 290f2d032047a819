"""Load on any OpenAI-compatible server by the `openai` client: so many requests at a time, or so many a second."""

import asyncio
import hashlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal, TypeAlias

import numpy as np
from openai import APIError, AsyncOpenAI

from orthrus.bench.lines import Line
from orthrus.bench.suites import Item
from orthrus.errors import ConfigError

Mode: TypeAlias = Literal["orthrus", "ar", "server"]
MODES: Final = ("orthrus", "ar", "server")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """How a server is loaded: `concurrency` requests in flight, or `rate` a second at random times.

    `mode` "orthrus" drafts, "ar" decodes plainly; "server" asks for neither, for servers that know no modes.
    """

    mode: Mode
    concurrency: int | None = None
    rate: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered(Line):
    """One request, as its client saw it.

    Attributes:
        sent: seconds from the setting's start to the request.
        first: seconds from the request to the first text; None where none came.
        seconds: from the request to its end.
        prompt_tokens, tokens: as the server counts them.
        gaps: seconds between one piece of text and the next.
        finish_reason, error: why the text ended, or what went wrong; the other one is None.
        stats: the server's statistics of drafts, where it tells them.
    """

    kind: ClassVar[str] = "request"

    mode: Mode
    concurrency: int | None
    rate: float | None
    suite: str
    id: str
    sent: float
    first: float | None
    seconds: float
    prompt_tokens: int = 0
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    text_hash: str = ""
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def per_token(self) -> float | None:
        """Mean seconds per token after the first text."""
        if self.first is None or self.tokens < 2:
            return None
        return (self.seconds - self.first) / (self.tokens - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The server: its address without `/v1`, and `timeout`, the seconds that a request may take.

    Without a `model` the first that it lists is asked.
    """

    url: str
    key: str = "none"
    model: str | None = None
    max_tokens: int = 128
    timeout: float = 600.0


def run(
    target: Target,
    items: Sequence[Item],
    setting: Setting,
    *,
    requests: int,
    seed: int = 0,
    on_answer: Callable[[], None] = lambda: None,
) -> list[Answered]:
    """Send so many requests, the items in turn, and return what came of each, in the order they were sent.

    Raises ConfigError: no items, a server that cannot be reached, or one without models.
    """
    if not items:
        raise ConfigError("a load needs prompts, found none")

    async def send() -> list[Answered]:
        async with connected(target) as (client, model):
            started = time.perf_counter()

            async def one(number: int) -> Answered:
                made = await ask(client, model, target, items[number % len(items)], setting, started)
                on_answer()
                return made

            if setting.concurrency is not None:
                return await _closed(one, requests, setting.concurrency)
            if setting.rate is None:
                raise ConfigError("a load needs a concurrency or a rate, found neither")
            waits = np.random.default_rng(seed).exponential(1 / setting.rate, requests)
            return await _open(one, waits.cumsum().tolist(), started)

    return asyncio.run(send())


@asynccontextmanager
async def connected(target: Target) -> AsyncIterator[tuple[AsyncOpenAI, str]]:
    """Give a client of the server, and the model to ask; raises ConfigError where there is none."""
    async with AsyncOpenAI(
        base_url=f"{target.url.rstrip('/')}/v1", api_key=target.key, max_retries=0, timeout=target.timeout
    ) as client:
        try:
            listed = [model.id async for model in client.models.list()]
        except APIError as error:
            raise ConfigError(f"the server at {target.url} cannot be asked for its models: {error}") from error
        if target.model is None and not listed:
            raise ConfigError(f"the server at {target.url} lists no models: name one")
        yield client, target.model or listed[0]


async def _closed(one: Callable[[int], Awaitable[Answered]], requests: int, concurrency: int) -> list[Answered]:
    made: dict[int, Answered] = {}
    numbers = iter(range(requests))

    async def worker() -> None:
        for number in numbers:
            made[number] = await one(number)

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return [made[number] for number in sorted(made)]


async def _open(one: Callable[[int], Awaitable[Answered]], times: Sequence[float], started: float) -> list[Answered]:
    async def later(number: int, at: float) -> Answered:
        await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
        return await one(number)

    return list(await asyncio.gather(*(later(number, at) for number, at in enumerate(times))))


async def ask(
    client: AsyncOpenAI,
    model: str,
    target: Target,
    item: Item,
    setting: Setting,
    started: float,
    on_text: Callable[[], None] = lambda: None,
) -> Answered:
    """Send one request and time what comes; `on_text` is called with each piece of text."""
    extra = {} if setting.mode == "server" else {"orthrus": {"mode": setting.mode}}
    messages: Any = [dict(message) for message in item.messages]
    sent = time.perf_counter()
    times: list[float] = []
    text, finish_reason, usage, failed = "", None, None, None
    try:
        stream = await client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=target.max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra,
        )
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                if choice.delta.content:
                    times.append(time.perf_counter())
                    on_text()
                    text += choice.delta.content
                finish_reason = choice.finish_reason or finish_reason
    except APIError as error:
        failed = f"{type(error).__name__}: {error.message}"
    ended = time.perf_counter()
    stats = (usage.model_extra or {}).get("orthrus") if usage is not None else None
    return Answered(
        mode=setting.mode,
        concurrency=setting.concurrency,
        rate=setting.rate,
        suite=item.suite,
        id=item.id,
        sent=sent - started,
        first=times[0] - sent if times else None,
        seconds=ended - sent,
        prompt_tokens=usage.prompt_tokens if usage is not None else 0,
        tokens=usage.completion_tokens if usage is not None else 0,
        gaps=[later - earlier for earlier, later in itertools.pairwise(times)],
        finish_reason=finish_reason,
        error=failed,
        text_hash=hashlib.sha256(text.encode()).hexdigest()[:12],
        stats=stats or {},
    )
