"""The controller's end of the control lane: reports come in, documents with images go out.

It feeds events to the pure rollout machine, has the new intent journaled, then answers the
replicas' open reports. A replica that is silent for too long has left.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from hotswap_lib import HotswapError, Layout

from .images import AdapterStore, ImageShelf, ImageUnavailable, Put
from .intent import Intent
from .journal import Journal
from .messages import Answer, Report, from_key, key
from .open_reports import OpenReport, OpenReports
from .rollout.events import Event, Left, Reported, Ticked
from .rollout.machine import desired, silent
from .rollout.state import Desired, Fleet
from .settings import Settings

logger = logging.getLogger("ray.serve")
T = TypeVar("T")
_TICK_S = 0.25


class Dispatch:
    """What replicas call, over one intent and one shelf of images. For one event loop."""

    def __init__(self, settings: Settings, *, state_uri: str, put: Put) -> None:
        self._settings = settings
        self._journal = Journal(state_uri)
        self._store = AdapterStore(state_uri)
        self._shelf = ImageShelf(self._store, put=put)
        self._intent = Intent(self._journal, declared=settings.adapter)
        self._reports = OpenReports()
        self._under_way: set[asyncio.Task[Any]] = set()

    @property
    def _fleet(self) -> Fleet:
        return self._intent.fleet

    async def join(self, replica: str, layout: Layout) -> None:
        """A replica introduces its layout, so that images can be packed for it."""
        self._shelf.add_layout(layout)
        logger.info(f"replica {replica} joined with layout {layout.fingerprint[:8]}")

    async def report(self, report: Report) -> Answer:
        """Hear what a replica holds; answer when what it shall hold changes, or after `poll_s`."""
        if not self._shelf.knows(report.layout):
            return Answer(introduce=True)
        line = self._reports.open(report)
        if report.acting_on is not None:
            await self._intent.outrank(report.acting_on.epoch)
        await self._feed(
            Reported(
                replica=report.replica,
                holds=key(report.holds),
                staged=None if report.staged is None else key(report.staged),
                serving=report.serving,
                failure=report.failure,
                beside=tuple(map(key, report.beside)),
                at=time.time(),
            )
        )
        if not self._has_news(line):
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.poll_s):
                    await line.changed.wait()
        want = desired(self._fleet, report.replica)
        # it could not do what it shall: have it try again, at the pace of its reports
        if not self._has_news(line) and not _failed(report, want):
            return Answer()
        line.told = want
        return await self._with_images(want, report.layout)

    async def leave(self, replica: str) -> None:
        """A replica stops on purpose; nobody needs to wait for its silence."""
        if replica in self._fleet.observed:
            await self._feed(Left(replica=replica, at=time.time()))

    # ---- inside -----------------------------------------------------------------------------

    async def _with_images(self, want: Desired, layout: str) -> Answer:
        answer = Answer(desired=want)
        for name in {name for name in (want.hold, want.stage) if name is not None}:
            try:
                answer.images[name] = await self._shelf.get(from_key(name), layout)
            except HotswapError as error:
                answer.refused[name] = error
        for name in want.beside:
            try:
                answer.images[name] = await self._shelf.get(from_key(name), layout)
            except HotswapError as error:
                answer.refused[name] = error
            except Exception as error:  # it must not keep the default from its replica
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                answer.refused[name] = ImageUnavailable(str(from_key(name)), why)
        return answer

    async def _see_through(self, work: Coroutine[Any, Any, T]) -> T:
        """To the end, also when the caller goes away in the middle of it."""
        task = asyncio.create_task(work)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return await asyncio.shield(task)

    async def _feed(self, event: Event) -> None:
        await self._see_through(self._decide(event))

    async def _decide(self, event: Event) -> None:
        """Advance, journal when the intent changed, then ring the replicas that it concerns."""
        after = await self._intent.decide(event)
        self._shelf.keep_only(self._intent.needed())
        for name, line in self._reports.items():
            observed = after.observed.get(name)
            # gone, or sent out and called back before it heard of either: have it say where it is
            if self._has_news(line) or observed is None or observed.outdated:
                line.changed.set()
        if isinstance(event, Left):
            self._reports.close(event.replica)
        self._reports.wake()

    def _has_news(self, line: OpenReport) -> bool:
        """Whether the replica acts on something else than what it shall do."""
        want, has = desired(self._fleet, line.report.replica), line.report.acting_on
        return has is None or _content(has) != _content(want)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            try:
                await self._look(at=time.time())
            except Exception as error:  # a journal out of reach must not end deadlines for good
                logger.warning(f"could not decide, trying again: {error}")

    async def _look(self, *, at: float) -> None:
        """Who was silent for too long, and what time does to a rollout."""
        for replica in silent(self._fleet, at=at, after_s=self._settings.silence_s):
            logger.warning(f"replica {replica} was silent for {self._settings.silence_s:g} s")
            await self._feed(Left(replica=replica, at=at))
        if self._fleet.running is not None:
            await self._feed(Ticked(at=at))


def _content(want: Desired) -> Desired:
    """What a replica acts on; a new generation that changes nothing for it is no news."""
    return replace(want, generation=0)


def _failed(report: Report, want: Desired) -> bool:
    """Whether something that it shall serve is missing because it could not bring it there."""
    failures = [*report.refused, *([] if report.failure is None else [report.failure])]
    return any(failure.revision in (want.hold, *want.beside) for failure in failures)
