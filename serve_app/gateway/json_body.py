"""From a request's bytes to JSON, strictly: what a client sent is what is checked, or an error.

Between the limit on a body's size and FastAPI, which would let a second value of a name win, take
NaN, and answer some malformed bodies in words of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request, Response

from serve_app.gateway.http_errors import EnvelopeRoute
from serve_app.wire.errors import InvalidRequest

MOST_NAMES = 1000  # in one object: each unknown one would be an error of its own


class JsonRoute(EnvelopeRoute):
    """A route whose body, if it has one, is read by `parse`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def read_and_handle(request: Request) -> Response:
            read = _JsonRequest(request.scope, request.receive)
            read.document = parse(await read.body(), request.headers.get("content-type", ""))
            return await handle(read)

        return read_and_handle


class _JsonRequest(Request):
    document: Any

    async def json(self) -> Any:
        return self.document


def parse(body: bytes, content_type: str) -> Any:
    """The JSON value. Raises `InvalidRequest`."""
    if not _is_json(content_type):
        message = "the body must be JSON, with the header content-type: application/json"
        raise InvalidRequest(415, "unsupported_media_type", message)
    if not body:
        raise _refused("the body is empty")
    try:
        return json.loads(
            body.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_no_number
        )
    except UnicodeDecodeError:
        raise _refused("the body is not UTF-8") from None
    except RecursionError:
        raise _refused("the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _refused(f"the body is not valid JSON: {error}") from None
    except ValueError:  # Python's limit on the digits of an integer
        raise _refused("a number in the body has too many digits") from None


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind[-5:] == "+json")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _refused("an object has the same name twice")
    if len(found) > MOST_NAMES:
        raise _refused(f"an object has more than {MOST_NAMES} names")
    return found


def _no_number(word: str) -> NoReturn:
    raise _refused(f"{word} is not JSON")


def _refused(message: str) -> InvalidRequest:
    return InvalidRequest(400, "invalid_json", message)
