"""Lanes: the revisions that generate at once, and the queue of revisions that wait for a lane.

A lane is a KV cache that the requests of one revision share. A request enters the lane of its
revision; if there is none, an idle lane is bound to it. When all lanes are busy the request waits:
the lane that was bound first admits no new requests, drains, and goes to the revision that has
waited longest. So no revision starves, and a lane changes its revision at most once per `turn_s`.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from hotswap_lib import Revision
from serve_app.wire.errors import LanesTaken

TURN_S = 1.0  # with less, lanes would spend their time draining and filling
Clear = Callable[[int, Revision], Awaitable[None]]


@dataclass(slots=True, eq=False)
class Lane:
    """One lane.

    Attributes:
        bound: the revision whose requests run here.
        running: their number.
        closing: it admits no new requests, so that it drains.
        since: loop time at which it was bound.
        ready: the task that clears its cache.
    """

    index: int
    bound: Revision | None = None
    running: int = 0
    closing: bool = False
    since: float = 0.0
    ready: asyncio.Task[None] | None = field(default=None, repr=False)


class Lanes:
    """For one event loop. `clear(lane, revision)` makes a lane's cache ready for a revision.

    `wait`: requests wait for a lane; else they are refused with `LanesTaken`.
    """

    def __init__(self, count: int, clear: Clear, *, wait: bool, turn_s: float = TURN_S) -> None:
        self._lanes = [Lane(index) for index in range(count)]
        self._clear = clear
        self._wait = wait
        self._turn_s = turn_s
        self._waiting: OrderedDict[Revision, list[asyncio.Future[Lane]]] = OrderedDict()
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def all(self) -> Sequence[Lane]:
        return self._lanes

    @property
    def waiting(self) -> tuple[Revision, ...]:
        """The revisions that wait for a lane, in their order."""
        return tuple(self._waiting)

    async def enter(self, revision: Revision) -> int:
        """Counts a request as running in a lane and returns its index. Pair with `leave`.

        Raises:
            LanesTaken: no lane is free, and requests do not wait here.
        """
        lane = self._of(revision) or self._take(revision)
        if lane is None:
            if not self._wait:
                raise LanesTaken(str(revision), len(self._lanes))
            lane = await self._wait_for_lane(revision)
        else:
            lane.running += 1
        try:
            assert lane.ready is not None
            await asyncio.shield(lane.ready)
        except BaseException:
            self.leave(lane.index)
            raise
        return lane.index

    def leave(self, index: int) -> None:
        self._lanes[index].running -= 1
        self._arrange()

    def forget(self, revision: Revision) -> None:
        """Unbinds the idle lane of a revision that is not served any more."""
        for lane in self._lanes:
            if lane.bound == revision and lane.running == 0:
                lane.bound, lane.since = None, 0.0

    async def reserve(self, revision: Revision) -> None:
        """Prepares an idle lane, if there is one, for a revision that will get requests soon."""
        lane = self._of(revision) or self._take(revision)
        if lane is not None and lane.ready is not None:
            await asyncio.shield(lane.ready)

    def _of(self, revision: Revision) -> Lane | None:
        for lane in self._lanes:
            if lane.bound == revision and not lane.closing:
                return lane
        return None

    def _take(self, revision: Revision) -> Lane | None:
        """An idle lane for `revision`, unless other requests have waited longer for one."""
        if self._waiting:
            return None
        idle = [lane for lane in self._lanes if lane.running == 0]
        return self._bind(min(idle, key=_worth), revision) if idle else None

    def _bind(self, lane: Lane, revision: Revision) -> Lane:
        loop = asyncio.get_running_loop()
        lane.bound, lane.closing, lane.since = revision, False, loop.time()
        lane.ready = loop.create_task(self._ready(lane, revision, lane.ready))
        return lane

    async def _ready(
        self, lane: Lane, revision: Revision, before: asyncio.Task[None] | None
    ) -> None:
        if before is not None:
            # the earlier cache reset may still run although its request was cancelled; wait for
            # it, so that the newest revision owns the lane
            await asyncio.wait([before])
        try:
            await self._clear(lane.index, revision)
        except BaseException:
            if lane.ready is asyncio.current_task():
                lane.bound = None
            raise

    async def _wait_for_lane(self, revision: Revision) -> Lane:
        mine: asyncio.Future[Lane] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(revision, []).append(mine)
        self._arrange()
        try:
            return await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():  # it was just admitted
                self.leave(mine.result().index)
            else:
                self._stop_waiting(revision, mine)
            raise

    def _stop_waiting(self, revision: Revision, one: asyncio.Future[Lane]) -> None:
        if revision in self._waiting:
            self._waiting[revision] = [f for f in self._waiting[revision] if f is not one]
            if not self._waiting[revision]:
                del self._waiting[revision]
        self._arrange()

    def _arrange(self) -> None:
        """Gives idle lanes to waiting revisions, in their order; then drains busy lanes."""
        for lane in sorted(self._lanes, key=_worth):
            if not self._waiting:
                break
            if lane.running == 0:
                revision, futures = self._waiting.popitem(last=False)
                self._admit(self._bind(lane, revision), futures)
        self._reopen()
        self._close_one()

    def _admit(self, lane: Lane, futures: list[asyncio.Future[Lane]]) -> None:
        for future in futures:
            if not future.done():
                lane.running += 1
                future.set_result(lane)

    def _wanted(self) -> int:
        """The number of lanes to drain: one for each waiting revision without a lane."""
        return len(set(self._waiting) - {lane.bound for lane in self._lanes})

    def _reopen(self) -> None:
        """Reopens draining lanes that no waiting revision needs, most recently bound first."""
        surplus = sum(lane.closing for lane in self._lanes) - self._wanted()
        closing = sorted((lane for lane in self._lanes if lane.closing), key=_worth, reverse=True)
        for lane in closing[: max(0, surplus)]:
            lane.closing = False
            if lane.bound is not None:
                self._admit(lane, self._waiting.pop(lane.bound, []))

    def _close_one(self) -> None:
        """Starts to drain as many lanes as are wanted, the one bound first before others."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        closing = sum(lane.closing for lane in self._lanes)
        if closing >= self._wanted() or closing == len(self._lanes):
            return
        loop = asyncio.get_running_loop()
        oldest = min((lane for lane in self._lanes if not lane.closing), key=lambda one: one.since)
        left_s = oldest.since + self._turn_s - loop.time()
        if left_s <= 0:
            oldest.closing = True
            self._close_one()
        else:
            self._alarm = loop.call_later(left_s, self._arrange)


def _worth(lane: Lane) -> tuple[bool, float]:
    """Sort key of the lanes to give away: unbound ones, then the one bound longest ago."""
    return lane.bound is not None, lane.since
