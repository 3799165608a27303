"""The replica's side of the control lane: report status, receive the desired state, report again.

The desired state is level-triggered: the newest one is complete, so a lost message needs no repair.
`serve_app.replica.reconciler` applies it.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import os
from typing import Protocol

import ray

from hotswap_lib import Layout
from serve_app.async_tasks import retrieve_exception
from serve_app.engine.engine import Engine
from serve_app.replica.reconciler import Reconciler, first_line
from serve_app.rollout.state import ReplicaState
from serve_app.wire.admin import StartView
from serve_app.wire.reports import Answer, Report
from serve_app.wire.routing_stats import RoutingStats, routing_stats

logger = logging.getLogger(__name__)
_RETRY_S = 0.2
_LEAVE_S = 1.0


class ControllerCalls(Protocol):
    """The controller's methods for replicas. In production a `DeploymentHandle` implements them."""

    async def join(self, replica: str, layout: Layout) -> None: ...
    async def report(self, report: Report) -> Answer: ...
    async def leave(self, replica: str) -> None: ...


class ControlLoop:
    """Reports to the controller and hands each answer to the reconciler, until `close`."""

    def __init__(
        self,
        engine: Engine,
        controller: ControllerCalls,
        *,
        replica: str,
        start: StartView | None = None,
        label: str | None = None,
        patience_s: float = 30.0,
    ) -> None:
        """`label`: the replica in log messages; default: its id.

        `patience_s`: an adapter has failed if its image takes longer than this.
        """
        self._engine = engine
        self._controller = controller
        self._replica = replica
        self._start = start
        self._label = label or f"replica {replica}"
        self._node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        self._changed = asyncio.Event()
        self._reconciler = Reconciler(
            engine, label=self._label, patience_s=patience_s, on_change=self._changed.set
        )
        self._loop = asyncio.create_task(self._run())

    @property
    def ready(self) -> asyncio.Future[None]:
        """Done once the replica serves the first desired state; see `Reconciler.ready`."""
        return self._reconciler.ready

    async def close(self) -> None:
        self._loop.cancel()
        await asyncio.wait([self._loop])
        await self._reconciler.close()
        try:
            async with asyncio.timeout(_LEAVE_S):
                await self._controller.leave(self._replica)
        except Exception as error:  # the controller may be gone; it also notices missing reports
            logger.info(f"{self._label}: left without notice ({first_line(error)})")

    def routing_stats(self) -> RoutingStats:
        """The part of the state that routers need (`serve_app.gateway.router`)."""
        want = self._reconciler.acting_on
        return routing_stats(
            epoch=want.epoch if want else 0,
            generation=want.generation if want else 0,
            serves=[revision.key for revision in self._engine.serves],
            traffic=self._engine.traffic,
        )

    async def _run(self) -> None:
        while True:
            self._changed.clear()
            call = asyncio.create_task(self._controller.report(self._report()))
            call.add_done_callback(retrieve_exception)  # of a call that a newer report replaces
            change = asyncio.create_task(self._changed.wait())
            try:
                # a change is reported at once: the newer report ends the older call
                await asyncio.wait([call, change], return_when=asyncio.FIRST_COMPLETED)
                if not call.done():
                    continue
                await self._on_answer(call.result())
            except Exception as error:  # the loop must survive any failure of the controller
                logger.warning(
                    f"{self._label}: the controller did not answer "
                    f"({first_line(error)}); reporting again"
                )
                await asyncio.sleep(_RETRY_S)
            finally:
                change.cancel()
                if not call.done():
                    call.cancel()

    async def _on_answer(self, answer: Answer) -> None:
        if answer.introduce:
            await self._controller.join(self._replica, self._engine.slot.layout)
            return
        want, now = answer.desired, self._reconciler.acting_on
        if want is None:
            return
        if now is not None and (want.epoch, want.generation) < (now.epoch, now.generation):
            logger.warning(
                f"{self._label}: ignored desired state {want.epoch}.{want.generation}, "
                f"which is older than {now.epoch}.{now.generation}"
            )
            return
        await self._reconciler.apply(want, answer)

    def _report(self) -> Report:
        engine, reconciler, want = self._engine, self._reconciler, self._reconciler.acting_on
        assigned = want is not None and engine.default.key == want.hold
        staged = reconciler.staged
        return Report(
            replica=self._replica,
            layout=engine.slot.layout.fingerprint,
            acting_on=want,
            state=ReplicaState(
                holds=engine.default.key,
                staged=None if staged is None else staged.key,
                serving=assigned and engine.admission.is_open,
                failure=reconciler.failure,
                also_serves=tuple(revision.key for revision in engine.serves[1:]),
                refused=tuple(reconciler.refused.values()),
                traffic=None if want is None else want.traffic,
            ),
            running=engine.admission.running,
            recompiles=engine.guard.recompiles,
            limit_hits=engine.guard.limit_hits,
            last_swap=reconciler.last_swap,
            pid=os.getpid(),
            node=self._node,
            admits=engine.admission.is_open,
            lanes=engine.lanes(),
            start=self._start,
            step_id=engine.recorder.step_id,
            request_stats=copy.deepcopy(engine.recorder.request_stats),
        )
