"""Servers in the test process, on free ports of the loopback; the unmodified `openai` client speaks to them."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
from openai import OpenAI
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import orthrus
from orthrus.serve import server as http
from orthrus.serve.app import create_app
from orthrus.serve.service import Service
from tests.families import perturb, tiny


@dataclass(frozen=True)
class Running:
    """A server that answers on `url`."""

    url: str
    service: Service
    server: http.Server
    thread: threading.Thread
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def client(self, **options: Any) -> OpenAI:
        """An unmodified client that does not try again."""
        return OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 60, **options})

    def raw(self) -> httpx2.Client:
        """A plain HTTP client."""
        return httpx2.Client(
            base_url=self.url, timeout=60, verify=False
        )  # no TLS here: certificates take 20 ms to read

    def metric(self, name: str, **labels: str) -> float:
        """A sample of `/metrics`, 0 where there is none."""
        asked = {"model_name": self.service.name, **labels}
        return self.service.metrics.registry.get_sample_value(f"orthrus:{name}", asked) or 0.0

    def settle(self) -> None:
        """Wait until the loop has carried out every command that it was given before."""
        passed = threading.Event()
        self.service.loop._commands.put(passed.set)
        assert passed.wait(30)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the loop from stepping: it carries out one command, which ends with the block."""
        came, release = threading.Event(), threading.Event()

        def hold() -> None:
            came.set()
            assert release.wait(60)

        self.service.loop._commands.put(hold)
        assert came.wait(30)
        try:
            yield
        finally:
            release.set()

    def called(self, monkeypatch: pytest.MonkeyPatch, name: str) -> threading.Semaphore:
        """Count the calls of a method of the loop; `acquire` waits for one."""
        count, method = threading.Semaphore(0), getattr(self.service.loop, name)

        def watched(*arguments: Any) -> Any:
            made = method(*arguments)
            count.release()
            return made

        monkeypatch.setattr(self.service.loop, name, watched)
        return count


@contextmanager
def running(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str = "tiny", key: str | None = None,
    origins: tuple[str, ...] = (), body_limit: int = 1 << 20, **settings: Any,
) -> Iterator[Running]:  # fmt: skip
    """Serve a model for as long as the block runs."""
    service = Service(model, tokenizer, name=name, **settings)
    server = http.Server(create_app(service, key=key, origins=origins, body_limit=body_limit), service)
    made = http.listen("127.0.0.1", 0)
    service.start()
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[made])), daemon=True)
    thread.start()
    try:
        yield Running(http.address(made), service, server, thread, model, tokenizer)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(30)
        service.close()
        assert not thread.is_alive()
        assert not service.loop.alive


@pytest.fixture(scope="session")
def small() -> PreTrainedModel:
    """A tiny random model whose drafts are sometimes right."""
    return made_small()


def made_small(**overrides: int) -> PreTrainedModel:
    """Make the model of the fixture `small`."""
    model = orthrus.attach(tiny("qwen2", **overrides), orthrus.OrthrusConfig(block_size=6))
    perturb(model, scale=0.01)
    return model


@pytest.fixture(scope="session")
def server(small: PreTrainedModel, characters: PreTrainedTokenizerBase) -> Iterator[Running]:
    """A server with four rows and a queue of 100, for all tests that leave it as it was."""
    with running(small, characters, rows=4, queue=100, plan="full") as made:
        yield made


@pytest.fixture
def client(server: Running) -> OpenAI:
    """A synchronous client of it."""
    return server.client()


@pytest.fixture(scope="session")
def expected(small: PreTrainedModel, characters: PreTrainedTokenizerBase) -> Callable[..., str]:
    """What `orthrus.generate` writes after a prompt, asked once per prompt and length."""
    kept: dict[Any, str] = {}

    def text(prompt: str | list[dict[str, str]], tokens: int, **options: Any) -> str:
        key = (str(prompt), tokens, str(options))
        if key not in kept:
            (made,) = orthrus.generate(small, characters, prompt, max_new_tokens=tokens, **options)
            kept[key] = made.text
        return kept[key]

    return text
