"""Whether anybody is there to answer: for requests that wait for a replica to take them.

A handle waits for ever when a deployment has no running replica. Some of that is wanted: a replica
that restarts, or one that drains for a swap, is back soon, and no request shall fail for it. So a
request is refused only when it has waited for `patience_s` and the controller hears of no replica
at all; and at once when that is known already, as when a fleet starts. A replica that drains still
reports. If the controller does not answer, nobody knows, and requests wait as they did.
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

PATIENCE_S = 5.0
_LOOK_TIMEOUT_S = 5.0
T = TypeVar("T")


class Readiness:
    """For one event loop. `controller`: the handle that says who is there.

    `look_s`: how long one look is good for.
    """

    def __init__(
        self, controller: DeploymentHandle, *, patience_s: float = PATIENCE_S, look_s: float = 1.0
    ) -> None:
        self._controller = controller
        self._patience_s = patience_s
        self._look_s = look_s
        self._nobody = True  # until the first look: a fleet that starts has nobody
        self._look: asyncio.Task[bool] | None = None
        self._looked_at = 0.0

    async def expect(self) -> None:
        """Raises `NoReplicaReady` when that is known before anything is asked."""
        if self._nobody and not await self._somebody():
            raise NoReplicaReady

    async def wait(self, call: Any, result: Awaitable[T]) -> T:
        """`result`, which waits for what the handle's `call` gives. Raises `NoReplicaReady`."""
        waiting = asyncio.ensure_future(result)
        patience_s = self._patience_s
        try:
            while not (await asyncio.wait({waiting}, timeout=patience_s))[0]:
                if _taken(call):
                    break
                if not await self._somebody():
                    raise NoReplicaReady
                patience_s = self._look_s
            return await waiting
        finally:
            waiting.cancel()  # which takes a call that nobody has taken out of the handle's queue

    async def _somebody(self) -> bool:
        """Whether a replica is there, as far as anybody knows. One look serves all who ask."""
        now = asyncio.get_running_loop().time()
        if self._look is None or (self._look.done() and now > self._looked_at + self._look_s):
            self._looked_at = now
            self._look = asyncio.create_task(self._ask())
        return await asyncio.shield(self._look)

    async def _ask(self) -> bool:
        try:
            async with asyncio.timeout(_LOOK_TIMEOUT_S):
                fleet: FleetView = await self._controller.fleet.remote()
        except (TimeoutError, RayError, RayServeException):
            return True
        self._nobody = not fleet.replicas
        return not self._nobody


def _taken(call: Any) -> bool:
    """Whether a replica has the request: it runs there, whatever the controller hears."""
    return bool(call._replica_result_future.done())
