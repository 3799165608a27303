"""One request to a gateway: JSON out, a view or an error back.

Tells a hotswap server from a proxy or another program at the same address.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeVar

import httpx
from pydantic import ValidationError

from serve_app.client.errors import RequestRejected, ServerUnreachable
from serve_app.wire.admin import ErrorBody, View

DEFAULT_URL = "http://127.0.0.1:8000"
# Without the gateway's error body, these come from a proxy or another program.
_NOT_A_GATEWAY = frozenset({404, 405, 502, 503, 504})

V = TypeVar("V", bound=View)


class Connection:
    """HTTP to one gateway.

    `timeout_s` bounds one request. `transport` replaces the network, for tests.

    Raises:
        ValueError: the address is not an http(s) URL, or no HTTP header can carry the token.
    """

    def __init__(
        self,
        base_url: str,
        *,
        token: str | None,
        timeout_s: float,
        transport: httpx.BaseTransport | None,
    ) -> None:
        _check_address(base_url)
        if token and not (token.isascii() and token.isprintable()):
            raise ValueError("the token has characters that no HTTP header can carry")
        self.base_url = base_url
        self._http = httpx.Client(
            base_url=base_url,
            headers={"authorization": f"Bearer {token}"} if token else {},
            timeout=timeout_s,
            transport=transport,
        )

    def close(self) -> None:
        self._http.close()

    def request(
        self,
        view: type[V],
        method: str,
        path: str,
        *,
        body: Mapping[str, object] | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
        timeout_s: float | None = None,
    ) -> V:
        """The answer as a `view`. Raises `RequestRejected` or `ServerUnreachable`."""
        timeout = httpx.USE_CLIENT_DEFAULT if timeout_s is None else timeout_s
        try:
            response = self._http.request(
                method, path, json=body, headers=dict(headers), timeout=timeout
            )
        except httpx.RequestError as error:
            raise ServerUnreachable(self.base_url, _why(error, method)) from error
        if not response.is_success:
            raise self._error_of(response)
        try:
            return view.model_validate_json(response.content)
        except ValidationError as error:
            why = f"the answer to {method} {path} is not a hotswap server's"
            raise ServerUnreachable(self.base_url, why) from error

    def _error_of(self, response: httpx.Response) -> RequestRejected | ServerUnreachable:
        status = response.status_code
        try:
            detail = ErrorBody.model_validate_json(response.content).error
        except ValidationError:
            phrase = f"{status} {response.reason_phrase}".strip()
            if status < 400 or status in _NOT_A_GATEWAY:
                why = f"no hotswap server answers there, {phrase}"
                return ServerUnreachable(self.base_url, why)
            return RequestRejected(status, f"http_{status}", f"the answer was {phrase}")
        return RequestRejected(status, detail.code, detail.message)


def _check_address(base_url: str) -> None:
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ValueError(f"{base_url!r} is not an address: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"{base_url!r} is not an address such as {DEFAULT_URL}")


def _why(error: httpx.RequestError, method: str) -> str:
    # A request whose connection failed was never sent; any other may have been acted upon.
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return str(error) or "the connection timed out"
    lost = str(error) or type(error).__name__
    if method == "GET":
        return lost
    return f"{lost}; the server may have accepted the request, look at the fleet to see"
