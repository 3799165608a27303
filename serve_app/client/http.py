"""The admin surface from outside, for scripts, trainers and the CLI.

Stands between `views` (the JSON it parses) and whoever drives a fleet over HTTP. Knows nothing of
Ray or torch, so it runs where neither is installed. What can go wrong:

    Exception
    ├── RequestRejected      the server heard the request and said no; `code` is stable
    ├── ServerUnreachable   nothing that speaks this protocol answered
    └── TimeoutError        `wait` ran out of time; the rollout goes on
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType, TracebackType
from typing import Self, TypeVar
from urllib.parse import quote, urlencode

import httpx
from pydantic import ValidationError

from serve_app.rollout.plan import Plan
from serve_app.wire.admin import (
    AdapterList,
    AdapterView,
    ErrorBody,
    FleetView,
    RolloutList,
    RolloutView,
    View,
)

DEFAULT_URL = "http://127.0.0.1:8000"
_START_S = 120.0  # the adapter is fetched and packed, and its probes are looked for


T = TypeVar("T")
V = TypeVar("V", bound=View)

# Without our error body these are a proxy, or some other program, speaking for an absent gateway.
NOT_A_GATEWAY = frozenset({404, 405, 502, 503, 504})


class RequestRejected(Exception):
    """The server said no: its HTTP status, its stable code, and its sentence."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(status, code, message)
        self.status = status
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"the server refused the request ({self.status} {self.code}): {self.message}"


class ServerUnreachable(Exception):
    """Nothing that speaks this protocol answered at `base_url`."""

    def __init__(self, base_url: str, why: str) -> None:
        super().__init__(base_url, why)
        self.base_url = base_url
        self.why = why

    def __str__(self) -> str:
        return f"cannot reach the server at {self.base_url}: {self.why}"


