"""The controller: exactly one, it decides what the fleet holds.

A Serve deployment with one replica, so Serve restarts it when it dies. It feeds events to the pure
rollout machine, journals the new intent, then answers the replicas' open reports. It never calls a
replica. A restarted controller reads the journal and waits to hear what the replicas hold.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace

import ray
from ray import serve

from hotswap_lib import BASE, Adapter, HotswapError, Layout, Revision, load_adapter

from .fleet_view import fleet_view, rollout_view
from .images import AdapterStore, ImageShelf, Put
from .journal import Entry, Journal
from .messages import Answer, Report, from_key, key
from .rollout.events import AbortRequested, Asked, Event, Left, Reported, Ticked
from .rollout.machine import advance, desired, restored, silent
from .rollout.plan import Plan
from .rollout.state import Desired, Fleet, Rollout
from .settings import Settings
from .state_dir import default_state_uri
from .views import FleetView, RolloutView

logger = logging.getLogger("ray.serve")
_TICK_S = 0.25


class NoSuchRollout(Exception):
    code = "rollout_not_found"

    def __init__(self, id: str) -> None:
        super().__init__(id)
        self.id = id

    def __str__(self) -> str:
        return f"there is no rollout {self.id!r}"


class NothingToUndo(Exception):
    code = "nothing_to_undo"

    def __str__(self) -> str:
        return "there is no earlier revision to go back to"


class FleetNotReady(Exception):
    code = "fleet_not_ready"

    def __str__(self) -> str:
        return "no replica has reported yet, so no adapter can be checked against the fleet"


@dataclass(slots=True)
class _Line:
    """A replica's end of the control lane: its last report, and the bell of its open one."""

    report: Report
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Controller:
    """The logic, apart from Ray Serve's wrapper below, so that tests can hold it in hand."""

    def __init__(self, settings: Settings, *, state_uri: str, put: Put = ray.put) -> None:
        self._settings = settings
        self._journal = Journal(state_uri)
        self._store = AdapterStore(state_uri)
        self._shelf = ImageShelf(self._store, put=put)
        self._lines: dict[str, _Line] = {}
        self._lock = asyncio.Lock()
        self._deciding: set[asyncio.Task[None]] = set()
        self._sources: dict[str, str] = {}
        self._fleet = Fleet(stable=key(BASE), history=(key(BASE),))
        self._ticker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Resume from the journal, or begin with the declared adapter. Raises `AdapterRefused`."""
        entry = await asyncio.to_thread(self._journal.read)
        # the declared adapter wins only when someone changed it since the journal was written
        if entry is not None and entry.declared == self._settings.adapter:
            self._sources = entry.sources
            fleet = restored(entry.fleet, at=time.time())
            logger.info(f"resumed epoch {fleet.epoch}, stable {from_key(fleet.stable)}")
        else:
            epoch = entry.fleet.epoch + 1 if entry else 1
            fleet = replace(await self._declared(), epoch=epoch)
        await self._journal_and_set(fleet)
        self._ticker = asyncio.create_task(self._tick())

    # ---- the control lane -------------------------------------------------------------------

    async def join(self, replica: str, layout: Layout) -> None:
        """A replica introduces its layout, so that images can be packed for it."""
        self._shelf.add_layout(layout)
        logger.info(f"replica {replica} joined with layout {layout.fingerprint[:8]}")

    async def report(self, report: Report) -> Answer:
        """Hear what a replica holds; answer when what it shall hold changes, or after `poll_s`."""
        if not self._shelf.knows(report.layout):
            return Answer(introduce=True)
        line = _Line(report)
        if (older := self._lines.get(report.replica)) is not None:
            older.changed.set()
        self._lines[report.replica] = line
        await self._outrank(report)
        await self._feed(
            Reported(
                replica=report.replica,
                holds=key(report.holds),
                staged=None if report.staged is None else key(report.staged),
                serving=report.serving,
                failure=report.failure,
                at=time.time(),
            )
        )
        if not self._has_news(line):
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.poll_s):
                    await line.changed.wait()
        want = desired(self._fleet, report.replica)
        failed = report.failure is not None and report.failure.revision == want.hold
        # it holds nothing that it may serve: have it try again, at the pace of its reports
        if not self._has_news(line) and not failed:
            return Answer()
        answer = Answer(desired=want)
        for name in {name for name in (want.hold, want.stage) if name is not None}:
            try:
                answer.images[name] = await self._shelf.get(from_key(name), report.layout)
            except HotswapError as error:
                answer.refused[name] = error
        return answer

    async def leave(self, replica: str) -> None:
        """A replica stops on purpose; nobody needs to wait for its silence."""
        if replica in self._fleet.observed:
            await self._feed(Left(replica=replica, at=time.time()))

    # ---- users ------------------------------------------------------------------------------

    async def start_rollout(self, plan: Plan | dict[str, object]) -> RolloutView:
        """Check the adapter, then begin. Raises `AdapterRefused` before anything has changed."""
        plan = plan if isinstance(plan, Plan) else Plan.model_validate(plan)
        if not self._fleet.observed:
            raise FleetNotReady
        if plan.adapter == BASE.name:
            revision = BASE
        else:
            adapter = await asyncio.to_thread(load_adapter, plan.adapter, name=plan.name)
            revision = await self._shelf.accept(adapter)
        return await self._begin(plan, revision)

    async def undo(self) -> RolloutView:
        """Abort what runs; else roll back to the stable revision before this one."""
        if (running := self._fleet.running) is not None:
            return await self.abort(running.id, reason="undone")
        earlier = [name for name in self._fleet.history if name != self._fleet.stable]
        if not earlier:
            raise NothingToUndo
        revision = from_key(earlier[-1])
        for fingerprint in {line.report.layout for line in self._lines.values()}:
            await self._shelf.get(revision, fingerprint)  # refuse now, not on the replicas
        plan = Plan(adapter=self._sources.get(earlier[-1], revision.name), name=revision.name)
        return await self._begin(plan, revision)

    async def abort(self, id: str, reason: str = "aborted by request") -> RolloutView:
        """Send every replica back to stable; does nothing when the rollout has ended."""
        self._find(id)
        if (running := self._fleet.running) is not None and running.id == id:
            await self._feed(AbortRequested(reason=reason, at=time.time()))
        return await self.rollout(id)

    async def rollout(self, id: str) -> RolloutView:
        return rollout_view(self._fleet, self._find(id))

    async def rollouts(self) -> list[RolloutView]:
        return [rollout_view(self._fleet, one) for one in reversed(self._all())]

    async def fleet(self) -> FleetView:
        reports = {name: line.report for name, line in self._lines.items()}
        warnings = []
        if self._settings.state_uri is None:
            warnings.append(
                "the journal is on this node's disk and does not survive it: set state_uri"
            )
        return fleet_view(
            self._fleet, reports, journal_uri=self._journal.uri, warnings=warnings, at=time.time()
        )

    # ---- inside -----------------------------------------------------------------------------

    async def _declared(self) -> Fleet:
        source = self._settings.adapter
        if source is None or source == BASE.name:
            return self._fleet
        adapter: Adapter = await asyncio.to_thread(
            load_adapter, source, name=self._settings.adapter_name
        )
        await asyncio.to_thread(self._store.keep, adapter)
        stable = key(adapter.revision)
        self._sources[stable] = source
        return replace(self._fleet, stable=stable, history=(key(BASE), stable))

    async def _begin(self, plan: Plan, revision: Revision) -> RolloutView:
        self._sources[key(revision)] = plan.adapter
        await self._feed(Asked(plan=plan, target=key(revision), at=time.time()))
        assert self._fleet.rollout is not None
        return rollout_view(self._fleet, self._fleet.rollout)

    async def _outrank(self, report: Report) -> None:
        """Begin a newer epoch when replicas know of one: they refuse whatever is older."""
        held = report.acting_on
        if held is None or held.epoch <= self._fleet.epoch:
            return
        async with self._lock:
            if held.epoch > self._fleet.epoch:  # else another replica's report was faster
                await self._journal_and_set(replace(self._fleet, epoch=held.epoch + 1))

    async def _feed(self, event: Event) -> None:
        """Advance; also to the end when the caller goes away in the middle of it."""
        deciding = asyncio.create_task(self._decide(event))
        self._deciding.add(deciding)
        deciding.add_done_callback(self._deciding.discard)
        await asyncio.shield(deciding)

    async def _decide(self, event: Event) -> None:
        """Advance, journal when the intent changed, then ring the replicas that it concerns."""
        async with self._lock:
            before, after = self._fleet, advance(self._fleet, event)
            if replace(after, observed={}) != replace(before, observed={}):
                await self._journal_and_set(after)
            else:
                self._fleet = after
        for name, line in self._lines.items():
            observed = after.observed.get(name)
            # gone, or sent out and called back before it heard of either: have it say where it is
            if self._has_news(line) or observed is None or observed.outdated:
                line.changed.set()
        if isinstance(event, Left):
            self._lines.pop(event.replica, None)

    async def _journal_and_set(self, fleet: Fleet) -> None:
        target = {fleet.rollout.target} if fleet.rollout else set()
        # of those that an undo could name, or the journal would grow with every rollout
        known = {*fleet.history, *target}
        self._sources = {name: where for name, where in self._sources.items() if name in known}
        entry = Entry(fleet=fleet, declared=self._settings.adapter, sources=self._sources)
        await asyncio.to_thread(self._journal.write, entry)
        was, now = self._fleet.rollout, fleet.rollout
        if now is not None and (was is None or (was.id, was.state) != (now.id, now.state)):
            why = f" ({now.reason})" if now.reason else ""
            logger.info(f"{now.id} to {from_key(now.target)}: {now.state}{why}")
        self._fleet = fleet
        needed = {fleet.stable, *fleet.assigned.values(), *fleet.history[-2:]}
        self._shelf.keep_only(needed | target)

    def _has_news(self, line: _Line) -> bool:
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

    def _all(self) -> list[Rollout]:
        last = self._fleet.rollout
        return [*self._fleet.past, *([] if last is None else [last])]

    def _find(self, id: str) -> Rollout:
        for one in self._all():
            if one.id == id:
                return one
        raise NoSuchRollout(id)


def _content(want: Desired) -> tuple[int, str, str | None]:
    """What a replica acts on; a new generation that changes nothing for it is no news."""
    return want.epoch, want.hold, want.stage


class RolloutController(Controller):
    """The deployment; scripts reach it with `get_deployment_handle("RolloutController", app)`."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        uri = settings.state_uri or default_state_uri(serve.get_replica_context().app_name)
        super().__init__(settings, state_uri=uri)
        await self.start()
