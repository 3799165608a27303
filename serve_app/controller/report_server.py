"""The controller's end of the control lane: reports come in, documents with images go out.

Each report is a long poll. It is answered when the replica's desired state changes, and after
`poll_s` at the latest. A replica that does not report for `silence_s` has left the fleet.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import replace

from hotswap_lib import HotswapError, Layout, Revision
from serve_app.controller.canary_stats import CanaryStats
from serve_app.controller.core import Core
from serve_app.controller.open_reports import OpenReport
from serve_app.rollout.events import Left, Reported
from serve_app.rollout.machine import silent
from serve_app.rollout.state import Desired
from serve_app.wire.errors import ImageUnavailable
from serve_app.wire.reports import Answer, Report

logger = logging.getLogger(__name__)


class ReportServer:
    """The calls that replicas make. For one event loop."""

    def __init__(
        self,
        core: Core,
        *,
        canary_stats: CanaryStats,
        poll_s: float,
        silence_s: float,
    ) -> None:
        self._desired_state = core.desired_state
        self._decisions = core.decisions
        self._reports = core.reports
        self._shelf = core.shelf
        self._canary_stats = canary_stats
        self._poll_s = poll_s
        self._silence_s = silence_s

    async def join(self, replica: str, layout: Layout) -> None:
        """Stores the layout of a replica, so that images can be packed for it."""
        self._shelf.add_layout(layout)
        logger.info(f"replica {replica} joined with layout {layout.fingerprint[:8]}")

    async def report(self, report: Report) -> Answer:
        """Stores a report; returns when the replica's desired state changes, or after `poll_s`."""
        self._decisions.check_fenced()
        if not self._shelf.knows(report.layout):
            return Answer(introduce=True)
        opened = self._reports.open(report)
        self._canary_stats.add(report)
        acting_on = report.acting_on
        if acting_on is not None and not self._desired_state.explains(acting_on):
            await self._decisions.rebuild_from_replicas()
        event = Reported(replica=report.replica, state=report.state, at=time.time())
        await self._decisions.queue_report(event)
        if not self._is_news(opened):
            with suppress(TimeoutError):
                async with asyncio.timeout(self._poll_s):
                    await opened.changed.wait()
        self._decisions.check_fenced()
        want = self._desired_state.document(report.replica)
        # after a failure the same document is sent again, once per report
        if not self._is_news(opened) and not _failed(report, want):
            return Answer()
        opened.answered = want
        return await self._answer(want, report.layout)

    async def leave(self, replica: str) -> None:
        """A replica stops on purpose."""
        self._decisions.discard_reports(replica)
        if replica in self._desired_state.fleet.observed:
            await self._decisions.decide(Left(replica=replica, at=time.time()))

    async def drop_silent(self, *, at: float) -> None:
        """Replicas without a report for `silence_s` leave the fleet."""
        for replica in silent(self._desired_state.fleet, at=at, after_s=self._silence_s):
            logger.warning(f"replica {replica} was silent for {self._silence_s:g} s")
            await self._decisions.decide(Left(replica=replica, at=at))

    # ---- inside -----------------------------------------------------------------------------

    def _is_news(self, opened: OpenReport) -> bool:
        return opened.differs_from(self._desired_state.document(opened.report.replica))

    async def _answer(self, want: Desired, layout: str) -> Answer:
        """The document with its images. What cannot be had is in `refused`, with the reason."""
        answer = Answer(desired=replace(want, sources=self._sources(want)))
        for key in {key for key in (want.hold, want.stage) if key is not None}:
            await self._add_image(answer, key, layout)
        for key in want.also_serves:
            try:
                await self._add_image(answer, key, layout)
            except Exception as error:  # the replica must get its default all the same
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                answer.refused[key] = ImageUnavailable(str(Revision.parse(key)), why)
        return answer

    async def _add_image(self, answer: Answer, key: str, layout: str) -> None:
        try:
            answer.images[key] = await self._shelf.get(Revision.parse(key), layout)
        except HotswapError as error:
            answer.refused[key] = error

    def _sources(self, want: Desired) -> tuple[tuple[str, str], ...]:
        """The sources of the adapters, for a controller that has lost its journal."""
        named = {key: self._desired_state.sources.get(key) for key in (want.stable, *want.loaded)}
        return tuple((key, source) for key, source in named.items() if source is not None)


def _failed(report: Report, want: Desired) -> bool:
    """Returns True if the replica failed to bring something that the document asks for."""
    wanted = {want.hold, *want.also_serves, *([] if want.stage is None else [want.stage])}
    return any(report.state.failures_of(revision) for revision in wanted)
