"""What a server owes those it serves: limits, order, cancellation, an orderly end, and one failure that stays one."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from openai import APIError, AuthenticationError, InternalServerError, OpenAI, RateLimitError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import orthrus
from orthrus.decode.footprint import footprint
from orthrus.decode.prompts import SLICE
from orthrus.errors import ConfigError
from orthrus.model.attachment import config_of
from orthrus.policy.steps import parse
from orthrus.serve import service
from orthrus.serve.jobs import Job
from tests.serve.conftest import Running, made_small, running

ASK: list[Any] = [{"role": "user", "content": "hello"}]
Texts = Callable[..., str]


@pytest.fixture
def single(small: PreTrainedModel, characters: PreTrainedTokenizerBase) -> Iterator[Running]:
    """A server of its own with one row and room for one more request."""
    with running(small, characters, rows=1, queue=1, plan="full") as made:
        yield made


def test_more_than_the_queue_holds_gets_429_and_is_welcome_later(
    single: Running, monkeypatch: pytest.MonkeyPatch, expected: Texts
) -> None:
    submitted = single.called(monkeypatch, "submit")
    with single.held():
        threads, answers = [], {}
        for i in range(2):
            threads.append(threading.Thread(target=lambda i=i: answers.update({i: _ask(single, 9)})))
            threads[-1].start()
            assert submitted.acquire(timeout=30)
        with pytest.raises(RateLimitError) as refused:
            _ask(single, 9)
        assert refused.value.code == "queue_full"
        assert refused.value.response.headers["Retry-After"]
    for thread in threads:
        thread.join(30)
    assert answers == {0: expected(ASK, 9), 1: expected(ASK, 9)}
    assert _ask(single, 9) == expected(ASK, 9)
    with pytest.raises(RateLimitError):  # all choices of a request or none
        single.client().chat.completions.create(model="tiny", messages=ASK, n=3, max_tokens=3)


def test_requests_join_in_the_order_of_their_arrival(
    small: PreTrainedModel, characters: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(small, characters, rows=1, queue=20, plan="full") as server:
        submitted = server.called(monkeypatch, "submit")
        order: list[int] = []
        ended = server.service.metrics.ended

        def note(job: Job, *rest: Any) -> None:
            order.append(job.options.max_new_tokens)
            ended(job, *rest)

        monkeypatch.setattr(server.service.metrics, "ended", note)
        threads = []
        with server.held():
            for tokens in (9, 3, 8, 2):
                threads.append(threading.Thread(target=_ask, args=(server, tokens)))
                threads[-1].start()
                assert submitted.acquire(timeout=30)
        for thread in threads:
            thread.join(30)
        assert order == [9, 3, 8, 2]


@pytest.mark.parametrize("waits", [False, True], ids=["running", "waiting"])
def test_a_client_that_closes_its_stream_frees_its_row(
    single: Running, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    cancelled = single.called(monkeypatch, "cancel")
    client, other = single.client(), None
    if waits:
        other = client.completions.create(model="tiny", prompt="other", max_tokens=200, stream=True)
    stream = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=200, stream=True)
    next(stream)
    if not waits:
        next(stream)
    with single.held():
        stream.close()
        assert cancelled.acquire(timeout=30)
    single.settle()
    assert single.service.loop.open == (1 if waits else 0)
    assert single.metric("request_success_total", finished_reason="abort") == 1
    if other is not None:
        assert len(list(other)) > 1
    assert single.metric("generation_tokens_total") < 400


def test_a_client_that_leaves_before_an_answer_in_one_piece_frees_its_row(
    single: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled, submitted = single.called(monkeypatch, "cancel"), single.called(monkeypatch, "submit")

    async def leave() -> None:
        host, port = single.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        body = b'{"model": "tiny", "prompt": "hello", "max_tokens": 200}'
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        await asyncio.to_thread(submitted.acquire, timeout=30)
        writer.close()

    with single.held():
        asyncio.run(leave())
        assert cancelled.acquire(timeout=30)
    single.settle()
    assert single.service.loop.open == 0
    assert single.metric("request_success_total", finished_reason="abort") == 1


def test_a_request_that_takes_too_long_ends_with_504(
    small: PreTrainedModel, characters: PreTrainedTokenizerBase
) -> None:
    with running(small, characters, rows=1, timeout=1e-9) as server:
        with pytest.raises(InternalServerError) as refused:
            _ask(server, 200)
        assert refused.value.status_code == 504
        assert refused.value.code == "timeout"
        with pytest.raises(APIError, match="longer than this server allows"):
            list(server.client().chat.completions.create(model="tiny", messages=ASK, max_tokens=200, stream=True))
        assert server.service.loop.open == 0


def test_a_failing_engine_ends_its_batch_with_500_and_the_next_request_gets_a_new_one(
    single: Running, expected: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _ask(single, 9) == expected(ASK, 9)
    engine = single.service.loop._lanes["orthrus"].engine
    monkeypatch.setattr(engine, "step", lambda: 1 / 0)
    with pytest.raises(InternalServerError) as refused:
        _ask(single, 9)
    assert refused.value.status_code == 500
    assert "ZeroDivisionError" in refused.value.message
    assert _ask(single, 9) == expected(ASK, 9)
    monkeypatch.setattr(single.service.loop._lanes["orthrus"].engine, "step", lambda: 1 / 0)
    with pytest.raises(APIError, match="ZeroDivisionError"):
        list(single.client().chat.completions.create(model="tiny", messages=ASK, max_tokens=9, stream=True))
    assert single.raw().get("/health").status_code == 200


def test_the_first_signal_lets_running_requests_end_and_refuses_new_ones(single: Running, expected: Texts) -> None:
    stream = single.client().chat.completions.create(model="tiny", messages=ASK, max_tokens=200, stream=True)
    chunks = [next(stream)]
    with single.held():
        single.server.handle_exit(15, None)
        with pytest.raises(InternalServerError) as refused:
            _ask(single, 3)
        assert refused.value.status_code == 503
        assert refused.value.code == "shutting_down"
        assert single.raw().get("/health").status_code == 503
    chunks += stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected(ASK, 200)
    single.thread.join(30)
    assert not single.thread.is_alive()


def test_an_idle_server_ends_at_the_first_signal(single: Running) -> None:
    single.server.handle_exit(15, None)
    single.thread.join(30)
    assert not single.thread.is_alive()


def test_jobs_left_when_a_loop_is_closed_end_with_an_error(single: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted = single.called(monkeypatch, "submit")
    errors: list[Exception] = []

    def ask() -> None:
        with pytest.raises(InternalServerError) as refused:
            _ask(single, 200)
        errors.append(refused.value)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    with single.held():
        for thread in threads:
            thread.start()
            assert submitted.acquire(timeout=30)
        single.service.loop._closed = True  # as `close` does first
    for thread in threads:
        thread.join(30)
    assert [error.status_code for error in errors] == [503, 503]  # type: ignore[attr-defined]


def test_a_key_guards_the_api_and_nothing_else(small: PreTrainedModel, characters: PreTrainedTokenizerBase) -> None:
    with running(small, characters, rows=1, key="clé") as server:
        with pytest.raises(AuthenticationError) as refused:
            server.client().models.list()
        assert refused.value.code == "invalid_api_key"
        for key, status in (("clé", 200), ("clé2", 401), ("cle", 401)):
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert server.raw().get("/v1/models", headers=headers).status_code == status
        assert server.raw().get("/v1/models").status_code == 401
        assert server.raw().get("/health").status_code == server.raw().get("/metrics").status_code == 200


def test_pages_of_other_origins_are_let_in_only_where_asked_for(
    server: Running, small: PreTrainedModel, characters: PreTrainedTokenizerBase
) -> None:
    ask = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in server.raw().options("/v1/models", headers=ask).headers
    with running(small, characters, rows=1, origins=("https://example.org",)) as open_one:
        allowed = open_one.raw().options("/v1/models", headers=ask)
        assert allowed.headers["access-control-allow-origin"] == "https://example.org"


def test_metrics_have_vllms_names_and_count_what_happened(single: Running) -> None:
    made = [_usage(single.client(), tokens) for tokens in (9, 14)]
    text = single.raw().get("/metrics").text
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    for name in (*gauges, "inter_token_latency_seconds", "e2e_request_latency_seconds"):
        assert f"orthrus:{name}" in text
    assert single.metric("prompt_tokens_total") == sum(usage.prompt_tokens for usage in made)
    assert single.metric("generation_tokens_total") == 23
    stats = [usage.model_extra["orthrus"] for usage in made]
    assert single.metric("spec_decode_num_drafts_total") == sum(s["cycles"] for s in stats)
    assert single.metric("spec_decode_num_draft_tokens_total") == sum(s["drafted"] for s in stats)
    accepted = sum(s["accepted"] for s in stats)
    assert single.metric("spec_decode_num_accepted_tokens_total") == accepted > 0
    by_position = [single.metric("spec_decode_num_accepted_tokens_per_pos_total", position=str(i)) for i in range(5)]
    assert sum(by_position) == accepted
    assert single.metric("request_success_total", finished_reason="length") == 2
    assert single.metric("time_to_first_token_seconds_count") == 2
    assert single.metric("num_requests_running") == single.metric("kv_cache_usage_perc") == 0


def _ask(server: Running, tokens: int) -> str:
    made = server.client().chat.completions.create(model="tiny", messages=ASK, max_tokens=tokens)
    return made.choices[0].message.content or ""


def _usage(client: OpenAI, tokens: int) -> Any:
    return client.chat.completions.create(model="tiny", messages=ASK, max_tokens=tokens).usage


def test_a_long_prompt_that_joins_never_stalls_a_running_stream(
    characters: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by passes: between two cycles of the stream at most 128 positions of the long prompt are read."""
    model = made_small(max_position_embeddings=2048)
    with running(model, characters, rows=2, plan="ar") as server:
        client = server.client()
        stream = client.completions.create(model="tiny", prompt="hello", max_tokens=60, stream=True)
        texts = [next(stream).choices[0].text]
        engine = server.service.loop._lanes["orthrus"].engine
        submitted = server.called(monkeypatch, "submit")
        steps: list[tuple[int, int]] = []
        prefill, step = engine.passes.prefill, engine.step
        read = 0

        def counted(rows: slice, pieces: list[list[int]], **options: Any) -> Any:
            nonlocal read
            read += sum(map(len, pieces))
            return prefill(rows, pieces, **options)

        def noted() -> Any:
            nonlocal read
            read = 0
            made = step()
            steps.append((read, len(made)))
            return made

        with server.held():
            monkeypatch.setattr(engine.passes, "prefill", counted)
            monkeypatch.setattr(engine, "step", noted)
            long: list[str] = []
            ask = threading.Thread(target=lambda: long.append(_complete(client, "x" * 1500)))
            ask.start()
            assert submitted.acquire(timeout=30)
        texts += [chunk.choices[0].text for chunk in stream]
        ask.join(60)
    wanted = [orthrus.generate(model, characters, prompt, max_new_tokens=n, plan="ar")[0].text
              for prompt, n in (("hello", 60), ("x" * 1500, 4))]  # fmt: skip
    assert ["".join(texts), long[0]] == wanted
    reading = [(positions, gained) for positions, gained in steps if positions]
    assert sum(positions for positions, _ in reading) == 1499
    assert max(positions for positions, _ in reading) == SLICE["cpu"] == 128
    assert all(gained == 1 for _, gained in reading[:-1])  # the stream had a token from every step


