"""Batches: requests for the same revision run together, in one thread, on that revision.

`serve.batch` collects requests for up to `batch_wait_s`; the collected requests join one FIFO queue
for the model thread. Requests that arrive while the model is busy leave the queue in the largest
batches allowed, not in the small ones in which they arrived.
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
from serve_app.async_tasks import retrieve_exception
from serve_app.engine.engine import Engine, Ticket
from serve_app.settings import Settings
from serve_app.wire.admin import LaneView
from serve_app.wire.errors import EngineStopped, GenerationFailed

logger = logging.getLogger(__name__)


class Job:
    """One row of a batch.

    Attributes:
        done: its result or exception, set once the model thread has finished with it.
        taken: it has left the queue for the model thread.
        cancelled: its caller is gone; the model thread may stop generating for it.
    """

    def __init__(self, revision: Revision) -> None:
        self.revision = revision
        self.taken = False
        self.cancelled = False
        self.done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.done.add_done_callback(retrieve_exception)

    def finish(self, outcome: Any) -> None:
        """Sets the result, or the exception to raise for its caller. Later calls do nothing."""
        if self.done.done():
            return
        if isinstance(outcome, BaseException):
            self.done.set_exception(outcome)
        else:
            self.done.set_result(outcome)


J = TypeVar("J", bound=Job)


class BatchEngine(Engine, Generic[J]):
    """One model thread, one queue of jobs.

    `alive` is False after `stop()` or after the model thread has died. `serve.batch` needs the
    context of a Serve replica.
    """

    def __init__(self, slot: Slot, settings: Settings) -> None:
        super().__init__(slot, settings)
        self._enter = serve.batch(
            max_batch_size=settings.max_batch_size, batch_wait_timeout_s=settings.batch_wait_s
        )(self._enqueue)
        self._queue: deque[J] = deque()
        self._runner: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._stopped = False

    # ---- for subclasses -----------------------------------------------------------------------

    @abstractmethod
    def _run(self, jobs: Sequence[J]) -> Sequence[Any]:
        """One result for each job. In the model thread, with their revision in the weights."""

    @abstractmethod
    def _run_every_shape(self) -> None:
        """Runs every shape class, so that everything is compiled. In the model thread."""

    # ---- start and stop -----------------------------------------------------------------------

    def start(self) -> None:
        """Does nothing: the model thread starts with its first work."""

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
            for revision, running in self.revisions.running.items()
        )

    @property
    def queued(self) -> int:
        """Jobs that wait for the model thread."""
        return len(self._queue)

    # ---- one job ------------------------------------------------------------------------------

    async def _result(self, ticket: Ticket, job: J) -> Any:
        """Runs the job in a batch. Raises `GenerationFailed` or `EngineStopped`.

        When the caller is cancelled, the job is not run, or stopped. The request counts as
        running until then.
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
        job.cancelled = True  # also keeps it out of the queue if it is not there yet
        if job in self._queue:
            self._queue.remove(job)
        elif job.taken:
            ticket.cancelling.add(asyncio.create_task(_over(job)))

    # ---- the queue ----------------------------------------------------------------------------

    async def _enqueue(self, jobs: list[J]) -> list[None]:
        """Appends collected requests to the queue and returns at once.

        So `serve.batch` never waits for the model.
        """
        self._queue.extend(job for job in jobs if not job.cancelled)
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run_queue())
        return [None] * len(jobs)

    async def _run_queue(self) -> None:
        while self._queue:
            jobs = self._next_batch()
            try:
                outcomes = await self._outcomes(jobs)
            except asyncio.CancelledError:
                raise
            except BaseException:
                logger.exception("the model thread has failed")
                self._stopped = True
                outcomes = [EngineStopped() for _ in jobs]
            for job, outcome in zip(jobs, outcomes, strict=True):
                job.finish(outcome)

    def _next_batch(self) -> list[J]:
        """The job that has waited longest, and the next ones of the same revision."""
        revision = self._queue[0].revision
        same = [job for job in self._queue if job.revision == revision]
        jobs = same[: self.settings.max_batch_size]
        for job in jobs:
            job.taken = True
        self._queue = deque(job for job in self._queue if not job.taken)
        return jobs

    async def _outcomes(self, jobs: Sequence[J]) -> list[Any]:
        if not self.alive:
            return [EngineStopped() for _ in jobs]
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._run_batch, jobs)

    # ---- in the model thread ------------------------------------------------------------------

    def _warm_up(self) -> None:
        with self.weight_lock.on(self.slot.revision), torch.no_grad():
            self._run_every_shape()

    def _run_batch(self, jobs: Sequence[J]) -> list[Any]:
        with self.weight_lock.on(jobs[0].revision), torch.no_grad():
            return self._run_or_split(jobs)

    def _run_or_split(self, jobs: Sequence[J]) -> list[Any]:
        """Runs the jobs; if the model raises, each one alone, so that only the bad one fails."""
        try:
            return list(self._run(jobs))
        except torch.AcceleratorError:  # the device is lost, for all later jobs as well
            raise
        except Exception as error:
            if len(jobs) > 1:
                return [outcome for job in jobs for outcome in self._run_or_split([job])]
            logger.exception("a request made the model fail")
            return [GenerationFailed(str(error) or type(error).__name__)]


async def _over(job: Job) -> None:
    await asyncio.wait([job.done])
