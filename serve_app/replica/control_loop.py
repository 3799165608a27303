"""A replica's end of the control lane: report, hear what to hold, make it so, report again.

The document is level-triggered: whatever was missed, the newest one is complete. The default goes
first, then the revisions beside it, then the target of a rollout: an abort must not wait for an
image that only others need, and what fails beside the default is told and tried again, no more.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Protocol

import ray
from ray.exceptions import ObjectLostError

from hotswap_lib import Layout, Revision
from serve_app.engine.engine import Engine
from serve_app.engine.steps import Cutover
from serve_app.replica.staging import Brought, Staging
from serve_app.rollout.state import Desired, Failure, ReplicaState
from serve_app.wire.admin import StartView, SwapView
from serve_app.wire.reports import Answer, Report
from serve_app.wire.routing_stats import RoutingStats, routing_stats

logger = logging.getLogger(__name__)
Step = Callable[[str], Awaitable[None]]
_RETRY_S = 0.2
_GOODBYE_S = 1.0


class ControllerCalls(Protocol):
    """What the lane needs of the controller; in production a `DeploymentHandle` behind it."""

    async def join(self, replica: str, layout: Layout) -> None: ...
    async def report(self, report: Report) -> Answer: ...
    async def leave(self, replica: str) -> None: ...


class ControlLoop:
    """Runs until `close`.

    `ready` is done once the first assigned revision is live and those beside it have been tried.
    `patience_s`: after this long without its image, a revision beside the default has failed.
    """

    def __init__(
        self,
        engine: Engine,
        controller: ControllerCalls,
        *,
        replica: str,
        start: StartView | None = None,
        patience_s: float = 30.0,
    ) -> None:
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._engine = engine
        self._controller = controller
        self._replica = replica
        self._start = start
        self._patience_s = patience_s
        self._node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        self._acting_on: Desired | None = None
        self._answer = Answer()  # the one that the work goes by
        self._staging = Staging(engine.slot)
        self._cutting_over: tuple[str, str] | None = None  # to which revision, and how
        self._failure: Failure | None = None
        self._refused: dict[str, Failure] = {}
        self._last_swap: SwapView | None = None
        self._changed = asyncio.Event()
        self._work: asyncio.Task[None] | None = None
        self._loop = asyncio.create_task(self._run())

    async def close(self) -> None:
        self._loop.cancel()
        await asyncio.wait([self._loop])
        await self._stop_work()
        await self._staging.close()
        try:
            async with asyncio.timeout(_GOODBYE_S):
                await self._controller.leave(self._replica)
        except Exception as error:  # it may be gone before us; then it notices our silence
            logger.info(f"left without a word ({_sentence(error)})")

    # ---- talking ----------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            self._changed.clear()
            asking = asyncio.create_task(self._controller.report(self._report()))
            asking.add_done_callback(_heard)
            news = asyncio.create_task(self._changed.wait())
            try:
                # a change here must be told at once; the newer report ends the older one
                await asyncio.wait([asking, news], return_when=asyncio.FIRST_COMPLETED)
                if not asking.done():
                    continue
                await self._heed(asking.result())
            except Exception as error:  # whatever happens over there, the lane must go on asking
                logger.warning(f"the controller did not answer ({_sentence(error)}); asking again")
                await asyncio.sleep(_RETRY_S)
            finally:
                news.cancel()
                if not asking.done():
                    asking.cancel()

    async def _heed(self, answer: Answer) -> None:
        if answer.introduce:
            await self._controller.join(self._replica, self._engine.slot.layout)
            return
        want, now = answer.desired, self._acting_on
        if want is None:
            return
        if now is not None and (want.epoch, want.generation) < (now.epoch, now.generation):
            logger.warning(f"refused a document older than {now.epoch}.{now.generation}")
            return
        # a drain that starts over would let requests in again, and so might never end
        if self._cutting_over != (want.hold, want.in_flight):
            await self._stop_work()
        self._acting_on, self._answer = want, answer
        self._engine.apply_traffic(want.traffic)
        self._refused.clear()  # those that are still wanted are tried again now
        if self._work is None:
            self._work = asyncio.create_task(self._make_so())

    async def _stop_work(self) -> None:
        if self._work is not None and not self._work.done():
            self._work.cancel()
            await asyncio.wait([self._work])
        self._work = None

    def _report(self) -> Report:
        engine, want = self._engine, self._acting_on
        assigned = want is not None and engine.default.key == want.hold
        staged = self._staged()
        return Report(
            replica=self._replica,
            layout=engine.slot.layout.fingerprint,
            acting_on=want,
            state=ReplicaState(
                holds=engine.default.key,
                staged=None if staged is None else staged.key,
                serving=assigned and engine.admission.is_open,
                failure=self._failure,
                also_serves=tuple(revision.key for revision in engine.serves[1:]),
                refused=tuple(self._refused.values()),
                traffic=None if want is None else want.traffic,
            ),
            running=engine.admission.running,
            recompiles=engine.guard.recompiles,
            limit_hits=engine.guard.limit_hits,
            last_swap=self._last_swap,
            pid=os.getpid(),
            node=self._node,
            admits=engine.admission.is_open,
            lanes=engine.lanes(),
            start=self._start,
            step_id=engine.recorder.step_id,
            request_stats=copy.deepcopy(engine.recorder.request_stats),
        )

    def routing_stats(self) -> RoutingStats:
        """For those who route requests (`serve_app.gateway.router`)."""
        want = self._acting_on
        return routing_stats(
            epoch=want.epoch if want else 0,
            generation=want.generation if want else 0,
            serves=[revision.key for revision in self._engine.serves],
            traffic=self._engine.traffic,
        )

    def _staged(self) -> Revision | None:
        want = self._answer.desired
        if want is None or want.stage in (None, self._engine.default.key):
            return None
        return self._staging.revision(str(want.stage))

    # ---- doing ------------------------------------------------------------------------------

    @property
    def _want(self) -> Desired:
        assert self._answer.desired is not None
        return self._answer.desired

    async def _make_so(self) -> None:
        try:
            self._free_unnamed()
            held = await self._did(self._hold, self._want.hold)
            want = self._want  # a newer one may have come during the cutover
            if held:
                self._engine.admission.open()
                self._failure = None
            self._free_unnamed()
            await self._serve_beside(want)
            if held and not self.ready.done():
                self.ready.set_result(None)
            # also when nothing can be held: this may be the rollout that brings something
            if want.stage not in (None, want.hold):
                self._changed.set()
                await self._did(self._prepare, str(want.stage))
        finally:
            self._changed.set()

    def _free_unnamed(self) -> None:
        want = self._want
        names = {self._engine.default.key, want.hold, want.stage, *want.also_serves} - {None}
        self._staging.keep_only({str(name) for name in names})

    async def _did(self, step: Step, name: str) -> bool:
        """Whether the step succeeded; if not, why is remembered for the next report."""
        try:
            await step(name)
        except ObjectLostError as error:
            logger.warning(f"the image of {name} was lost ({_sentence(error)}); asking again")
            await asyncio.sleep(_RETRY_S)
            self._acting_on = None
        except Exception as error:  # whatever it is, the fleet must hear of it
            logger.warning(f"{name}: {_sentence(error)}")
            self._failure = self._failed(name, _sentence(error))
            # nothing to serve, and no rollout on its way that would bring something
            if not self.ready.done() and self._want.stage is None:
                self.ready.set_exception(error)
        else:
            return True
        return False

    def _failed(self, name: str, reason: str) -> Failure:
        return Failure(revision=name, reason=reason, generation=self._want.generation)

    async def _hold(self, name: str) -> None:
        """The default revision."""
        before = self._engine.default
        if (default := before.key) == name:
            return
        brought = await self._staging.bring(name, self._answer)
        if (
            default in self._want.also_serves
        ):  # before it is the default no more: no moment without it
            await self._serve(default)
        self._changed.set()  # out of service from here on
        self._cutting_over = name, self._want.in_flight
        try:
            cutover = await self._engine.cut_over(brought.staged, in_flight=self._want.in_flight)
        finally:
            self._cutting_over = None
        self._last_swap = _swap_view(brought, cutover, in_flight=self._want.in_flight)
        logger.info(
            f"swapped {before} -> {brought.staged.revision} in {cutover.receipt.commit_us:.0f} us"
        )

    async def _prepare(self, name: str) -> None:
        """The target of a rollout, next to the weights."""
        await self._staging.bring(name, self._answer)

    async def _serve_beside(self, want: Desired) -> None:
        here = {one.key for one in self._engine.serves}
        missing = [name for name in want.also_serves if name not in here]
        if missing:
            self._changed.set()  # the default is in service, whatever becomes of these
        async with asyncio.TaskGroup() as group:  # at once: one that is slow must not hold up all
            for name in missing:
                group.create_task(self._serve(name))
        # last, so that one that takes another's name leaves no moment without it
        for revision in self._engine.serves[1:]:
            if revision.key not in want.also_serves:
                self._engine.remove(revision)

    async def _serve(self, name: str) -> None:
        """One revision beside the default; a failure is its own and disturbs nobody."""
        try:
            async with asyncio.timeout(self._patience_s):
                brought = await self._staging.bring(name, self._answer)
            await self._engine.add(brought.staged)
        except TimeoutError:
            self._refuse(name, f"its image did not come within {self._patience_s:g} s")
        except Exception as error:  # whatever it is, the fleet must hear of it
            self._refuse(name, _sentence(error))

    def _refuse(self, name: str, reason: str) -> None:
        logger.warning(f"{name}: {reason}")
        self._refused[name] = self._failed(name, reason)
        self._staging.forget(name)


def _heard(asking: asyncio.Task[Answer]) -> None:
    """Nobody waits for a report that a newer one has replaced, whatever became of it."""
    if not asking.cancelled():
        asking.exception()


def _swap_view(brought: Brought, cutover: Cutover, *, in_flight: str) -> SwapView:
    receipt = cutover.receipt
    return SwapView(
        revision=str(receipt.revision),
        in_flight=in_flight,
        fetch_ms=brought.fetch_ms,
        stage_ms=brought.stage_ms,
        drain_ms=cutover.drain_ms,
        commit_us=receipt.commit_us,
        verify_ms=cutover.verify_ms,
        copies=receipt.copies,
        image_bytes=receipt.image_bytes,
    )


def _cause(error: BaseException) -> BaseException:
    return getattr(error, "cause", None) or error.__cause__ or error


def _sentence(error: BaseException) -> str:
    return str(_cause(error)).splitlines()[0] if str(error) else type(error).__name__
