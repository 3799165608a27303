"""Reads the body of a request: its size and its duration are limited, its JSON is checked.

`BodyLimit` counts the bytes as they arrive, `JsonRoute` parses them. FastAPI alone would let the
second of two equal names win, accept NaN, and answer some malformed bodies in its own format.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.gateway.fastapi_internals import takes_body
from serve_app.gateway.http_errors import error_response
from serve_app.wire.errors import InvalidRequest

MAX_NAMES = 1000  # of one object: each unknown name is an error of its own

_MAX_PAUSE_S = 30.0
_MIN_BYTES_PER_S = 16 * 1024


# ---- bytes --------------------------------------------------------------------------------------


class BodyLimit:
    """ASGI middleware that answers 413 to a body that is too large and 408 to one that stalls.

    A `content-length` over the limit is refused before the body is read. The bytes are counted
    too, because a chunked body has no `content-length`.

    Args:
        limit: the largest body, in bytes.
        max_pause_s: the longest pause between two pieces of the body.
        min_bytes_per_s: the lowest average rate, after a first `max_pause_s`. Without it, a client
            that sends one byte at a time could hold a connection for ever.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limit: int,
        max_pause_s: float = _MAX_PAUSE_S,
        min_bytes_per_s: float = _MIN_BYTES_PER_S,
    ) -> None:
        self._app = app
        self._limit = limit
        self._max_pause_s = max_pause_s
        self._min_bytes_per_s = min_bytes_per_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if _content_length(scope) > self._limit:
            return await error_response(self._too_large())(scope, receive, send)
        await self._app(scope, self._limited(receive), send)

    def _limited(self, receive: Receive) -> Receive:
        loop = asyncio.get_running_loop()
        started = loop.time()
        size = 0
        complete = False

        async def limited() -> Message:
            nonlocal size, complete
            if complete:  # the next message is the client's disconnect, which may come at any time
                return await receive()
            deadline = started + self._max_pause_s + size / self._min_bytes_per_s
            try:
                async with asyncio.timeout_at(min(loop.time() + self._max_pause_s, deadline)):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the body did not arrive in time") from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > self._limit:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the body is larger than {self._limit} bytes")


def _content_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value[:20])
    return 0


# ---- JSON ---------------------------------------------------------------------------------------


class JsonRoute(APIRoute):
    """A route whose body, if it has one, is parsed by `parse`.

    It also answers Serve's errors itself, because Serve installs its own handlers for them in any
    FastAPI application.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        has_body = takes_body(self)

        async def read_and_handle(request: Request) -> Response:
            try:
                return await handle(await _parsed(request) if has_body else request)
            except (BackPressureError, DeploymentUnavailableError) as error:
                return error_response(error)

        return read_and_handle


class _JsonRequest(Request):
    document: Any

    async def json(self) -> Any:
        return self.document


async def _parsed(request: Request) -> Request:
    parsed = _JsonRequest(request.scope, request.receive)
    parsed.document = parse(await parsed.body(), request.headers.get("content-type", ""))
    return parsed


def parse(body: bytes, content_type: str) -> Any:
    """Returns the JSON value. Raises `InvalidRequest`."""
    if not _is_json(content_type):
        message = "the body must be JSON, with the header content-type: application/json"
        raise InvalidRequest(415, "unsupported_media_type", message)
    if not body:
        raise _invalid("the body is empty")
    try:
        return json.loads(
            body.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_refuse_constant
        )
    except UnicodeDecodeError:
        raise _invalid("the body is not UTF-8") from None
    except RecursionError:
        raise _invalid("the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _invalid(f"the body is not valid JSON: {error}") from None
    except ValueError:  # Python limits the digits of an integer
        raise _invalid("a number in the body has too many digits") from None


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind[-5:] == "+json")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _invalid("an object has the same name twice")
    if len(found) > MAX_NAMES:
        raise _invalid(f"an object has more than {MAX_NAMES} names")
    return found


def _refuse_constant(word: str) -> NoReturn:
    raise _invalid(f"{word} is not JSON")


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(400, "invalid_json", message)
