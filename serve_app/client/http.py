"""The Python client of a fleet's admin API, for scripts, trainers and the `hotswap` command.

Needs neither Ray nor torch. `client.errors` lists the errors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Self, TypeVar, Unpack
from urllib.parse import quote, urlencode

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_fixed

from serve_app.client.connection import DEFAULT_URL, Connection
from serve_app.client.errors import RequestRejected, ServerUnreachable
from serve_app.rollout.plan import Plan
from serve_app.rollout.precondition import Precondition, PreconditionArgs
from serve_app.wire.admin import AdapterList, AdapterView, FleetView, RolloutList, RolloutView

# The server answers `start` after it has fetched and packed the adapter and checked its probes.
_START_S = 120.0

T = TypeVar("T")


class HotswapClient:
    """The admin API of one fleet, one method for each route.

    Every call raises `RequestRejected` or `ServerUnreachable`. `timeout_s` bounds one request.
    `transport` replaces the network, for tests.

    Calls that change the fleet take two more keyword arguments:
        expected_generation: the request is rejected if the fleet's generation is another one.
        key: your idempotency key. A second request with the same key, after a lost answer for
            example, changes nothing and returns the same rollout.

    Raises:
        ValueError: the address is not an http(s) URL, or no HTTP header can carry the token.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        token: str | None = None,
        timeout_s: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._connection = Connection(
            base_url, token=token, timeout_s=timeout_s, transport=transport
        )

    @property
    def base_url(self) -> str:
        return self._connection.base_url

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
        self._connection.close()

    def fleet(self) -> FleetView:
        return self._connection.request(FleetView, "GET", "/admin/fleet")

    def rollouts(self) -> RolloutList:
        return self._connection.request(RolloutList, "GET", "/admin/rollouts")

    def rollout(self, id: str) -> RolloutView:
        return self._connection.request(RolloutView, "GET", _rollout_path(id))

    def start(self, plan: Plan, **given: Unpack[PreconditionArgs]) -> RolloutView:
        """Start a rollout. The server resolves the plan's `adapter`, in its own directory."""
        body = plan.model_dump(mode="json", exclude_unset=True)
        return self._change("/admin/rollouts", Precondition(**given), body=body, timeout_s=_START_S)

    def promote(
        self, id: str, *, full: bool = False, **given: Unpack[PreconditionArgs]
    ) -> RolloutView:
        """End the current step without its analysis; `full`: every remaining step."""
        query = {"full": full or None}
        return self._change(_rollout_path(id, "promote"), Precondition(**given), query=query)

    def abort(self, id: str, **given: Unpack[PreconditionArgs]) -> RolloutView:
        """Send every replica back to the stable revision."""
        return self._change(_rollout_path(id, "abort"), Precondition(**given))

    def pause(self, id: str, **given: Unpack[PreconditionArgs]) -> RolloutView:
        """Stay in the current step until `resume`."""
        return self._change(_rollout_path(id, "pause"), Precondition(**given))

    def resume(self, id: str, **given: Unpack[PreconditionArgs]) -> RolloutView:
        """Continue after `pause`."""
        return self._change(_rollout_path(id, "resume"), Precondition(**given))

    def retry(self, id: str, **given: Unpack[PreconditionArgs]) -> RolloutView:
        """Repeat the failed step of a paused rollout, or all of a rollout that has ended."""
        return self._change(_rollout_path(id, "retry"), Precondition(**given))

    def undo(self, *, to: str | None = None, **given: Unpack[PreconditionArgs]) -> RolloutView:
        """Abort the current rollout. Without one, return to the previous stable revision.

        `to`: an earlier revision to return to, as the fleet's `history` names it.
        """
        return self._change("/admin/undo", Precondition(**given), query={"to": to})

    def adapters(self) -> AdapterList:
        """The loaded adapters, and the fleet's generation."""
        return self._connection.request(AdapterList, "GET", "/v1/lora_adapters")

    def load_adapter(
        self,
        name: str,
        path: str,
        *,
        load_inplace: bool = False,
        expected_generation: int | None = None,
        timeout_s: float = 120.0,
    ) -> AdapterView:
        """Load an adapter on every replica, for requests that name it; returns when all have it.

        The server resolves `path`. `load_inplace`: replace the adapter that has this name; without
        it, other content under a loaded name is rejected. The default `timeout_s` is longer than
        the server's own limit.
        """
        body = {
            "lora_name": name,
            "lora_path": path,
            "load_inplace": load_inplace,
            "expected_generation": expected_generation,
        }
        return self._change_adapter("/v1/load_lora_adapter", body, timeout_s=timeout_s)

    def unload_adapter(
        self, name: str, *, expected_generation: int | None = None, timeout_s: float = 120.0
    ) -> AdapterView:
        """Unload an adapter from every replica; requests that run on it finish."""
        body = {"lora_name": name, "expected_generation": expected_generation}
        return self._change_adapter("/v1/unload_lora_adapter", body, timeout_s=timeout_s)

    def watch(
        self, id: str, *, period_s: float = 0.2, outage_s: float = 30.0
    ) -> Iterator[tuple[RolloutView, FleetView]]:
        """Yield the rollout and its fleet every `period_s`; the ended rollout is the last.

        The server may be away for up to `outage_s`. After that `ServerUnreachable` is raised, and
        the end of the rollout is unknown.
        """

        def moment() -> tuple[RolloutView, FleetView]:
            # rollout first: the last fleet yielded is then never older than the rollout's end
            return self.rollout(id), self.fleet()

        for rollout, fleet in self._poll(moment, period_s=period_s, outage_s=outage_s):
            yield rollout, fleet
            if rollout.ended:
                return

    def watch_fleet(self, *, period_s: float = 0.2, outage_s: float = 30.0) -> Iterator[FleetView]:
        """Yield the fleet every `period_s`, without end; outages as in `watch`."""
        return self._poll(self.fleet, period_s=period_s, outage_s=outage_s)

    def wait(self, id: str, *, timeout_s: float) -> RolloutView:
        """The rollout once it has ended, promoted or not. TimeoutError after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        for rollout, _ in self.watch(id, outage_s=min(30.0, timeout_s)):
            if rollout.ended:
                return rollout
            if time.monotonic() >= deadline:
                break
        raise TimeoutError(f"rollout {id} has not ended after {timeout_s:g} s")

    def _poll(self, ask: Callable[[], T], *, period_s: float, outage_s: float) -> Iterator[T]:
        while True:
            yield _through_outage(ask, self.base_url, period_s=period_s, outage_s=outage_s)
            time.sleep(period_s)

    def _change(
        self,
        path: str,
        given: Precondition,
        *,
        query: Mapping[str, object] | None = None,
        body: Mapping[str, object] | None = None,
        timeout_s: float | None = None,
    ) -> RolloutView:
        query = _set({"expected_generation": given.expected_generation, **(query or {})})
        return self._connection.request(
            RolloutView,
            "POST",
            f"{path}?{urlencode(query)}" if query else path,
            body=body,
            headers={} if given.key is None else {"idempotency-key": given.key},
            timeout_s=timeout_s,
        )

    def _change_adapter(
        self, path: str, body: Mapping[str, object], *, timeout_s: float
    ) -> AdapterView:
        return self._connection.request(
            AdapterView, "POST", path, body=_set(body), timeout_s=timeout_s
        )


def _rollout_path(id: str, verb: str | None = None) -> str:
    path = f"/admin/rollouts/{quote(id, safe='')}"
    return f"{path}/{verb}" if verb else path


def _set(fields: Mapping[str, object]) -> dict[str, object]:
    """Without the fields that are None: their defaults are the server's."""
    return {field: value for field, value in fields.items() if value is not None}


def _through_outage(ask: Callable[[], T], base_url: str, *, period_s: float, outage_s: float) -> T:
    """The result of `ask`, called again every `period_s` while the server is away."""
    failed_at: list[float] = []

    def lasted_too_long(_call: RetryCallState) -> bool:
        # Since the first failure. `stop_after_delay` counts from the first call, which would make
        # one request that hangs the whole outage.
        failed_at.append(time.monotonic())
        return failed_at[-1] - failed_at[0] >= outage_s

    def give_up(call: RetryCallState) -> T:
        error = call.outcome.exception() if call.outcome else None
        why = error.why if isinstance(error, ServerUnreachable) else str(error)
        message = f"gave up after {outage_s:g} s of outage: {why}"
        raise ServerUnreachable(base_url, message) from error

    retrying = Retrying(
        retry=retry_if_exception(_is_outage),
        wait=wait_fixed(period_s),
        stop=lasted_too_long,
        retry_error_callback=give_up,
    )
    return retrying(ask)


def _is_outage(error: BaseException) -> bool:
    if isinstance(error, RequestRejected):
        return error.status >= 500
    return isinstance(error, ServerUnreachable)
