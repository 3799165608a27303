"""Readiness: a request that waits while no replica is running fails with 503.

A DeploymentHandle waits without limit when the deployment has no running replica. A short wait is
wanted: a replica that restarts, or drains for a swap, is back soon, and no request should fail for
it. So a request fails only if it has waited for `patience_s` and the controller knows of no
replica; and at once if that is already known, as while a fleet starts. A draining replica still
reports to the controller. If the controller does not answer, requests go on waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.wire.admin import FleetView
from serve_app.wire.errors import NoReplicaReady
from serve_app.wire.ray_internals import is_assigned

PATIENCE_S = 5.0
_CONTROLLER_TIMEOUT_S = 5.0
T = TypeVar("T")


class Readiness:
    """Asks the controller if any replica is running. For one event loop.

    Args:
        controller: the handle of the RolloutController.
        patience_s: the time that a request waits before the controller is asked.
        max_age_s: the time for which an answer of the controller is reused.
    """

    def __init__(
        self,
        controller: DeploymentHandle,
        *,
        patience_s: float = PATIENCE_S,
        max_age_s: float = 1.0,
    ) -> None:
        self._controller = controller
        self._patience_s = patience_s
        self._max_age_s = max_age_s
        self._empty = True  # until the first answer: a fleet that starts has no replica
        self._query: asyncio.Task[bool] | None = None
        self._queried_at = 0.0

    async def check(self) -> None:
        """Raises `NoReplicaReady` if the fleet is known to have no replica."""
        if self._empty and not await self._any_replica():
            raise NoReplicaReady

    async def wait(self, call: Any, result: Awaitable[T]) -> T:
        """Returns `result`, which waits for the handle's `call`. Raises `NoReplicaReady`."""
        waiting = asyncio.ensure_future(result)
        timeout_s = self._patience_s
        try:
            while not (await asyncio.wait({waiting}, timeout=timeout_s))[0]:
                if is_assigned(call):  # a replica runs it, also if it no longer reports
                    break
                if not await self._any_replica():
                    raise NoReplicaReady
                timeout_s = self._max_age_s
            return await waiting
        finally:
            waiting.cancel()  # removes a call that no replica has accepted from the handle's queue

    async def _any_replica(self) -> bool:
        """Returns False if the controller knows of no replica. Waiting requests share one query."""
        now = asyncio.get_running_loop().time()
        if self._query is None or (self._query.done() and now > self._queried_at + self._max_age_s):
            self._queried_at = now
            self._query = asyncio.create_task(self._ask_controller())
        return await asyncio.shield(self._query)

    async def _ask_controller(self) -> bool:
        try:
            async with asyncio.timeout(_CONTROLLER_TIMEOUT_S):
                fleet: FleetView = await self._controller.fleet.remote()
        except (TimeoutError, RayError, RayServeException):
            return True  # unknown: requests go on waiting
        self._empty = not fleet.replicas
        return not self._empty
