"""What a request must pass before it is read: the key, and the size and patience of its body. Plain ASGI."""

import asyncio
import hmac
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orthrus.serve.errors import Refused

BODY_SECONDS: Final = 30.0


class Gate:
    """Refuse requests without the key (under `/v1` only), and bodies that are too long or too slow."""

    def __init__(self, app: ASGIApp, *, key: str | None, body_limit: int) -> None:
        self._app, self._key, self._limit = app, key, body_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error in OpenAI's form."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            body = await self._body(receive)
        except Refused as refused:
            await refused.response()(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _again(body, receive), send)

    def _check_key(self, scope: Scope) -> None:
        if self._key is None or not scope["path"].startswith("/v1"):
            return
        given = Headers(scope=scope).get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode("latin-1"), self._key.encode()):
            raise Refused(
                "this server needs its API key in the header 'Authorization: Bearer …', found "
                + ("another one" if given else "none"),
                status=401,
                code="invalid_api_key",
            )

    async def _body(self, receive: Receive) -> bytes | None:
        """Read the body; None when the client went away. One that is too long is read on, so that it is heard."""
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while size <= 16 * self._limit:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    size += len(part)
                    if size <= self._limit:
                        parts.append(part)
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise Refused(f"the body must arrive within {BODY_SECONDS:.0f} seconds", status=408) from None
        if size > self._limit:
            raise Refused(
                f"a body may have {self._limit} bytes, found {size}: send less", status=413, code="body_too_large"
            )
        return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body first, and then whatever comes."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
