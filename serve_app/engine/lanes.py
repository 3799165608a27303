"""Lanes: how many revisions generate at once, and whose turn it is when there are more.

A lane is one revision's requests with a KV cache of their own. A request gets the lane of its
revision; if there is none, an idle lane becomes one. When all are busy it waits: the lane that has
had its revision longest lets nobody new in, empties, and goes to whoever waits first. So no
revision is starved, and none changes hands more often than every `turn_s`.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from hotswap_lib import Revision
from serve_app.wire.errors import LanesTaken

TURN_S = 1.0  # shorter weight_lock would spend themselves on emptying and filling lanes
Clear = Callable[[int, Revision], Awaitable[None]]


@dataclass(slots=True, eq=False)
class Lane:
    """`bound`: whose requests run here. `closing`: nobody new comes in. `since`: loop time."""

    index: int
    bound: Revision | None = None
    running: int = 0
    closing: bool = False
    since: float = 0.0
    ready: asyncio.Task[None] | None = field(default=None, repr=False)


class Lanes:
    """For one event loop. `clear(lane, revision)` makes a lane's cache ready for a revision."""

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

    async def enter(self, revision: Revision) -> int:
        """The index of the lane to run in, which counts one more request. Pair with `leave`.

        Raises:
            LanesTaken: none is free, and this is not a place for waiting.
        """
        lane = self._of(revision) or self._take(revision)
        if lane is None:
            if not self._wait:
                raise LanesTaken(str(revision), len(self._lanes))
            lane = await self._turn(revision)
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
        """Nobody will ask for it again: its lane is the first to be taken."""
        for lane in self._lanes:
            if lane.bound == revision and lane.running == 0:
                lane.bound, lane.since = None, 0.0

    async def reserve(self, revision: Revision) -> None:
        """Have an idle lane ready for a revision that is about to be asked for, if there is one."""
        lane = self._of(revision) or self._take(revision)
        if lane is not None and lane.ready is not None:
            await asyncio.shield(lane.ready)

    def _of(self, revision: Revision) -> Lane | None:
        for lane in self._lanes:
            if lane.bound == revision and not lane.closing:
                return lane
        return None

    def _take(self, revision: Revision) -> Lane | None:
        """An idle lane for `revision`, unless somebody has waited longer for one."""
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
            # who wanted it may be gone, its clear may not: what ends last decides whose lane it is
            await asyncio.wait([before])
        try:
            await self._clear(lane.index, revision)
        except BaseException:
            if lane.ready is asyncio.current_task():
                lane.bound = None
            raise

    async def _turn(self, revision: Revision) -> Lane:
        mine: asyncio.Future[Lane] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(revision, []).append(mine)
        self._arrange()
        try:
            return await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():  # it was just let in
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
        """Idle lanes to those who wait, first come first served; then ask busy ones to empty."""
        for lane in sorted(self._lanes, key=_worth):
            if not self._waiting:
                break
            if lane.running == 0:
                revision, futures = self._waiting.popitem(last=False)
                self._let_in(self._bind(lane, revision), futures)
        self._reopen()
        self._close_one()

    def _let_in(self, lane: Lane, futures: list[asyncio.Future[Lane]]) -> None:
        for future in futures:
            if not future.done():
                lane.running += 1
                future.set_result(lane)

    def _wanted(self) -> int:
        """How many lanes have to empty: one for each revision that waits and is in none."""
        return len(set(self._waiting) - {lane.bound for lane in self._lanes})

    def _reopen(self) -> None:
        """Lanes that nobody else wants any more let their own newcomers in, the latest first."""
        surplus = sum(lane.closing for lane in self._lanes) - self._wanted()
        closing = sorted((lane for lane in self._lanes if lane.closing), key=_worth, reverse=True)
        for lane in closing[: max(0, surplus)]:
            lane.closing = False
            if lane.bound is not None:
                self._let_in(lane, self._waiting.pop(lane.bound, []))

    def _close_one(self) -> None:
        """Have lanes empty, as many as are wanted, the one bound longest first."""
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
    """Which lane to give away first: an unbound one, else the one bound longest ago."""
    return lane.bound is not None, lane.since
