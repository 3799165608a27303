"""Lanes: one revision in each, on a cache that was cleared for it, and no request starves."""

from __future__ import annotations

import asyncio
import pickle
import random
from collections import Counter
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotswap_lib import Revision
from serve_app.engine.lanes import Lanes
from serve_app.wire.errors import LanesTaken
from tests.serve_app.fakes import settled, until

T = TypeVar("T")
A, B, C, D, E, F, G = (Revision(name, "0" * 63 + "1") for name in "abcdefg")


class ClearFailed(Exception):
    """Raised by a cache that could not be cleared."""


class Caches:
    """The caches of the lanes: each holds the entries of one revision.

    As the engine's does, `clear` remembers its revision when it is done, and does nothing for the
    revision that the cache holds already. `slow`: it takes until `go` is set.
    """

    def __init__(self, count: int, *, steps: int = 0) -> None:
        self.holds: list[Revision | None] = [None] * count
        self.inside: list[Counter[Revision]] = [Counter() for _ in range(count)]
        self.cleared: list[Revision] = []
        self.slow: set[Revision] = set()
        self.failing: set[Revision] = set()
        self.go = asyncio.Event()
        self.steps = steps

    async def clear(self, lane: int, revision: Revision) -> None:
        assert not +self.inside[lane], "cleared under a request that runs"
        if self.holds[lane] == revision:
            return
        for _ in range(self.steps):
            await asyncio.sleep(0)
        if revision in self.slow:
            await self.go.wait()
        assert not +self.inside[lane], "a request entered before the lane was clear"
        if revision in self.failing:
            raise ClearFailed(str(revision))
        self.holds[lane] = revision
        self.cleared.append(revision)

    def come_in(self, lane: int, revision: Revision) -> None:
        self.inside[lane][revision] += 1
        self.check(lane, revision)

    def check(self, lane: int, revision: Revision) -> None:
        assert set(+self.inside[lane]) == {revision}, "two revisions in one lane"
        assert self.holds[lane] == revision, "the lane was not cleared for this revision"

    def go_out(self, lane: int, revision: Revision) -> None:
        self.check(lane, revision)
        self.inside[lane][revision] -= 1


class Place:
    """Lanes over fake caches; `use` is one request."""

    def __init__(
        self, count: int, *, wait: bool = True, turn_s: float = 0.0, steps: int = 0
    ) -> None:
        self.caches = Caches(count, steps=steps)
        self.lanes = Lanes(count, self.caches.clear, wait=wait, turn_s=turn_s)
        self.order: list[Revision] = []

    async def use(self, revision: Revision, until_set: asyncio.Event | None = None) -> int:
        lane = await self.lanes.enter(revision)
        self.caches.come_in(lane, revision)
        self.order.append(revision)
        try:
            if until_set is not None:
                await until_set.wait()
        finally:
            self.caches.go_out(lane, revision)
            self.lanes.leave(lane)
        return lane

    async def step(self, revision: Revision, steps: int) -> None:
        """A request that looks around at every step."""
        lane = await self.lanes.enter(revision)
        self.caches.come_in(lane, revision)
        try:
            for _ in range(steps):
                await asyncio.sleep(0)
                self.caches.check(lane, revision)
        finally:
            self.caches.go_out(lane, revision)
            self.lanes.leave(lane)

    def check_nothing_is_left(self) -> None:
        assert [lane.running for lane in self.lanes.all] == [0] * len(self.lanes.all)
        assert not any(lane.closing for lane in self.lanes.all)
        assert not self.lanes.waiting


def run(story: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(story, 20))


