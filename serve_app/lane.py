"""A replica's end of the control lane: report, hear what to hold, make it so, report again.

The document is level-triggered: whatever was missed, the newest one is complete. Stable work goes
first: an abort must not wait for the target's image.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

import ray
from ray.exceptions import ObjectLostError

from hotswap_lib import AdapterImage, Layout, Staged

from .engine import Engine
from .messages import Answer, Report, key
from .rollout.state import Desired, Failure
from .views import SwapView

logger = logging.getLogger("ray.serve")
Step = Callable[[str, Answer], Awaitable[None]]
_RETRY_S = 0.2
_GOODBYE_S = 1.0


class ControllerCalls(Protocol):
    """What the lane needs of the controller; in production a `DeploymentHandle` behind it."""

    async def join(self, replica: str, layout: Layout) -> None: ...
    async def report(self, report: Report) -> Answer: ...
    async def leave(self, replica: str) -> None: ...


class Lane:
    """Runs until `close`. `ready` is done once the first assigned revision is live."""

    def __init__(self, engine: Engine, controller: ControllerCalls, *, replica: str) -> None:
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._engine = engine
        self._controller = controller
        self._replica = replica
        self._node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        self._acting_on: Desired | None = None
        self._staged: Staged | None = None
        self._failure: Failure | None = None
        self._last_swap: SwapView | None = None
        self._times = (0.0, 0.0)  # fetch and stage of the last staged image, ms
        self._changed = asyncio.Event()
        self._work: asyncio.Task[None] | None = None
        self._loop = asyncio.create_task(self._run())

    async def close(self) -> None:
        self._loop.cancel()
        await asyncio.wait([self._loop])
        await self._stop_work()
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
        await self._stop_work()
        self._acting_on = want
        self._work = asyncio.create_task(self._make_so(want, answer))

    async def _stop_work(self) -> None:
        if self._work is not None and not self._work.done():
            self._work.cancel()
            await asyncio.wait([self._work])
        self._work = None

    def _report(self) -> Report:
        slot, want = self._engine.slot, self._acting_on
        assigned = want is not None and key(slot.revision) == want.hold
        return Report(
            replica=self._replica,
            layout=slot.layout.fingerprint,
            acting_on=want,
            holds=slot.revision,
            staged=None if self._staged is None else self._staged.revision,
            serving=assigned and self._engine.admission.is_open,
            failure=self._failure,
            running=self._engine.admission.running,
            recompiles=self._engine.guard.recompiles,
            limit_hits=self._engine.guard.limit_hits,
            last_swap=self._last_swap,
            pid=os.getpid(),
            node=self._node,
        )

    # ---- doing ------------------------------------------------------------------------------

    async def _make_so(self, want: Desired, answer: Answer) -> None:
        try:
            if await self._did(self._hold, want.hold, want, answer):
                self._engine.admission.open()
                self._failure = None
                if not self.ready.done():
                    self.ready.set_result(None)
            # also when nothing can be held: this may be the rollout that brings something
            if want.stage is None or want.stage == want.hold:
                self._staged = None  # its memory is free from here on
                return
            self._changed.set()
            await self._did(self._prepare, want.stage, want, answer)
        finally:
            self._changed.set()

    async def _did(self, step: Step, name: str, want: Desired, answer: Answer) -> bool:
        """Whether the step succeeded; if not, why is remembered for the next report."""
        try:
            await step(name, answer)
        except ObjectLostError as error:
            logger.warning(f"the image of {name} was lost ({_sentence(error)}); asking again")
            await asyncio.sleep(_RETRY_S)
            self._acting_on = None
        except Exception as error:  # whatever it is, the fleet must hear of it
            logger.warning(f"{name}: {_sentence(error)}")
            self._failure = Failure(
                revision=name, reason=_sentence(error), generation=want.generation
            )
            # nothing to serve, and no rollout on its way that would bring something
            if not self.ready.done() and want.stage is None:
                self.ready.set_exception(error)
        else:
            return True
        return False

    async def _hold(self, name: str, answer: Answer) -> None:
        if key(self._engine.slot.revision) != name:
            await self._commit(await self._stage(name, answer))

    async def _prepare(self, name: str, answer: Answer) -> None:
        self._staged = await self._stage(name, answer)

    async def _stage(self, name: str, answer: Answer) -> Staged:
        if self._staged is not None and key(self._staged.revision) == name:
            return self._staged
        if name in answer.refused:
            raise answer.refused[name]
        began = time.monotonic()
        image: AdapterImage = await answer.images[name]
        fetched = time.monotonic()
        staged = await asyncio.to_thread(self._engine.slot.stage, image)
        self._times = ((fetched - began) * 1e3, (time.monotonic() - fetched) * 1e3)
        return staged

    async def _commit(self, staged: Staged) -> None:
        self._changed.set()  # out of service from here on
        receipt, drain_ms, verify_ms = await self._engine.swap(staged)
        fetch_ms, stage_ms = self._times
        self._last_swap = SwapView(
            revision=str(receipt.revision),
            fetch_ms=fetch_ms,
            stage_ms=stage_ms,
            drain_ms=drain_ms,
            commit_us=receipt.commit_us,
            verify_ms=verify_ms,
            copies=receipt.copies,
            image_bytes=receipt.image_bytes,
        )
        logger.info(
            f"swapped {receipt.previous} -> {receipt.revision} in {receipt.commit_us:.0f} us"
        )


def _cause(error: BaseException) -> BaseException:
    return getattr(error, "cause", None) or error.__cause__ or error


def _sentence(error: BaseException) -> str:
    return str(_cause(error)).splitlines()[0] if str(error) else type(error).__name__
