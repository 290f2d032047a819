"""The HTTP application: routes, streams, errors, the page. Nothing of tensors; `Service` makes jobs of requests."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI
from fastapi import Request as Http
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from orthrus import __version__
from orthrus.errors import OrthrusError
from orthrus.serve.errors import Refused, refusal
from orthrus.serve.gate import Gate
from orthrus.serve.jobs import Event, Job
from orthrus.serve.openai import ChatRequest, CompletionRequest
from orthrus.serve.service import Service, model_card
from orthrus.serve.shapes import ChatShape, Choice, Delta, Shape, TextShape, Usage
from orthrus.serve.transcript import Transcript

BODY_LIMIT: Final = 4 << 20
PING_SECONDS: Final = 15.0
PAGE: Final = Path(__file__).parent / "page"
_POLICY: Final = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'"

log = logging.getLogger("orthrus.serve")


def create_app(
    service: Service, *, key: str | None = None, origins: Sequence[str] = (), body_limit: int = BODY_LIMIT
) -> FastAPI:
    """Return the application over a service that has been started.

    Args:
        key: the API key that requests under `/v1` must carry; None for none.
        origins: pages of other hosts that may call it (CORS); none unless given.
        body_limit: bytes of a request's body at most.
    """
    app = FastAPI(title="Orthrus", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, key=key, body_limit=body_limit)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])

    async def say_no(http: Http, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code == 404:
            paths = ", ".join(sorted({str(getattr(route, "path", "")) for route in app.routes}))
            error = Refused(f"a path of this server is required, found {http.url.path}: it has {paths}", status=404)
        return _logged(error).response()

    for kind in (RequestValidationError, HTTPException, OrthrusError, Exception):
        app.add_exception_handler(kind, say_no)

    @app.post("/v1/chat/completions")
    async def chat(http: Http, body: ChatRequest) -> Response:
        service.check_model(body.model)
        prompts = await asyncio.to_thread(service.encode, body)
        return await _answer(service, http, body, prompts, ChatShape(service.name, service.spelling(body)))

    @app.post("/v1/completions")
    async def completions(http: Http, body: CompletionRequest) -> Response:
        service.check_model(body.model)
        prompts = await asyncio.to_thread(service.encode, body)
        shape = TextShape(service.name, service.spelling(body), service.echo(body))
        return await _answer(service, http, body, prompts, shape)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return model_card(service)

    @app.get("/health")
    async def health() -> Response:
        state = "ok" if service.loop.alive and not service.loop.draining else "shutting down"
        return JSONResponse({"status": state}, status_code=200 if state == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": _POLICY})

    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    return app


async def _answer(
    service: Service,
    http: Http,
    request: ChatRequest | CompletionRequest,
    prompts: Sequence[list[int]],
    shape: Shape,
) -> Response:
    """Submit a request's jobs; answer with a stream or in one piece."""
    work = _Work(service, request, prompts)
    if request.stream:
        lines = _lines(work, request, shape)
        return _Stream(lines, work.cancel)
    whole = asyncio.create_task(work.whole(shape))
    gone = asyncio.create_task(_disconnected(http))
    try:
        await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
        if whole.done():
            return Response(_json(whole.result()), media_type="application/json")
        return Response(status_code=499)  # nobody reads it
    finally:
        whole.cancel()
        gone.cancel()
        work.cancel()