async def cancelled(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


# ---- whose lane it is ---------------------------------------------------------------------------


def test_requests_of_one_revision_share_its_lane() -> None:
    async def story() -> None:
        place, done = Place(3), asyncio.Event()
        users = [asyncio.create_task(place.use(A, done)) for _ in range(4)]
        await until(lambda: len(place.order) == 4)
        done.set()
        assert len(set(await asyncio.gather(*users))) == 1
        assert place.caches.cleared == [A]

    run(story())


def test_revisions_run_at_the_same_time_while_there_are_lanes() -> None:
    async def story() -> None:
        place, done = Place(3, wait=False), asyncio.Event()
        users = [asyncio.create_task(place.use(one, done)) for one in (A, B, C)]
        await until(lambda: len(place.order) == 3)
        done.set()
        assert sorted(await asyncio.gather(*users)) == [0, 1, 2]

    run(story())


def test_a_revision_that_comes_back_finds_its_lane_as_it_was() -> None:
    async def story() -> None:
        place = Place(2)
        for revision in (A, B, A, B, B, A):
            await place.use(revision)
        assert place.caches.cleared == [A, B]

    run(story())


def test_the_idle_lane_that_had_its_revision_longest_is_the_one_given_away() -> None:
    async def story() -> None:
        place = Place(2)
        await place.use(A)
        await place.use(B)
        await place.use(C)
        assert {lane.bound for lane in place.lanes.all} == {B, C}

    run(story())


def test_a_forgotten_revision_gives_its_lane_away_first() -> None:
    async def story() -> None:
        place = Place(2)
        await place.use(A)
        await place.use(B)
        place.lanes.forget(B)
        await place.use(C)
        assert {lane.bound for lane in place.lanes.all} == {A, C}

    run(story())


def test_a_revision_that_still_runs_is_not_forgotten() -> None:
    async def story() -> None:
        place, done = Place(1), asyncio.Event()
        user = asyncio.create_task(place.use(A, done))
        await until(lambda: place.order == [A])
        place.lanes.forget(A)
        assert place.lanes.all[0].bound == A
        done.set()
        await user

    run(story())


def test_a_reserved_lane_is_clear_before_the_first_request() -> None:
    async def story() -> None:
        place, done = Place(2), asyncio.Event()
        user = asyncio.create_task(place.use(A, done))
        await until(lambda: place.order == [A])
        await place.lanes.reserve(B)
        assert place.caches.cleared == [A, B]
        await place.use(B)
        assert place.caches.cleared == [A, B]
        done.set()
        await user

    run(story())


def test_reserving_does_not_wait_when_every_lane_is_busy() -> None:
    async def story() -> None:
        place, done = Place(1), asyncio.Event()
        user = asyncio.create_task(place.use(A, done))
        await until(lambda: place.order == [A])
        await place.lanes.reserve(B)
        await place.lanes.reserve(A)
        assert place.caches.cleared == [A]
        done.set()
        await user
        place.check_nothing_is_left()

    run(story())


def test_lanes_that_do_not_wait_refuse_and_say_why() -> None:
    async def story() -> None:
        place, done = Place(2, wait=False), asyncio.Event()
        users = [asyncio.create_task(place.use(one, done)) for one in (A, B)]
        await until(lambda: len(place.order) == 2)
        with pytest.raises(LanesTaken, match=f"all 2 lanes are busy with other .* {C}") as refused:
            await place.use(C)
        copy = pickle.loads(pickle.dumps(refused.value))
        assert str(copy) == str(refused.value)
        done.set()
        await asyncio.gather(*users)
        await place.use(C)
        place.check_nothing_is_left()

    run(story())


# ---- waiting ------------------------------------------------------------------------------------


def test_many_more_revisions_than_lanes_all_get_their_turn_in_the_order_they_came() -> None:
    async def story() -> None:
        place, done = Place(1), asyncio.Event()
        first = asyncio.create_task(place.use(A, done))
        await until(lambda: place.order == [A])
        others = []
        for revision in (B, C, D, E, F, G):
            others.append(asyncio.create_task(place.use(revision)))
            await settled()
        done.set()
        await asyncio.gather(first, *others)
        assert place.order == [A, B, C, D, E, F, G]
        place.check_nothing_is_left()

    run(story())


def test_a_lane_that_always_has_newcomers_is_still_given_up_to_a_waiting_revision() -> None:
    async def story() -> None:
        place, stop = Place(1, turn_s=0.005), asyncio.Event()

        async def comes_again_and_again(revision: Revision) -> None:
            while not stop.is_set():
                done = asyncio.Event()
                asyncio.get_running_loop().call_later(0.001, done.set)
                await place.use(revision, done)

        busy = [asyncio.create_task(comes_again_and_again(A)) for _ in range(4)]
        await until(lambda: len(place.order) > 4)
        for revision in (B, C, D):
            await asyncio.wait_for(place.use(revision), 5)
        seen = len(place.order)
        await until(lambda: A in place.order[seen:], "the busy one never came back")
        stop.set()
        await asyncio.gather(*busy)
        place.check_nothing_is_left()

    run(story())


def test_two_busy_revisions_share_one_lane_in_turns() -> None:
    async def story() -> None:
        place, stop = Place(1, turn_s=0.005), asyncio.Event()

        async def comes_again_and_again(revision: Revision) -> None:
            while not stop.is_set():
                done = asyncio.Event()
                asyncio.get_running_loop().call_later(0.001, done.set)
                await place.use(revision, done)

        busy = [asyncio.create_task(comes_again_and_again(one)) for one in (A, B, A, B, C)]
        await until(lambda: place.caches.cleared.count(A) > 3)
        assert place.caches.cleared.count(B) >= 2
        assert place.caches.cleared.count(C) >= 2
        stop.set()
        await asyncio.gather(*busy)

    run(story())


def test_no_revision_loses_its_lane_before_its_turn_is_over() -> None:
    async def story() -> None:
        place, done = Place(1, turn_s=60), asyncio.Event()
        user = asyncio.create_task(place.use(A, done))
        await until(lambda: place.order == [A])
        waiting = asyncio.create_task(place.use(B))
        await settled()
        await place.use(A)  # still let in
        done.set()
        await asyncio.gather(user, waiting)
        assert place.order == [A, A, B]

    run(story())


def test_a_lane_that_was_closing_opens_again_when_no_revision_waits_any_more() -> None:
    async def story() -> None:
        place, done = Place(1), asyncio.Event()
        user = asyncio.create_task(place.use(A, done))
        await until(lambda: place.order == [A])
        waiting = asyncio.create_task(place.use(B))
        await settled()
        assert place.lanes.all[0].closing
        await cancelled(waiting)
        await asyncio.wait_for(place.use(A), 1)
        done.set()
        await user
        place.check_nothing_is_left()

    run(story())


def test_newcomers_get_back_into_their_own_lane_once_no_other_revision_waits_for_it() -> None:
    async def story() -> None:
        place = Place(2)
        a_done, b_done, c_done = asyncio.Event(), asyncio.Event(), asyncio.Event()
        a = asyncio.create_task(place.use(A, a_done))
        await until(lambda: place.order == [A])
        b = asyncio.create_task(place.use(B, b_done))
        await until(lambda: place.order == [A, B])
        c = asyncio.create_task(place.use(C, c_done))
        await settled()
        assert place.lanes.all[0].closing  # A's, for C
        newcomer = asyncio.create_task(place.use(A, a_done))
        await settled()
        assert place.order == [A, B]
        b_done.set()  # C goes there instead
        await until(lambda: place.order.count(A) == 2, "A waits for its own requests to end")
        a_done.set()
        c_done.set()
        await asyncio.gather(a, b, c, newcomer)
        place.check_nothing_is_left()

    run(story())


# ---- going away ---------------------------------------------------------------------------------


def test_a_waiter_that_goes_away_leaves_no_trace() -> None:
    async def story() -> None:
        place, done = Place(1), asyncio.Event()
        user = asyncio.create_task(place.use(A, done))
        await until(lambda: place.order == [A])
        waiting = [asyncio.create_task(place.use(one)) for one in (B, B, C)]
        await settled()
        await cancelled(waiting[0], waiting[2])
        assert place.lanes.waiting == (B,)
        done.set()
        await asyncio.gather(user, waiting[1])
        assert place.order == [A, B]
        place.check_nothing_is_left()

    run(story())


def test_a_waiter_that_goes_away_in_the_moment_it_is_let_in_leaves_no_trace() -> None:
    async def story() -> None:
        place = Place(1)
        lane = await place.lanes.enter(A)
        waiting = asyncio.create_task(place.use(B))
        after = asyncio.create_task(place.use(C))
        await settled()
        place.lanes.leave(lane)  # B is let in, and does not know it yet
        await cancelled(waiting)
        await after
        assert place.order == [C]
        place.check_nothing_is_left()

    run(story())


def test_a_clear_that_ends_late_does_not_take_the_lane_from_the_next_revision() -> None:
    async def story() -> None:
        place = Place(1)
        await place.use(A)
        place.caches.slow.add(B)
        gone = asyncio.create_task(place.use(B))
        await settled()
        await cancelled(gone)  # its clear is still under way
        done = asyncio.Event()
        user = asyncio.create_task(place.use(A, done))
        await settled()
        place.caches.go.set()
        await until(lambda: place.order[1:] == [A])
        await settled()
        place.caches.check(0, A)
        done.set()
        await user
        place.check_nothing_is_left()

    run(story())


def test_a_lane_that_cannot_be_cleared_admits_no_request_and_can_be_used_afterwards() -> None:
    async def story() -> None:
        place, done = Place(1), asyncio.Event()
        place.caches.failing.add(B)
        with pytest.raises(ClearFailed):
            await place.use(B)
        user = asyncio.create_task(place.use(A, done))
        await until(lambda: place.order == [A])
        waiting = [asyncio.create_task(place.use(one)) for one in (B, B, C)]
        await settled()
        done.set()
        await user
        failed = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(one) for one in failed] == [ClearFailed, ClearFailed, int]
        place.caches.failing.clear()
        await place.use(B)
        assert place.order == [A, C, B]
        place.check_nothing_is_left()

    run(story())


