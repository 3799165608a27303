"""A bound on what a client can make the gateway keep in memory, and for how long."""

from __future__ import annotations

import asyncio

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SILENCE_S = 30.0  # between two pieces of a body


class BodyLimit:
    """ASGI middleware: a body over `limit` bytes is 413, one that does not come is 408.

    It counts what arrives, because a chunked body announces no length.
    """

    def __init__(self, app: ASGIApp, *, limit: int, silence_s: float = _SILENCE_S) -> None:
        self._app = app
        self._limit = limit
        self._silence_s = silence_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        seen = 0
        whole = False

        async def limited() -> Message:
            nonlocal seen, whole
            if whole:  # the body is here; what comes now is the client going away, whenever
                return await receive()
            try:
                async with asyncio.timeout(self._silence_s):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the body did not arrive") from None
            seen += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if seen > self._limit:
                raise HTTPException(413, f"the body is over {self._limit} bytes")
            return message

        await self._app(scope, limited, send)
