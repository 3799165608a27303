"""The controller's end of the control lane: reports come in, documents with images go out.

It feeds events to the pure rollout machine, has the new intent journaled, then answers the
replicas' open reports. A replica that is silent for too long has left.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import Any, TypeVar

from hotswap_lib import HotswapError, Layout, Revision
from serve_app.controller.canary_stats import CanaryStats
from serve_app.controller.desired_state import Check, DesiredState, known
from serve_app.controller.images import AdapterStore, ImageShelf, Put
from serve_app.controller.journal import Journal
from serve_app.controller.open_reports import OpenReport, OpenReports
from serve_app.rollout.documents import Documents
from serve_app.rollout.events import Event, Heard, Left, Reported, Ticked
from serve_app.rollout.machine import silent
from serve_app.rollout.state import Desired, Fleet
from serve_app.settings import Settings
from serve_app.wire.errors import Fenced, ImageUnavailable
from serve_app.wire.reports import Answer, Report

logger = logging.getLogger(__name__)
T = TypeVar("T")
_TICK_S = 0.25
_ACTED_ON = attrgetter(
    *(each.name for each in fields(Desired) if each.name not in ("generation", "sources"))
)
GRACE_S = 300.0  # longer than anything that brings an adapter back takes to fail


class ReportServer:
    """What replicas call, over one intent and one shelf of images. For one event loop."""

    def __init__(
        self, settings: Settings, *, state_uri: str, put: Put, grace_s: float = GRACE_S
    ) -> None:
        self._settings = settings
        self._journal = Journal(state_uri)
        self._store = AdapterStore(state_uri)
        self._shelf = ImageShelf(self._store, put=put)
        self._desired_state = DesiredState(self._journal, declared=settings.adapter)
        self._reports = OpenReports()
        self._canary_stats = CanaryStats()
        self._fenced: Fenced | None = None
        self._inbox: _Inbox | None = None
        self._documents: Documents | None = None
        self._deciding = asyncio.Lock()
        self._under_way: set[asyncio.Task[Any]] = set()
        self._grace_s = grace_s
        self._kept: set[str] = set()  # digests of adapters that somebody could name
        self._forgotten: dict[str, float] = {}  # digest → since when nobody can

    @property
    def _fleet(self) -> Fleet:
        return self._desired_state.fleet

    async def join(self, replica: str, layout: Layout) -> None:
        """A replica introduces its layout, so that images can be packed for it."""
        self._shelf.add_layout(layout)
        logger.info(f"replica {replica} joined with layout {layout.fingerprint[:8]}")

    async def report(self, report: Report) -> Answer:
        """Hear what a replica holds; answer when what it shall hold changes, or after `poll_s`."""
        self._check_fenced()
        if not self._shelf.knows(report.layout):
            return Answer(introduce=True)
        line = self._reports.open(report)
        self._canary_stats.hear(report)
        if report.acting_on is not None and not self._desired_state.knows(report.acting_on):
            await self._see_through(self._learn())
        await self._hear(Reported(replica=report.replica, state=report.state, at=time.time()))
        if not self._has_news(line):
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.poll_s):
                    await line.changed.wait()
        self._check_fenced()
        want = self._desired(report.replica)
        # it could not do what it shall: have it try again, at the pace of its reports
        if not self._has_news(line) and not _failed(report, want):
            return Answer()
        line.told = want
        named = {
            name: self._desired_state.sources.get(name) for name in (want.stable, *want.loaded)
        }
        sources = tuple((name, where) for name, where in named.items() if where is not None)
        return await self._with_images(replace(want, sources=sources), report.layout)

    async def leave(self, replica: str) -> None:
        """A replica stops on purpose; nobody needs to wait for its silence."""
        if self._inbox is not None:  # what it said before comes too late to bring it back
            self._inbox.reports = [one for one in self._inbox.reports if one.replica != replica]
        if replica in self._fleet.observed:
            await self._feed(Left(replica=replica, at=time.time()))

    # ---- inside -----------------------------------------------------------------------------

    async def _with_images(self, want: Desired, layout: str) -> Answer:
        answer = Answer(desired=want)
        for name in {name for name in (want.hold, want.stage) if name is not None}:
            try:
                answer.images[name] = await self._shelf.get(Revision.parse(name), layout)
            except HotswapError as error:
                answer.refused[name] = error
        for name in want.also_serves:
            try:
                answer.images[name] = await self._shelf.get(Revision.parse(name), layout)
            except HotswapError as error:
                answer.refused[name] = error
            except Exception as error:  # it must not keep the default from its replica
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                answer.refused[name] = ImageUnavailable(str(Revision.parse(name)), why)
        return answer

    async def _see_through(self, work: Coroutine[Any, Any, T]) -> T:
        """To the end, also when the caller goes away in the middle of it."""
        return await asyncio.shield(self._begin_work(work))

    def _begin_work(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._under_way.add(task)  # the event loop alone would let go of it
        task.add_done_callback(self._under_way.discard)
        return task

    async def _hear(self, event: Reported) -> None:
        """Decide upon it, together with the others that come until the decision is begun."""
        if self._inbox is None:
            self._inbox = _Inbox([], self._begin_work(self._empty_inbox()))
        self._inbox.reports.append(event)
        await asyncio.shield(self._inbox.read)

    async def _empty_inbox(self) -> None:
        async with self._deciding:  # while a decision is written down, more reports come
            inbox, self._inbox = self._inbox, None
            assert inbox is not None
            await self._decide(Heard(reports=tuple(inbox.reports), at=time.time()))

    async def _feed(self, event: Event, *, check: Check | None = None) -> None:
        await self._see_through(self._decide(event, check=check))

    async def _learn(self) -> None:
        """A replica acts on what another controller has decided, or one whose journal is lost."""
        documents = {
            name: report.acting_on
            for name, report in self._reports.last().items()
            if report.acting_on is not None
        }
        with self._leaving_if_fenced():
            learnt = await self._desired_state.learn(documents)
        if learnt:
            self._reports.ring()

    @contextmanager
    def _leaving_if_fenced(self) -> Iterator[None]:
        """Whoever was replaced answers nobody, so that replicas and users find the other one."""
        try:
            yield
        except Fenced as fenced:
            logger.warning(str(fenced))
            self._fenced = fenced
            self._reports.ring()
            raise

    async def _fresh(self, timeout_s: float) -> None:
        """Have every replica report once more; whoever does not in time is not waited for."""
        before = self._reports.of(self._fleet.observed)
        self._reports.ring()

        def heard() -> bool:
            now = self._reports.of(before)
            return all(now[name] is not line for name, line in before.items())

        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._reports.until(heard)

    def _check_fenced(self) -> None:
        if self._fenced is not None:
            raise self._fenced.with_traceback(None)

    async def _decide(self, event: Event, *, check: Check | None = None) -> None:
        """Advance, journal when the intent changed, then ring the replicas that it concerns."""
        self._check_fenced()
        with self._leaving_if_fenced():
            after = await self._desired_state.decide(event, check=check)
        self._shelf.keep_only(self._desired_state.needed())
        self._forget(at=event.at)
        for name, line in self._reports.items():
            observed = after.observed.get(name)
            # gone, or sent out and called back before it heard of either: have it say where it is
            if self._has_news(line) or observed is None or observed.outdated:
                line.changed.set()
        if isinstance(event, Left):
            self._reports.close(event.replica)
        self._reports.wake()

    def _forget(self, *, at: float) -> None:
        """Have the kept adapters deleted that nobody can name any more, but not at once.

        A replacement that fails brings back what it replaced, and whoever asks for a rollout has
        its adapter kept a while before anybody can name it.
        """
        before, self._kept = self._kept, digests(known(self._fleet))
        self._forgotten |= dict.fromkeys(before - self._kept, at)

    def _drop_forgotten(self, *, at: float) -> None:
        due = {name for name, since in self._forgotten.items() if at - since >= self._grace_s}
        if due:
            self._forgotten = {n: s for n, s in self._forgotten.items() if n not in due}
            self._begin_work(asyncio.to_thread(self._drop, due))

    def _drop(self, gone: set[str]) -> None:
        try:
            # as it is then: somebody may have asked for one of them again
            self._store.drop(gone, unless=lambda: digests(known(self._fleet)))
        except Exception as error:  # they only take up space
            logger.warning(f"could not delete the adapters {sorted(gone)}: {error}")

    def _has_news(self, line: OpenReport) -> bool:
        """Whether the replica acts on something else than what it shall do."""
        has, want = line.report.acting_on, self._desired(line.report.replica)
        if has is None or (has.epoch, has.generation) == (want.epoch, want.generation):
            return has is None
        # a new generation that changes nothing for it is no news
        return _ACTED_ON(has) != _ACTED_ON(want)

    def _desired(self, replica: str) -> Desired:
        """What it shall hold. A decision is looked at once, however many replicas ask."""
        if self._documents is None or self._documents.fleet is not self._fleet:
            self._documents = Documents(self._fleet)
        return self._documents.of(replica)

    async def _tick(self) -> None:
        while self._fenced is None:
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
        self._drop_forgotten(at=at)


def digests(revisions: Iterable[str]) -> set[str]:
    return {Revision.parse(name).digest for name in revisions}


@dataclass(slots=True)
class _Inbox:
    """Reports that wait to be decided upon, and the task that will."""

    reports: list[Reported]
    read: asyncio.Task[None]


def _failed(report: Report, want: Desired) -> bool:
    """Whether something that it shall have is missing because it could not bring it there."""
    wanted = {want.hold, *want.also_serves, *([] if want.stage is None else [want.stage])}
    return any(report.state.failures_of(revision) for revision in wanted)
