"""The limits on the size and the duration of a body, and the errors of malformed JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.types import Message, Receive, Scope, Send

from serve_app.gateway.http_errors import install_error_handlers
from serve_app.gateway.request_body import MAX_NAMES, BodyLimit
from serve_app.wire.admin import (
    ErrorBody,
)
from tests.serve_app.gateway.fakes import (
    TEXT,
    Door,
    code_of,
)

# ---- limits -------------------------------------------------------------------------------------

LIMIT = 1024


class Client:
    """An ASGI client of one route that reads its body."""

    def __init__(
        self,
        *,
        max_pause_s: float = 30.0,
        min_bytes_per_s: float = 1e6,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.read: list[int] = []
        self.taken = 0
        self._headers = [(k.encode(), v.encode()) for k, v in (headers or {}).items()]
        self._app = FastAPI()
        self._app.add_middleware(
            BodyLimit, limit=LIMIT, max_pause_s=max_pause_s, min_bytes_per_s=min_bytes_per_s
        )
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


@pytest.mark.parametrize("content_length", [LIMIT + 1, 10**18, 10**30])
def test_a_content_length_over_the_limit_is_refused_before_the_body_is_read(
    content_length: int,
) -> None:
    client = Client(headers={"content-length": str(content_length)})
    assert client.send(at_once(b"x" * (LIMIT + 1))) == (413, "body_too_large")
    assert client.taken == 0


def test_a_chunked_body_is_read_up_to_the_limit_and_no_further() -> None:
    client = Client(headers={"transfer-encoding": "chunked"})
    assert client.send(at_once(*[b"x" * 100] * 10**6)) == (413, "body_too_large")
    assert client.taken == LIMIT // 100 + 1
    assert client.read == []


def test_a_false_content_length_changes_nothing() -> None:
    client = Client(headers={"content-length": "5"})
    assert client.send(at_once(b"x" * (LIMIT + 1))) == (413, "body_too_large")


def test_a_body_that_stops_coming_is_408() -> None:
    assert Client(max_pause_s=0.05).send(never()) == (408, "request_timeout")


def test_a_body_that_arrives_too_slowly_is_408_although_it_never_pauses() -> None:
    client = Client(max_pause_s=0.2, min_bytes_per_s=1000)
    pieces = slowly(iter([b"x"] * LIMIT), every_s=0.02)
    assert client.send(pieces) == (408, "request_timeout")
    assert client.taken < LIMIT / 4


def test_a_body_may_take_longer_than_one_pause_while_it_comes_fast_enough() -> None:
    client = Client(max_pause_s=0.2, min_bytes_per_s=500)
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

    limited = BodyLimit(app, limit=LIMIT, max_pause_s=0.05)
    asyncio.run(limited({"type": "http", "headers": []}, receive, send))
    assert waited == ["http.request", "http.disconnect"]


# ---- JSON ---------------------------------------------------------------------------------------


def test_a_body_that_is_not_json_is_400() -> None:
    response = Door()("POST", "/v1/completions", content=b"{", headers=JSON)
    assert (response.status_code, code_of(response)) == (400, "invalid_json")


JSON = {"content-type": "application/json"}


MALFORMED = {
    "nothing": b"",
    "nan": b'{"prompt": "x", "temperature": NaN}',
    "infinity": b'{"prompt": "x", "temperature": -Infinity}',
    "not UTF-8": b'{"prompt": "\xff"}',
    "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
    "a name twice": b'{"prompt": "x", "prompt": "y"}',
    "too deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "too deep in objects": b'{"a": ' * 100_000,
    "too many digits": b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    "too many names": json.dumps({str(i): 0 for i in range(MAX_NAMES + 1)}).encode(),
    "two documents": b"{}{}",
}


@pytest.mark.parametrize("kind", MALFORMED)
@pytest.mark.parametrize("path", ["/v1/completions", "/admin/rollouts", "/v1/load_lora_adapter"])
def test_a_malformed_body_is_400_and_calls_no_handle(path: str, kind: str) -> None:
    door = Door()
    response = door("POST", path, content=MALFORMED[kind], headers=JSON)
    assert (response.status_code, code_of(response)) == (400, "invalid_json")
    assert (door.model.complete.asked, door.controller.start_rollout.asked) == ([], [])


def test_a_body_may_begin_with_a_byte_order_mark() -> None:
    content = b"\xef\xbb\xbf" + json.dumps(TEXT).encode()
    assert Door()("POST", "/v1/completions", content=content, headers=JSON).status_code == 200


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "json"])
def test_a_body_of_another_type_is_415(kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    content = json.dumps(TEXT).encode()
    response = Door()("POST", "/v1/completions", content=content, headers=headers)
    assert (response.status_code, code_of(response)) == (415, "unsupported_media_type")


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON"])
def test_json_may_be_written_in_many_ways(kind: str) -> None:
    content = json.dumps(TEXT).encode()
    response = Door()("POST", "/v1/completions", content=content, headers={"content-type": kind})
    assert response.status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        [],
        "text",
        None,
        7,
        TEXT | {"\ud800": 1},
        TEXT | {"": 1},
        TEXT | {"\n": 1},
        TEXT | {"x" * 100_000: 1},
        TEXT | {"stop": ["\ud800"]},
        TEXT | {"max_tokens": 10.5},
        {"prompt": "\ud800"},
        {"prompt": ""},
        {"prompt": {}},
        {"prompt": [[1], [-1]]},
    ],
    ids=ascii,
)
def test_a_body_that_makes_no_sense_is_400_in_one_short_sentence(body: Any) -> None:
    content = json.dumps(body).encode()
    response = Door()("POST", "/v1/completions", content=content, headers=JSON)
    assert response.status_code == 400
    message = ErrorBody.model_validate_json(response.text).error.message
    assert message.strip()
    assert len(message) <= 1000


def test_a_million_invalid_elements_are_one_error() -> None:
    door = Door()
    for body in (
        {"messages": [1] * 10**6},
        {"messages": [{"role": "user", "content": [0] * 10**6}]},
    ):
        response = door("POST", "/v1/chat/completions", json=body)
        assert (response.status_code, code_of(response)) == (400, "invalid_parameter")
