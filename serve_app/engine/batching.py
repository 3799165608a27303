"""Batches: what asks for the same revision runs together, in one thread, on that revision.

`serve.batch` is the waiting room: whoever comes first waits there a moment for others. Behind it is
one line for the model. What arrives while that is busy leaves it in the largest batches allowed,
not in the small ones in which it came.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch
from ray import serve

from hotswap_lib import Revision, Slot
from serve_app.engine.engine import Engine, Ticket
from serve_app.settings import Settings
from serve_app.wire.admin import LaneView
from serve_app.wire.errors import EngineStopped, GenerationFailed

logger = logging.getLogger(__name__)


class Job:
    """One row of some batch.

    Attributes:
        done: what came of it, as soon as the engine has let go of it.
        taken: it is out of the line, and in the hands of the thread until it is done.
        cancelled: nobody waits for it any more; whoever runs it may stop.
    """

    def __init__(self, revision: Revision) -> None:
        self.revision = revision
        self.taken = False
        self.cancelled = False
        self.done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.done.add_done_callback(_seen)

    def finish(self, outcome: Any) -> None:
        """Only the first time. An exception is raised for whoever waits."""
        if self.done.done():
            return
        if isinstance(outcome, BaseException):
            self.done.set_exception(outcome)
        else:
            self.done.set_result(outcome)


J = TypeVar("J", bound=Job)


class BatchEngine(Engine, Generic[J]):
    """One thread, one line of jobs. `alive` until stopped, or until the thread meets its end.

    Needs the context of a Serve replica, as everything that `serve.batch` makes does.
    """

    def __init__(self, slot: Slot, settings: Settings) -> None:
        super().__init__(slot, settings)
        self._enter = serve.batch(
            max_batch_size=settings.max_batch_size, batch_wait_timeout_s=settings.batch_wait_s
        )(self._line_up)
        self._line: deque[J] = deque()
        self._in_line: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._stopped = False

    # ---- what such an engine must do ----------------------------------------------------------

    @abstractmethod
    def _run(self, jobs: Sequence[J]) -> Sequence[Any]:
        """One result for each job. In the thread, with their revision in the weights."""

    @abstractmethod
    def _run_every_shape(self) -> None:
        """Whatever compiles, compiles now. In the thread."""

    # ---- life ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Nothing yet: the thread begins with its first work."""

    def stop(self) -> None:
        self._stopped = True
        self._thread.shutdown()

    @property
    def alive(self) -> bool:
        return not self._stopped

    async def warm_up(self) -> float:
        began = time.monotonic()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._warm_up)
        self.guard.arm()
        return time.monotonic() - began

    def lanes(self) -> tuple[LaneView, ...]:
        return tuple(
            LaneView(revision=str(revision), running=running)
            for revision, running in self._running.items()
            if running > 0
        )

    # ---- one job ------------------------------------------------------------------------------

    async def _result(self, ticket: Ticket, job: J) -> Any:
        """Run it in some batch. Raises `GenerationFailed` or `EngineStopped`.

        Cancelled, it is not run, or stopped, and the ticket stays inside until that is so.
        """
        if not self.alive:
            raise EngineStopped
        try:
            await self._enter(job)
            return await asyncio.shield(job.done)
        finally:
            if not job.done.done():
                self._withdraw(ticket, job)

    def _withdraw(self, ticket: Ticket, job: J) -> None:
        job.cancelled = True  # also keeps it out of the line if it is not there yet
        if job in self._line:
            self._line.remove(job)
        elif job.taken:
            ticket.leaving.add(asyncio.create_task(_over(job)))

    # ---- the line -----------------------------------------------------------------------------

    async def _line_up(self, jobs: list[J]) -> list[None]:
        """Out of the waiting room, which closes for nobody: it never waits for the model."""
        self._line.extend(job for job in jobs if not job.cancelled)
        if self._in_line is None or self._in_line.done():
            self._in_line = asyncio.create_task(self._run_line())
        return [None] * len(jobs)

    async def _run_line(self) -> None:
        while self._line:
            jobs = self._next_batch()
            try:
                outcomes = await self._outcomes(jobs)
            except asyncio.CancelledError:
                raise
            except BaseException:
                logger.exception("the thread that runs the model has failed")
                self._stopped = True
                outcomes = [EngineStopped() for _ in jobs]
            for job, outcome in zip(jobs, outcomes, strict=True):
                job.finish(outcome)

    def _next_batch(self) -> list[J]:
        """Whoever has waited longest, and those behind who want the same revision."""
        revision = self._line[0].revision
        same = [job for job in self._line if job.revision == revision]
        jobs = same[: self.settings.max_batch_size]
        for job in jobs:
            job.taken = True
        self._line = deque(job for job in self._line if not job.taken)
        return jobs

    async def _outcomes(self, jobs: Sequence[J]) -> list[Any]:
        if not self.alive:
            return [EngineStopped() for _ in jobs]
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._run_turn, jobs)

    # ---- in the thread ------------------------------------------------------------------------

    def _warm_up(self) -> None:
        with self.weight_lock.on(self.slot.revision), torch.no_grad():
            self._run_every_shape()

    def _run_turn(self, jobs: Sequence[J]) -> list[Any]:
        with self.weight_lock.on(jobs[0].revision), torch.no_grad():
            return self._run_or_part(jobs)

    def _run_or_part(self, jobs: Sequence[J]) -> list[Any]:
        """A job that makes the model raise must not fail its neighbours: then each runs alone."""
        try:
            return list(self._run(jobs))
        except torch.AcceleratorError:  # the device is lost, for every job to come as well
            raise
        except Exception as error:
            if len(jobs) > 1:
                return [outcome for job in jobs for outcome in self._run_or_part([job])]
            logger.exception("the model has failed on a request")
            return [GenerationFailed(str(error) or type(error).__name__)]


async def _over(job: Job) -> None:
    await asyncio.wait([job.done])


def _seen(done: asyncio.Future[Any]) -> None:
    """Whoever waited for it may be gone, and asyncio complains about errors that nobody read."""
    if not done.cancelled():
        done.exception()