class HotswapClient:
    """One fleet's admin surface. Every call raises `RequestRejected` or `ServerUnreachable`.

    `timeout_s` bounds one request. `transport` replaces the network, for tests.
    Raises ValueError where the address or the token cannot be sent at all.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        token: str | None = None,
        timeout_s: float = 30.0,
        transport: httpx.BaseTransport | None = None,
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def fleet(self) -> FleetView:
        return self._ask(FleetView, "GET", "/admin/fleet")

    def rollouts(self) -> RolloutList:
        return self._ask(RolloutList, "GET", "/admin/rollouts")

    def rollout(self, id: str) -> RolloutView:
        return self._ask(RolloutView, "GET", f"/admin/rollouts/{quote(id, safe='')}")

    def start(
        self, plan: Plan, *, expected_generation: int | None = None, key: str | None = None
    ) -> RolloutView:
        """Ask for a rollout. The plan's `adapter` is resolved by the server, in its directory.

        `expected_generation`: refused when the fleet's is another one. `key`: the caller's own name
        for this request; asking again with it, after a lost answer, finds the same rollout.
        """
        body = plan.model_dump(mode="json", exclude_unset=True)
        return self._control(
            "/admin/rollouts", expected_generation, key, body=body, timeout_s=_START_S
        )

    def promote(
        self,
        id: str,
        *,
        full: bool = False,
        expected_generation: int | None = None,
        key: str | None = None,
    ) -> RolloutView:
        """Leave the current step, whatever is measured; `full`: every step that is left."""
        path = f"/admin/rollouts/{quote(id, safe='')}/promote"
        return self._control(path, expected_generation, key, full=full or None)

    def abort(
        self, id: str, *, expected_generation: int | None = None, key: str | None = None
    ) -> RolloutView:
        """Send every replica back to the stable revision."""
        return self._verb(id, "abort", expected_generation, key)

    def pause(
        self, id: str, *, expected_generation: int | None = None, key: str | None = None
    ) -> RolloutView:
        """Stay in the current step until `resume`."""
        return self._verb(id, "pause", expected_generation, key)

    def resume(
        self, id: str, *, expected_generation: int | None = None, key: str | None = None
    ) -> RolloutView:
        """Go on after `pause`."""
        return self._verb(id, "resume", expected_generation, key)

    def retry(
        self, id: str, *, expected_generation: int | None = None, key: str | None = None
    ) -> RolloutView:
        """Try again what failed: from its step when it is paused, from its start when it ended."""
        return self._verb(id, "retry", expected_generation, key)

    def undo(
        self,
        *,
        to: str | None = None,
        expected_generation: int | None = None,
        key: str | None = None,
    ) -> RolloutView:
        """Abort what runs, else go back to the revision before; `to`: to that earlier one."""
        return self._control("/admin/undo", expected_generation, key, to=to)

    def adapters(self) -> AdapterList:
        """What every replica serves for requests that name it, and the fleet's generation."""
        return self._ask(AdapterList, "GET", "/v1/lora_adapters")

    def load_adapter(
        self,
        name: str,
        path: str,
        *,
        load_inplace: bool = False,
        expected_generation: int | None = None,
        timeout_s: float = 120.0,
    ) -> AdapterView:
        """Have every replica serve an adapter for requests that name it; returns when all do.

        `path` is resolved by the server. Another content under the same name is refused without
        `load_inplace`; anything is, when the fleet's generation is not `expected_generation`.
        `timeout_s` is longer than the server tries.
        """
        asked = {
            "lora_name": name,
            "lora_path": path,
            "load_inplace": load_inplace,
            "expected_generation": expected_generation,
        }
        path = "/v1/load_lora_adapter"
        return self._ask(AdapterView, "POST", path, body=_said(asked), timeout_s=timeout_s)

    def unload_adapter(
        self, name: str, *, expected_generation: int | None = None, timeout_s: float = 120.0
    ) -> AdapterView:
        """Have no replica serve it any more; requests that run on it finish."""
        asked = {"lora_name": name, "expected_generation": expected_generation}
        path = "/v1/unload_lora_adapter"
        return self._ask(AdapterView, "POST", path, body=_said(asked), timeout_s=timeout_s)

    def watch(
        self, id: str, *, period_s: float = 0.2, outage_s: float = 30.0
    ) -> Iterator[tuple[RolloutView, FleetView]]:
        """The rollout and its fleet, again and again, until the rollout has ended.

        The ended rollout is the last thing yielded. A server that is away for less than `outage_s`
        is waited for; beyond that, ServerUnreachable: how the rollout ended is then unknown.
        """

        def moment() -> tuple[RolloutView, FleetView]:
            # rollout first: the last fleet yielded is then never older than the rollout's end
            return self.rollout(id), self.fleet()

        for rollout, fleet in self._repeat(moment, period_s=period_s, outage_s=outage_s):
            yield rollout, fleet
            if rollout.ended:
                return

    def watch_fleet(self, *, period_s: float = 0.2, outage_s: float = 30.0) -> Iterator[FleetView]:
        """The fleet, again and again, without end; outages as in `watch`."""
        return self._repeat(self.fleet, period_s=period_s, outage_s=outage_s)

    def wait(self, id: str, *, timeout_s: float) -> RolloutView:
        """The rollout once it has ended, however it ended. TimeoutError after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        for rollout, _ in self.watch(id, outage_s=min(30.0, timeout_s)):
            if rollout.ended:
                return rollout
            if time.monotonic() >= deadline:
                break
        raise TimeoutError(f"rollout {id} has not ended after {timeout_s:g} s")

    def _repeat(self, ask: Callable[[], T], *, period_s: float, outage_s: float) -> Iterator[T]:
        while True:
            yield self._through_outage(ask, period_s=period_s, outage_s=outage_s)
            time.sleep(period_s)

    def _through_outage(self, ask: Callable[[], T], *, period_s: float, outage_s: float) -> T:
        failed_at: float | None = None
        while True:
            try:
                return ask()
            except (RequestRejected, ServerUnreachable) as error:
                if isinstance(error, RequestRejected) and error.status < 500:
                    raise
                # from the first failure, so that one request that hangs is not the whole outage
                failed_at = failed_at or time.monotonic()
                if time.monotonic() - failed_at >= outage_s:
                    why = error.why if isinstance(error, ServerUnreachable) else str(error)
                    raise ServerUnreachable(
                        self.base_url, f"gave up after {outage_s:g} s of outage: {why}"
                    ) from error
            time.sleep(period_s)

    def _verb(
        self, id: str, verb: str, expected_generation: int | None, key: str | None
    ) -> RolloutView:
        path = f"/admin/rollouts/{quote(id, safe='')}/{verb}"
        return self._control(path, expected_generation, key)

    def _control(
        self,
        path: str,
        expected_generation: int | None,
        key: str | None,
        *,
        body: dict[str, object] | None = None,
        timeout_s: float | None = None,
        **query: object,
    ) -> RolloutView:
        asked = _said({"expected_generation": expected_generation} | query)
        headers = {} if key is None else {"idempotency-key": key}
        path = f"{path}?{urlencode(asked)}" if asked else path
        return self._ask(RolloutView, "POST", path, body=body, headers=headers, timeout_s=timeout_s)

    def _ask(
        self,
        view: type[V],
        method: str,
        path: str,
        *,
        body: dict[str, object] | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
        timeout_s: float | None = None,
    ) -> V:
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
            why = f"what answered {method} {path} is not a hotswap server"
            raise ServerUnreachable(self.base_url, why) from error

    def _error_of(self, response: httpx.Response) -> RequestRejected | ServerUnreachable:
        status = response.status_code
        try:
            said = ErrorBody.model_validate_json(response.content).error
        except ValidationError:
            phrase = f"{status} {response.reason_phrase}".strip()
            if status < 400 or status in NOT_A_GATEWAY:
                return ServerUnreachable(
                    self.base_url, f"no hotswap server answers there, {phrase}"
                )
            return RequestRejected(status, f"http_{status}", f"the answer was {phrase}")
        return RequestRejected(status, said.code, said.message)


def _said(asked: Mapping[str, object]) -> dict[str, object]:
    return {field: value for field, value in asked.items() if value is not None}


def _check_address(base_url: str) -> None:
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ValueError(f"{base_url!r} is not an address: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"{base_url!r} is not an address such as {DEFAULT_URL}")


def _why(error: httpx.RequestError, method: str) -> str:
    # Only a request that never left is known not to have been acted upon.
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return str(error) or "the connection timed out"
    lost = str(error) or type(error).__name__
    if method == "GET":
        return lost
    return f"{lost}; whether the request was accepted is unknown, look at the fleet to see"