def test_a_failed_clear_of_long_ago_does_not_unbind_the_lane() -> None:
    async def story() -> None:
        place = Place(1)
        place.caches.slow.add(B)
        place.caches.failing.add(B)
        gone = asyncio.create_task(place.use(B))
        await settled()
        await cancelled(gone)
        done = asyncio.Event()
        others = [asyncio.create_task(place.use(C)), asyncio.create_task(place.use(B, done))]
        await settled()
        place.caches.go.set()
        failed = await asyncio.gather(*others, return_exceptions=True)
        assert [type(one) for one in failed] == [int, ClearFailed]
        place.check_nothing_is_left()

    run(story())


# ---- anything, in any order ---------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    lanes=st.integers(1, 4),
    revisions=st.integers(1, 7),
    turn_s=st.sampled_from([0.0, 0.0005]),
    steps=st.integers(0, 3),
    wait=st.booleans(),
)
def test_whatever_happens_each_request_runs_alone_with_its_revision_on_a_cleared_lane(
    seed: int, lanes: int, revisions: int, turn_s: float, steps: int, wait: bool
) -> None:
    chance = random.Random(seed)

    async def story() -> None:
        place = Place(lanes, wait=wait, turn_s=turn_s, steps=steps)
        known = [A, B, C, D, E, F, G][:revisions]
        tasks: list[asyncio.Task[None]] = []
        gone: set[asyncio.Task[None]] = set()
        for _ in range(60):
            one = chance.choice(known)
            match chance.randrange(8):
                case 0 if tasks:
                    task = chance.choice(tasks)
                    if task.cancel():
                        gone.add(task)
                case 1:
                    place.lanes.forget(one)
                case 2:
                    tasks.append(asyncio.create_task(place.lanes.reserve(one)))
                case 3:
                    place.caches.failing ^= {one}
                case _:
                    tasks.append(asyncio.create_task(place.step(one, chance.randrange(6))))
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
        _, pending = await asyncio.wait(tasks, timeout=5)
        assert not pending, "a request waits forever"
        allowed = (ClearFailed,) if wait else (ClearFailed, LanesTaken)
        for task in tasks:
            if not task.cancelled():
                error = task.exception()
                assert error is None or isinstance(error, allowed), repr(error)
            else:
                assert task in gone
        await settled()
        place.check_nothing_is_left()

    run(story())
