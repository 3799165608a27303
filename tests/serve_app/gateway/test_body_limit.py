"""What a client sends is bounded in size and in time, whoever wants to read it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator

import pytest
from fastapi import FastAPI, Request
from starlette.types import Message, Receive, Scope, Send

from serve_app.gateway.body_limit import BodyLimit
from serve_app.gateway.http_errors import install_error_handlers

LIMIT = 1024


class Client:
    """An ASGI client of one route that reads its body. `pieces`: when and what it sends."""

    def __init__(
        self,
        *,
        silence_s: float = 30.0,
        slowest: float = 1e6,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.read: list[int] = []
        self.taken = 0
        self._headers = [(k.encode(), v.encode()) for k, v in (headers or {}).items()]
        self._app = FastAPI()
        self._app.add_middleware(BodyLimit, limit=LIMIT, silence_s=silence_s, slowest=slowest)
        install_error_handlers(self._app)

        @self._app.post("/")
        async def route(request: Request) -> None:
            self.read.append(len(await request.body()))

    def send(self, pieces: AsyncIterator[bytes]) -> tuple[int, str | None]:
        """The status, and the code of the error."""
        return asyncio.run(self._send(pieces))

    async def _send(self, pieces: AsyncIterator[bytes]) -> tuple[int, str | None]:
        sent: list[Message] = []

        async def receive() -> Message:
            self.taken += 1
            async for piece in pieces:
                return {"type": "http.request", "body": piece, "more_body": True}
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/",
            "query_string": b"",
            "headers": self._headers,
        }
        await self._app(scope, receive, send)
        body = b"".join(message.get("body", b"") for message in sent)
        return sent[0]["status"], ((json.loads(body) or {}).get("error") or {}).get("code")


async def at_once(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def slowly(pieces: Iterator[bytes], every_s: float) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
        await asyncio.sleep(every_s)


async def never() -> AsyncIterator[bytes]:
    yield b"{"
    await asyncio.Event().wait()


def test_a_body_of_the_limit_is_read() -> None:
    client = Client(headers={"content-length": str(LIMIT)})
    assert client.send(at_once(b"x" * LIMIT)) == (200, None)
    assert client.read == [LIMIT]


@pytest.mark.parametrize("announced", [LIMIT + 1, 10**18, 10**30])
def test_what_is_announced_as_too_long_is_refused_before_it_is_read(announced: int) -> None:
    client = Client(headers={"content-length": str(announced)})
    assert client.send(at_once(b"x" * (LIMIT + 1))) == (413, "body_too_large")
    assert client.taken == 0


def test_what_is_not_announced_is_read_up_to_the_limit_and_no_further() -> None:
    client = Client(headers={"transfer-encoding": "chunked"})
    assert client.send(at_once(*[b"x" * 100] * 10**6)) == (413, "body_too_large")
    assert client.taken == LIMIT // 100 + 1
    assert client.read == []


def test_a_length_that_is_a_lie_changes_nothing() -> None:
    client = Client(headers={"content-length": "5"})
    assert client.send(at_once(b"x" * (LIMIT + 1))) == (413, "body_too_large")


def test_a_body_that_stops_coming_is_408() -> None:
    assert Client(silence_s=0.05).send(never()) == (408, "request_timeout")


def test_a_body_that_drips_for_ever_is_408_though_it_is_never_silent() -> None:
    client = Client(silence_s=0.2, slowest=1000)
    pieces = slowly(iter([b"x"] * LIMIT), every_s=0.02)
    assert client.send(pieces) == (408, "request_timeout")
    assert client.taken < LIMIT / 4


def test_a_body_may_take_longer_than_the_silence_while_it_comes_fast_enough() -> None:
    client = Client(silence_s=0.2, slowest=500)
    assert client.send(slowly(iter([b"x" * 20] * 20), every_s=0.02)) == (200, None)


def test_waiting_for_the_client_to_leave_has_no_limit() -> None:
    """Once the body is here: a stream watches for that as long as it runs."""
    waited: list[str] = []

    async def app(_scope: Scope, receive: Receive, _send: Send) -> None:
        for _ in range(2):
            waited.append((await receive())["type"])

    async def receive() -> Message:
        if not waited:
            return {"type": "http.request", "body": b"", "more_body": False}
        await asyncio.sleep(0.2)
        return {"type": "http.disconnect"}

    async def send(_message: Message) -> None:
        raise AssertionError

    limited = BodyLimit(app, limit=LIMIT, silence_s=0.05)
    asyncio.run(limited({"type": "http", "headers": []}, receive, send))
    assert waited == ["http.request", "http.disconnect"]