class _Work:
    """The jobs of one request while they run."""

    def __init__(
        self, service: Service, request: ChatRequest | CompletionRequest, prompts: Sequence[list[int]]
    ) -> None:
        events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        here = asyncio.get_running_loop()

        def deliver(choice: int, event: Event) -> None:
            with suppress(RuntimeError):  # the server has gone
                here.call_soon_threadsafe(events.put_nowait, (choice, event))

        self._service, self._events = service, events
        self.usage = Usage(sum(map(len, prompts)), choices=request.choices)
        self.jobs: list[Job] = service.jobs(request, prompts, deliver)
        self._transcripts = [Transcript(service.tokenizer, request.stops) for _ in self.jobs]
        self._splitters = [service.splitter(request, job.prompt_ids) for job in self.jobs]
        service.loop.submit(self.jobs)

    def cancel(self) -> None:
        self._service.loop.cancel(self.jobs)

    async def deltas(self, wait: float | None = None) -> AsyncIterator[Delta | None]:
        """Yield what the choices gain until all have ended; None after so many seconds of silence.

        Raises what ended a choice without a text.
        """
        writing = set(range(len(self.jobs)))
        while writing:
            try:
                index, event = await asyncio.wait_for(self._events.get(), wait)
            except TimeoutError:
                yield None
                continue
            if event.error is not None:
                raise _logged(event.error)
            if index not in writing:
                continue
            delta = self._delta(index, event)
            if delta.finish_reason is not None:
                writing.remove(index)
                if not event.last:  # it ends by what the engine does not see: special tokens aside, a call's end
                    self._service.loop.cancel([self.jobs[index]])
            self.usage.add(delta)
            yield delta

    def _delta(self, index: int, event: Event) -> Delta:
        """Return what an event adds to a choice."""
        transcript, splitter = self._transcripts[index], self._splitters[index]
        pieces = transcript.push(event)
        ended = event.finish_reason is not None or transcript.stopped
        parts = splitter.push(pieces, last=ended)
        reason = event.finish_reason
        if transcript.stopped or splitter.done:
            reason = "stop"
        if reason == "stop" and splitter.calls:
            reason = "tool_calls"
        scored = event.scored
        if scored and event.finish_reason == "stop" and scored[-1].token in self.jobs[index].options.eos_token_id:
            scored = scored[:-1]  # the end of the text is no part of it
        cycle = transcript.cycles
        return Delta(index=index, event=event, parts=parts, scored=scored, cycle=cycle, finish_reason=reason)

    async def whole(self, shape: Shape) -> dict[str, Any]:
        choices = [Choice(index=index) for index in range(len(self.jobs))]
        async for delta in self.deltas():
            if delta is not None:
                choices[delta.index].add(delta)
        return shape.whole(choices, self.usage)


async def _lines(work: _Work, request: ChatRequest | CompletionRequest, shape: Shape) -> AsyncIterator[str]:
    options = request.stream_options
    usage = options is not None and bool(options.include_usage)
    running = options is not None and bool(options.continuous_usage_stats)
    empty = {"usage": None} if usage and not running else {}
    for index in range(len(work.jobs)):
        opening = shape.opening(index)
        if opening is not None:
            yield _event(opening | empty)
    try:
        async for delta in work.deltas(PING_SECONDS):
            if delta is None:
                yield ": ping\n\n"
                continue
            blocks = request.orthrus.blocks
            if not (delta.says or blocks):
                continue
            chunk = shape.chunk(delta) | empty
            if running:
                chunk["usage"] = work.usage.to_dict()
            if blocks:
                chunk["orthrus"] = delta.blocks()
            yield _event(chunk)
        if usage:
            yield _event(shape.last(work.usage))
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield _event(_logged(error).body())


class _Stream(StreamingResponse):
    """An event stream that ends its jobs when the client leaves, however early."""

    def __init__(self, lines: AsyncIterator[str], close: Callable[[], None]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _disconnected(http: Http) -> None:
    receive: Callable[[], Awaitable[Any]] = http.receive
    while (await receive())["type"] != "http.disconnect":
        pass


def _logged(error: Exception) -> Refused:
    """Return what a client is told of an error; one that nobody foresaw goes to the log too."""
    refused = refusal(error)
    if refused.status == 500 and refused is not error:
        log.error("a request failed", exc_info=error)
    return refused


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _event(value: Any) -> str:
    return f"data: {_json(value)}\n\n"
