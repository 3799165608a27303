"""Takes events to the rollout machine, and answers the reports that a decision concerns.

Reports that come while a decision is written to the journal are decided on together. A controller
that was replaced (fenced) rejects every call from then on, so that callers reach its successor.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from serve_app.controller.background import BackgroundTasks
from serve_app.controller.desired_state import DesiredState
from serve_app.controller.images import ImageShelf
from serve_app.controller.open_reports import OpenReports
from serve_app.controller.retention import AdapterRetention
from serve_app.rollout.events import Event, Left, ReportBatch, Reported
from serve_app.wire.errors import Fenced

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Batch:
    """Reports that wait for a decision, and the task that will make it."""

    reports: list[Reported]
    decision: asyncio.Task[None]


class Decisions:
    """One decision at a time: advance, journal, then answer the reports. For one event loop."""

    def __init__(
        self,
        desired_state: DesiredState,
        reports: OpenReports,
        *,
        shelf: ImageShelf,
        retention: AdapterRetention,
        tasks: BackgroundTasks,
    ) -> None:
        self._desired_state = desired_state
        self._reports = reports
        self._shelf = shelf
        self._retention = retention
        self._tasks = tasks
        self._fenced: Fenced | None = None
        self._batch: _Batch | None = None
        self._deciding = asyncio.Lock()

    @property
    def is_fenced(self) -> bool:
        return self._fenced is not None

    def check_fenced(self) -> None:
        """Raises `Fenced` if another controller has taken over."""
        if self._fenced is not None:
            raise self._fenced.with_traceback(None)

    async def decide(self, event: Event) -> None:
        """Takes the event to the machine, and goes on if the caller is cancelled.

        Raises:
            IllegalEvent, GenerationMismatch: the machine refuses the event.
            Fenced: another controller has taken over.
            OSError: the journal cannot be written; nothing has changed.
        """
        await self._tasks.complete(self._decide(event))

    async def queue_report(self, event: Reported) -> None:
        """Decides on the report, together with others that come before the decision begins."""
        if self._batch is None:
            self._batch = _Batch([], self._tasks.start(self._decide_on_batch()))
        self._batch.reports.append(event)
        await asyncio.shield(self._batch.decision)

    def discard_reports(self, replica: str) -> None:
        """Drops queued reports of a replica that has left, so that they do not bring it back."""
        if self._batch is not None:
            self._batch.reports = [one for one in self._batch.reports if one.replica != replica]

    async def rebuild_from_replicas(self) -> None:
        """Takes over what the replicas act on, if the journal does not explain it.

        Raises `Fenced` if another controller decided it.
        """
        await self._tasks.complete(self._rebuild())

    # ---- inside -----------------------------------------------------------------------------

    async def _decide_on_batch(self) -> None:
        async with self._deciding:  # while a decision is written down, more reports come
            batch, self._batch = self._batch, None
            assert batch is not None
            await self._decide(ReportBatch(reports=tuple(batch.reports), at=time.time()))

    async def _rebuild(self) -> None:
        # now, not before: reports that came meanwhile count
        documents = {
            name: report.acting_on
            for name, report in self._reports.last().items()
            if report.acting_on is not None
        }
        with self._fencing():
            changed = await self._desired_state.rebuild(documents)
        if changed:
            self._reports.answer_all()

    async def _decide(self, event: Event) -> None:
        self.check_fenced()
        with self._fencing():
            after = await self._desired_state.decide(event)
        self._shelf.keep_only(self._desired_state.needed())
        self._retention.update(at=event.at)
        for name, one in self._reports.items():
            observed = after.observed.get(name)
            # outdated: sent elsewhere and called back before it knew; its report is needed again
            gone_or_outdated = observed is None or observed.outdated
            if gone_or_outdated or one.differs_from(self._desired_state.document(name)):
                one.changed.set()
        if isinstance(event, Left):
            self._reports.close(event.replica)
        self._reports.notify()

    @contextmanager
    def _fencing(self) -> Iterator[None]:
        """Remembers that this controller was replaced, and ends every open report."""
        try:
            yield
        except Fenced as fenced:
            logger.warning(str(fenced))
            self._fenced = fenced
            self._reports.answer_all()
            raise
