"""How long running streams wait while a long prompt joins: seconds between two pieces of their text, as clients see.

So many streams run, each in a loop; once all of them write, a prompt of about so many tokens joins.
"""

import asyncio
import itertools
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Final

from orthrus.bench.lines import Line
from orthrus.bench.metrics import percentiles
from orthrus.bench.serve.load import Answered, Mode, Setting, Target, ask, connected
from orthrus.bench.suites import Item
from orthrus.bench.tables import Grid, milliseconds
from orthrus.errors import ConfigError

JOIN: Final = "join"


@dataclass(frozen=True, kw_only=True, slots=True)
class Joined(Line):
    """A prompt that joined running streams.

    Attributes:
        seconds: from its request to its first token.
        during, otherwise: seconds between two pieces of the running streams that do, or do not, overlap with its
            reading.
        error: what went wrong with it; None where nothing did.
    """

    kind: ClassVar[str] = JOIN

    mode: Mode
    concurrency: int
    prompt_tokens: int = 0
    seconds: float = 0.0
    during: list[float] = field(default_factory=list)
    otherwise: list[float] = field(default_factory=list)
    error: str | None = None


def join(target: Target, items: Sequence[Item], setting: Setting, *, tokens: int) -> Joined:
    """Let a prompt of about so many tokens join so many running streams; its text is made of the items'.

    Raises ConfigError: no items, a setting without a concurrency, or a server that cannot be reached.
    """
    if not items or setting.concurrency is None:
        raise ConfigError("a prompt that joins needs prompts that run, and how many at a time: give --concurrency")
    return asyncio.run(_join(target, items, setting, setting.concurrency, tokens))


async def _join(target: Target, items: Sequence[Item], setting: Setting, concurrency: int, tokens: int) -> Joined:
    async with connected(target) as (client, model):
        started = time.perf_counter()
        short = replace(target, max_tokens=1)
        sample = await ask(client, model, short, _prompt(items, 2 * tokens), setting, started)
        if sample.error is not None or not sample.prompt_tokens:
            why = sample.error or "it does not count a prompt's tokens"
            return Joined(
                mode=setting.mode, concurrency=concurrency, error=f"a sample of the prompt was not answered: {why}"
            )
        long = _prompt(items, round(tokens * 2 * tokens / sample.prompt_tokens))
        begun, ended, made = [asyncio.Event() for _ in range(concurrency)], asyncio.Event(), list[Answered]()

        async def stream(number: int) -> None:
            for turn in itertools.count():
                item = items[(number + turn * concurrency) % len(items)]
                made.append(await ask(client, model, target, item, setting, started, on_text=begun[number].set))
                begun[number].set()  # a stream that failed does not begin
                if ended.is_set() or made[-1].error is not None:
                    return

        streams = [asyncio.create_task(stream(number)) for number in range(concurrency)]
        await asyncio.gather(*(event.wait() for event in begun))
        joined = await ask(client, model, short, long, setting, started)
        ended.set()
        await asyncio.gather(*streams)
    start, end = joined.sent, joined.sent + joined.seconds
    during, otherwise = list[float](), list[float]()
    for one in made:
        at = one.sent + (one.first or 0.0)
        for gap in one.gaps:
            (during if at < end and at + gap > start else otherwise).append(gap)
            at += gap
    return Joined(
        mode=setting.mode,
        concurrency=concurrency,
        prompt_tokens=joined.prompt_tokens,
        seconds=joined.seconds,
        during=during,
        otherwise=otherwise,
        error=joined.error or next((one.error for one in made if one.error is not None), None),
    )


def _prompt(items: Sequence[Item], characters: int) -> Item:
    """Return a prompt of so many characters that begins like no other, so that none of its keys are there already."""
    texts = itertools.cycle(str(message.get("content", "")) or "-" for item in items for message in item.messages)
    text = f"{uuid.uuid4()}\n"
    while len(text) < characters:
        text += next(texts) + "\n"
    return Item(suite=JOIN, id=JOIN, domain=JOIN, messages=({"role": "user", "content": text[:characters]},))


def table(made: Sequence[Joined], title: str) -> Grid:
    rows = [
        {
            "streams": str(one.concurrency),
            "mode": one.mode if one.error is None else f"{one.mode}: {one.error}",
            "prompt tokens": str(one.prompt_tokens),
            "to its first token, s": f"{one.seconds:.2f}",
            "gaps meanwhile, ms": milliseconds(percentiles(one.during, (50, 99, 100))),
            "gaps otherwise, ms": milliseconds(percentiles(one.otherwise, (50, 99, 100))),
        }
        for one in made
    ]
    return Grid.of(f"{title} (p50 / p99 / most)", rows, labels=2)
