"""A bound on what a client can make the gateway keep in memory, and for how long."""

from __future__ import annotations

import asyncio

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.gateway.http_errors import respond

_SILENCE_S = 30.0  # between two pieces of a body
_SLOWEST = 16 * 1024  # bytes a second, once the first silence is used up


class BodyLimit:
    """ASGI middleware: a body over `limit` bytes is 413, one that does not come is 408.

    What is announced as too long is refused before it is read. What arrives is counted, because a
    chunked body announces nothing. It may pause for `silence_s`, and altogether take that and a
    second for each `slowest` bytes: one byte now and then keeps no place.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limit: int,
        silence_s: float = _SILENCE_S,
        slowest: float = _SLOWEST,
    ) -> None:
        self._app = app
        self._limit = limit
        self._silence_s = silence_s
        self._slowest = slowest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if _announced(scope) > self._limit:
            return await respond(self._too_large())(scope, receive, send)
        await self._app(scope, self._limited(receive), send)

    def _limited(self, receive: Receive) -> Receive:
        loop = asyncio.get_running_loop()
        began = loop.time()
        seen = 0
        whole = False

        async def limited() -> Message:
            nonlocal seen, whole
            if whole:  # the body is here; what comes now is the client going away, whenever
                return await receive()
            latest = began + self._silence_s + seen / self._slowest
            try:
                async with asyncio.timeout_at(min(loop.time() + self._silence_s, latest)):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the body did not arrive") from None
            seen += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if seen > self._limit:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the body is over {self._limit} bytes")


def _announced(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value[:20])
    return 0