def test_a_text_of_two_tokens_beside_a_running_stream_is_whole(
    small: PreTrainedModel, characters: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked for when the stream has its first token, and gets both of its own."""
    with running(small, characters, rows=2, plan="full") as server:
        client = server.client()
        _complete(client, "hello")
        engine = server.service.loop._lanes["orthrus"].engine
        submitted, begun, step = server.called(monkeypatch, "submit"), threading.Event(), engine.step

        def waits() -> Any:
            made = step()
            if not begun.is_set():
                assert submitted.acquire(timeout=30)  # the stream
                begun.set()
                assert submitted.acquire(timeout=30)  # the text of two tokens
            return made

        monkeypatch.setattr(engine, "step", waits)
        stream = client.completions.create(model="tiny", prompt="hello", max_tokens=60, stream=True)
        assert begun.wait(30)
        made = client.completions.create(model="tiny", prompt="another", max_tokens=2)
        texts = [chunk.choices[0].text for chunk in stream]
    assert made.usage is not None
    assert made.usage.completion_tokens == 2
    wanted = [orthrus.generate(small, characters, prompt, max_new_tokens=n)[0].text
              for prompt, n in (("hello", 60), ("another", 2))]  # fmt: skip
    assert ["".join(texts), made.choices[0].text] == wanted


def test_a_second_turn_reads_only_what_is_new(server: Running) -> None:
    client = server.client()
    first = client.completions.create(model="tiny", prompt="a question of its own", max_tokens=20)
    second = client.completions.create(
        model="tiny", prompt=f"a question of its own{first.choices[0].text} and more", max_tokens=5, n=2
    )
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert first.usage.prompt_tokens <= cached < second.usage.prompt_tokens


def test_choices_of_one_prompt_read_it_once(server: Running) -> None:
    """All join in one step; metrics count what was not read."""
    found, asked = server.metric("prefix_cache_hits_total"), server.metric("prefix_cache_queries_total")
    prompt = "another question, unlike all others"
    made = server.client().completions.create(model="tiny", prompt=prompt, max_tokens=5, n=3)
    assert len({choice.text for choice in made.choices}) == 1
    assert made.usage is not None
    length = made.usage.prompt_tokens
    assert server.metric("prefix_cache_queries_total") - asked == 3 * length
    assert server.metric("prefix_cache_hits_total") - found >= 2 * (length - 1)


def _complete(client: OpenAI, prompt: str) -> str:
    return client.completions.create(model="tiny", prompt=prompt, max_tokens=4).choices[0].text


def test_the_context_is_what_memory_has_room_for(
    small: PreTrainedModel, characters: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shortened where none was asked for, refused where one was."""
    scratch = parse("full").scratch(config_of(small).proposals + 1)
    row = footprint(small, terms=scratch)
    monkeypatch.setattr(service, "free_memory", lambda _: int(4 * row.row(40 + scratch) / service.MEMORY) + 3)
    made = service.Service(small, characters, name="tiny", rows=4, plan="full")
    assert made.context == 40
    with pytest.raises(ConfigError, match="4 rows of 41 tokens must fit into memory, found room for rows of 40"):
        service.Service(small, characters, name="tiny", rows=4, plan="full", context=41)
