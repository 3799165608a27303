"""Revisions of an engine on a real model: each request runs on one, from admission to its end.

Every answer here is compared with that of a plain PeftModel of the revision that it names.
"""

from __future__ import annotations

import asyncio
import pickle
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from hotswap_lib import AdapterImage
from hotswap_lib.errors import VerifyFailed
from serve_app.engine.steps import GenerationOutput
from serve_app.rollout.plan import InFlight
from serve_app.rollout.state import Traffic
from serve_app.wire.errors import (
    DeadlineExceeded,
    EngineStopped,
    GenerationFailed,
    LanesTaken,
    RevisionNotServed,
)
from serve_app.wire.request_stats import PROBE, RequestStats
from tests.e2e.tiny_world import TinyWorld
from tests.serve_app.fakes import NEVER_S, settled, until
from tests.serve_app.generating import GREEDY, LONG, SHORT, Running, Said, nothing_is_left, started

BOTH = pytest.mark.parametrize("in_flight", ["drain", "overlap"])


@pytest.fixture(scope="module")
def two(world: TinyWorld, images: dict[str, AdapterImage]) -> Iterator[Running]:
    """Two lanes."""
    yield from started(world, images, lanes=2, turn_s=0.01)


@pytest.fixture(scope="module")
def one(world: TinyWorld, images: dict[str, AdapterImage]) -> Iterator[Running]:
    """A single lane."""
    yield from started(world, images, lanes=1, turn_s=0.01)


@pytest.fixture
def make(world: TinyWorld, images: dict[str, AdapterImage]) -> Iterator[Callable[..., Running]]:
    """An engine with settings of its own."""
    made: list[Running] = []

    def one_more(**settings: Any) -> Running:
        made.append(Running(world, images, **settings))
        made[-1].engine.admission.open()
        return made[-1]

    yield one_more
    for running in made:
        running.close()


def staged(running: Running) -> set[str]:
    """The revisions whose images the engine still has."""
    return {revision.name for revision in running.engine.weight_lock.revisions}


def in_lanes(running: Running) -> dict[str, int]:
    """Revision → how many of its requests run."""
    lanes = running.engine.lanes()
    return {lane.revision: lane.running for lane in lanes if lane.revision and lane.running}


def begin(running: Running, *args: Any, **how: Any) -> asyncio.Task[Said]:
    """A request as a task: its last step."""

    async def last() -> Said:
        async with running.steps(*args, **how) as steps:
            seen = [step async for step in steps]
        assert seen[-1].finished
        return seen[-1]

    return asyncio.create_task(last())


async def lane_of(running: Running, revision: str, requests: int = 1) -> None:
    await until(lambda: in_lanes(running).get(revision) == requests)


# ---- overlap ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_running_requests_finish_on_their_revision_while_new_ones_start_on_another(
    two: Running, stream: bool
) -> None:
    async def story() -> None:
        old = await two.swap("alpha")
        before = [begin(two, SHORT, 60, stream=stream) for _ in range(3)]
        await lane_of(two, old, 3)
        new = await two.swap("beta", "overlap")
        commits = two.engine.weight_lock.commits
        after = [begin(two, ids, 30, stream=stream) for ids in (SHORT, LONG, SHORT)]
        steps = await asyncio.gather(*before, *after)
        assert [step.revision for step in steps] == [old] * 3 + [new] * 3
        assert two.engine.weight_lock.commits > commits + 5, "they did not run at the same time"
        for step, ids, tokens in zip(
            steps, [SHORT] * 4 + [LONG, SHORT], [60] * 3 + [30] * 3, strict=True
        ):
            assert two.is_exact(step, ids, tokens)
        await nothing_is_left(two)

    two(story())


def test_no_request_waits_at_an_overlapping_cutover_and_the_old_image_is_freed_at_the_end(
    two: Running,
) -> None:
    async def story() -> None:
        old = await two.swap("alpha")
        long = begin(two, SHORT, 200)
        await lane_of(two, old)
        new = await two.swap("beta", "overlap")
        assert not long.done()
        quick = await two.answer(SHORT, 4)
        assert not long.done(), "the new request waited for the old one"
        assert (quick.revision, two.is_exact(quick, SHORT, 4)) == (new, True)
        assert staged(two) == {"alpha", "beta"}
        slow = await long
        assert (slow.revision, two.is_exact(slow, SHORT, 200)) == (old, True)
        await nothing_is_left(two)
        assert staged(two) == {"beta"}
        assert [lane.revision for lane in two.engine.lanes()].count(None) == 1
        assert two.engine.serves == (two.engine.default,)

    two(story())


def test_cutovers_in_a_row_over_two_lanes_leave_each_request_on_its_revision(
    two: Running,
) -> None:
    async def story() -> None:
        tasks = []
        revisions = []
        await two.swap("gamma")
        for name in ("alpha", "beta", "gamma", "alpha"):
            revision = await two.swap(name, "overlap")
            assert str(two.engine.default) == revision
            tasks.append(begin(two, LONG, 40))
            revisions.append(revision)
            await settled()
        steps = await asyncio.gather(*tasks)
        assert [step.revision for step in steps] == revisions
        assert all(two.is_exact(step, LONG, 40) for step in steps)
        await nothing_is_left(two)

    two(story())


def test_with_a_single_lane_new_requests_wait_for_old_ones_and_all_are_exact(one: Running) -> None:
    async def story() -> None:
        old = await one.swap("alpha")
        before = begin(one, SHORT, 60)
        await lane_of(one, old)
        new = await one.swap("beta", "overlap")
        assert not before.done()
        after = begin(one, SHORT, 10)
        assert (late := await after).revision == new
        assert before.done()
        assert one.is_exact(await before, SHORT, 60)
        assert one.is_exact(late, SHORT, 10)
        await nothing_is_left(one)

    one(story())


@pytest.mark.parametrize("lanes", ["one", "two"])
def test_a_long_prompt_is_never_read_from_the_cache_of_another_revision(
    request: pytest.FixtureRequest, lanes: str
) -> None:
    running: Running = request.getfixturevalue(lanes)

    async def story() -> None:
        for name in ("alpha", "beta", "alpha", "gamma", "beta", "alpha"):
            revision = await running.swap(name, "overlap")
            for _ in range(2):  # the second one finds the pages of the first
                step = await running.answer(LONG)
                assert (step.revision, running.is_exact(step, LONG)) == (revision, True)

    running(story())


# ---- loaded adapters -------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["name", "name@digest8", "full"])
def test_a_request_that_names_a_revision_runs_on_it(two: Running, form: str) -> None:
    async def story() -> None:
        await two.swap("alpha")
        beta = two.images["beta"].revision
        pin = {"name": beta.name, "name@digest8": str(beta), "full": f"beta@{beta.digest}"}[form]
        await two.hold("beta")
        assert two.engine.serves == (two.images["alpha"].revision, beta)
        pinned, free = await asyncio.gather(two.answer(LONG, pin=pin), two.answer(LONG))
        assert (pinned.revision, two.is_exact(pinned, LONG)) == (str(beta), True)
        assert (free.revision, two.is_exact(free, LONG)) == (two.world.revision("alpha"), True)
        two.engine.remove(beta)
        await nothing_is_left(two)

    two(story())


@pytest.mark.parametrize("pin", ["beta", "alpha@00000000", "", "alpha@"])
def test_a_revision_that_is_not_served_is_refused_with_those_that_are(
    two: Running, pin: str
) -> None:
    async def story() -> None:
        alpha = await two.swap("alpha")
        with pytest.raises(RevisionNotServed) as refused:
            await two.answer(SHORT, pin=pin)
        assert repr(pin) in str(refused.value)
        assert str(refused.value).endswith(f"live are {alpha}")
        assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)
        await nothing_is_left(two)

    two(story())


def test_requests_on_a_removed_revision_finish_and_then_its_image_is_freed(
    two: Running,
) -> None:
    async def story() -> None:
        await two.swap("alpha")
        beta = await two.hold("beta")
        long = begin(two, SHORT, 100, pin="beta")
        await lane_of(two, beta)
        two.engine.remove(two.images["beta"].revision)
        with pytest.raises(RevisionNotServed):
            await two.answer(SHORT, pin="beta")
        assert staged(two) == {"alpha", "beta"}
        step = await long
        assert (step.revision, two.is_exact(step, SHORT, 100)) == (beta, True)
        await nothing_is_left(two)
        assert staged(two) == {"alpha"}

    two(story())


@BOTH
def test_a_loaded_revision_stays_when_the_default_moves_on_and_when_it_was_the_default(
    two: Running, in_flight: InFlight
) -> None:
    async def story() -> None:
        await two.swap("alpha", in_flight)
        beta = await two.hold("beta")
        await two.swap("beta", in_flight)
        await two.swap("gamma", in_flight)
        step = await two.answer(SHORT, pin="beta")
        assert (step.revision, two.is_exact(step, SHORT)) == (beta, True)
        two.engine.remove(two.images["beta"].revision)
        await nothing_is_left(two)
        assert staged(two) == {"gamma"}

    two(story())


def test_removing_the_default_revision_by_name_leaves_it_the_default(two: Running) -> None:
    async def story() -> None:
        alpha = await two.swap("alpha")
        await two.hold("alpha")
        two.engine.remove(two.images["alpha"].revision)
        assert (await two.answer(SHORT, pin="alpha")).revision == alpha

    two(story())


# ---- more revisions than lanes ------------------------------------------------------------------


def test_more_revisions_than_lanes_all_get_exact_answers(two: Running) -> None:
    async def story() -> None:
        await two.swap("alpha")
        await two.hold("beta")
        await two.hold("gamma")
        pins = ["alpha", "beta", "gamma"] * 4
        steps = await asyncio.gather(*(two.answer(LONG, 20, pin=pin) for pin in pins))
        assert [step.revision for step in steps] == [two.world.revision(pin) for pin in pins]
        assert all(two.is_exact(step, LONG, 20) for step in steps)
        for name in ("beta", "gamma"):
            two.engine.remove(two.images[name].revision)
        await nothing_is_left(two)

    two(story())


def test_busy_lanes_that_refuse_say_so_and_go_on(make: Callable[..., Running]) -> None:
    running = make(lanes=2, lane_overflow="refuse")

    async def story() -> None:
        await running.swap("alpha")
        beta = await running.hold("beta")
        await running.hold("gamma")
        tasks = [begin(running, SHORT, 100, pin=pin) for pin in ("alpha", "beta")]
        await lane_of(running, beta)
        with pytest.raises(LanesTaken, match="all 2 lanes are busy"):
            await running.answer(SHORT, pin="gamma")
        quick = await running.answer(SHORT, 5, pin="beta")
        assert running.is_exact(quick, SHORT, 5)
        for step in await asyncio.gather(*tasks):
            assert running.is_exact(step, SHORT, 100)
        step = await running.answer(SHORT, pin="gamma")
        assert running.is_exact(step, SHORT)
        await nothing_is_left(running)

    running(story())


# ---- giving up ----------------------------------------------------------------------------------


def test_a_request_that_takes_too_long_ends_and_leaves_nothing_behind(
    make: Callable[..., Running],
) -> None:
    running = make(lanes=1, request_timeout_s=0.15)

    async def story() -> None:
        alpha = await running.swap("alpha")
        await running.hold("beta")
        long = [begin(running, SHORT, 1500, stream=stream) for stream in (False, True)]
        await lane_of(running, alpha, 2)
        waiting = begin(running, SHORT, 5, pin="beta")  # for the lane
        ended = await asyncio.gather(*long, waiting, return_exceptions=True)
        assert [type(error) for error in ended[:2]] == [DeadlineExceeded] * 2
        assert str(ended[0]) == "the request was not finished after 0.15 s"
        await nothing_is_left(running)
        step = await running.answer(SHORT, 2, pin="beta")
        assert running.is_exact(step, SHORT, 2)

    running(story())


def test_a_request_that_gives_up_waiting_for_a_lane_leaves_nothing_behind(one: Running) -> None:
    async def story() -> None:
        alpha = await one.swap("alpha")
        await one.hold("beta")
        beta = one.images["beta"].revision
        long = begin(one, SHORT, 100)
        await lane_of(one, alpha)
        waiting = [begin(one, SHORT, 5, pin="beta") for _ in range(3)]
        await until(lambda: one.engine.revisions.running.get(beta) == 3)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        assert one.engine.admission.running == 1
        assert one.is_exact(await long, SHORT, 100)
        one.engine.remove(one.images["beta"].revision)
        await nothing_is_left(one)

    one(story())


def test_a_request_cancelled_while_its_lane_is_cleared_leads_no_other_to_its_revision(
    one: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        await one.swap("alpha")
        await one.hold("beta")
        await one.answer(LONG)
        manager = one.manager
        go, forget = threading.Event(), manager.forget_prefixes

        def slowly() -> None:
            assert go.wait(NEVER_S)
            forget()

        with monkeypatch.context() as patch:
            patch.setattr(manager, "forget_prefixes", slowly)
            gone = begin(one, LONG, pin="beta", tokens=5)
            beta = one.world.revision("beta")
            await until(lambda: [lane.revision for lane in one.engine.lanes()] == [beta])
            await settled()
            gone.cancel()
            await asyncio.wait([gone])
            back = begin(one, LONG, 60, stream=True)
            await settled()
            go.set()
            step = await back
        assert one.is_exact(step, LONG, 60)
        one.engine.remove(one.images["beta"].revision)
        await nothing_is_left(one)

    one(story())


class Blocked:
    """Makes `slot.verify` wait until it may go on; `fails`: and raise then."""

    def __init__(self, running: Running, *, fails: bool = False) -> None:
        self.inside, self.go = threading.Event(), threading.Event()
        verify = running.slot.verify

        def verify_later() -> None:
            self.inside.set()
            assert self.go.wait(NEVER_S)
            if fails:
                raise VerifyFailed(str(running.slot.revision), "tensor", "it was changed")
            verify()

        self.verify = verify_later


@BOTH
def test_a_cutover_that_is_cancelled_while_it_verifies_changes_nothing(
    two: Running, in_flight: InFlight, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        old = await two.swap("alpha")
        blocked = Blocked(two)
        with monkeypatch.context() as patch:
            patch.setattr(two.slot, "verify", blocked.verify)
            swapping = asyncio.create_task(two.swap("beta", in_flight))
            await until(blocked.inside.is_set)
            swapping.cancel()
            await settled()
            swapping.cancel()  # however often
            await settled()
            assert not swapping.done(), "a thread still writes the weights"
            blocked.go.set()
            await asyncio.wait([swapping])
        assert swapping.cancelled()
        assert two.engine.admission.is_open
        step = await two.answer(LONG)
        assert (step.revision, two.is_exact(step, LONG)) == (old, True)
        await nothing_is_left(two)
        new = await two.swap("beta", in_flight)
        step = await two.answer(LONG)
        assert (step.revision, two.is_exact(step, LONG)) == (new, True)

    two(story())


@BOTH
def test_a_cutover_that_does_not_verify_leaves_the_old_default_serving_exactly(
    two: Running, in_flight: InFlight, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        old = await two.swap("alpha")
        long = begin(two, SHORT, 60) if in_flight == "overlap" else None
        blocked = Blocked(two, fails=True)
        blocked.go.set()
        with monkeypatch.context() as patch:
            patch.setattr(two.slot, "verify", blocked.verify)
            with pytest.raises(VerifyFailed):
                await two.swap("beta", in_flight)
            with pytest.raises(VerifyFailed):
                await two.hold("gamma")
        assert str(two.engine.default) == old
        assert two.engine.serves == (two.engine.default,)
        step = await two.answer(LONG)
        assert (step.revision, two.is_exact(step, LONG)) == (old, True)
        if long is not None:
            assert two.is_exact(await long, SHORT, 60)
        await nothing_is_left(two)
        assert staged(two) == {"alpha"}

    two(story())


def test_a_cutover_whose_lane_cannot_be_cleared_changes_nothing(
    make: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = make(lanes=2)

    def fails() -> None:
        raise OSError("this lane cannot be cleared")

    async def story() -> None:
        old = await running.swap("alpha")
        await running.answer(SHORT)
        with monkeypatch.context() as patch:
            for manager in running.engine.managers:
                patch.setattr(manager, "forget_prefixes", fails)
            with pytest.raises(OSError, match="cannot be cleared"):
                await running.swap("beta", "overlap")
        assert str(running.engine.default) == old
        assert running.is_exact(await running.answer(SHORT), SHORT)
        await nothing_is_left(running)

    running(story())


def test_a_request_that_waits_for_a_lane_of_a_stopped_engine_fails(
    make: Callable[..., Running],
) -> None:
    running = make(lanes=1)

    async def story() -> None:
        await running.swap("alpha")
        await running.hold("beta")
        await running.answer(SHORT)
        long = begin(running, SHORT, 1500)
        await lane_of(running, running.world.revision("alpha"))
        waiting = begin(running, SHORT, 5, pin="beta")
        await settled()
        await asyncio.to_thread(running.engine.stop)
        ended = await asyncio.gather(long, waiting, return_exceptions=True)
        assert isinstance(ended[0], (EngineStopped, GenerationFailed))
        assert isinstance(ended[1], EngineStopped)
        with pytest.raises(EngineStopped):
            await running.answer(SHORT, pin="beta")
        await until(lambda: running.engine.admission.running == 0)

    running(story())


# ---- everything at once -------------------------------------------------------------------------


@pytest.mark.parametrize("swaps", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_random_swaps_under_mixed_load_lose_and_mix_nothing(two: Running, swaps: int) -> None:
    chance = random.Random(7)
    prompts = [SHORT, LONG, [9]]

    async def story() -> None:
        await two.swap("alpha")
        await two.hold("gamma")
        done = asyncio.Event()
        steps: list[tuple[Said, list[int], int]] = []
        left = 0

        async def client(pin: str | None, stream: bool) -> None:
            nonlocal left
            while not done.is_set():
                ids, tokens = chance.choice(prompts), chance.choice([1, 4, 9])
                if chance.random() < 0.1:  # goes away in the middle
                    async with two.steps(ids, 50, pin=pin, stream=True) as unfinished:
                        await anext(unfinished)
                    left += 1
                    continue
                step = await begin(two, ids, tokens, pin=pin, stream=stream)
                steps.append((step, ids, tokens))

        pins = [None, None, None, "gamma", two.world.revision("gamma")]
        clients = [asyncio.create_task(client(pin, bool(i % 2))) for i, pin in enumerate(pins)]
        for _ in range(swaps):
            policy: InFlight = chance.choice(["drain", "overlap"])
            await two.swap(chance.choice(["alpha", "beta", "gamma"]), policy)
            if chance.random() < 0.3:
                seen = len(steps)
                await until(lambda seen=seen: len(steps) > seen)  # type: ignore[misc]
        done.set()
        await asyncio.gather(*clients)
        two.engine.remove(two.images["gamma"].revision)
        assert len({step.revision for step, _, _ in steps}) == 3
        assert left > 0
        assert [s for s, ids, n in steps if not two.is_exact(s, ids, n)] == []
        await nothing_is_left(two)

    two(story())


# ---- a canary -----------------------------------------------------------------------------------

CANARY = "beta"


def full(running: Running, name: str) -> str:
    return running.images[name].revision.key


def traffic(running: Running, weight: float, step_id: str = "r1.1.1", **more: Any) -> Traffic:
    given: dict[str, Any] = {"canary": full(running, CANARY), "placement": "shared"} | more
    return Traffic(weight=weight, step_id=step_id, **given)


@asynccontextmanager
async def canary(
    running: Running, weight: float, **more: Any
) -> AsyncIterator[dict[str, RequestStats]]:
    """Alpha is the default, beta a canary with this weight. Yields the request statistics."""
    await running.swap("alpha")
    await running.hold(CANARY)
    running.engine.apply_traffic(traffic(running, weight, **more))
    request_stats = running.engine.recorder.request_stats
    try:
        yield request_stats
    finally:
        running.engine.apply_traffic(None)
        running.engine.remove(running.images[CANARY].revision)
        await nothing_is_left(running)


async def admitted_to(running: Running, pin: str | None = None, session: str | None = None) -> str:
    """The name of the revision that such a request is admitted to."""
    async with running.engine.admit(pin, session) as ticket:
        return ticket.revision.name


@pytest.mark.parametrize("weight", [0.0, 5.0, 50.0, 100.0])
def test_a_shared_canary_gets_its_weight_of_the_requests_without_a_pin(
    two: Running, weight: float
) -> None:
    async def story() -> None:
        async with canary(two, weight) as request_stats:
            names = [await admitted_to(two) for _ in range(200)]
            assert abs(names.count(CANARY) - 2 * weight) <= 3
            assert set(names) <= {"alpha", CANARY}
            seen = {k.partition("@")[0]: stats for k, stats in request_stats.items()}
            assert {name: names.count(name) for name in set(names)} == {
                name: stats.chosen for name, stats in seen.items()
            }
            step = await two.answer(LONG)
            assert two.is_exact(step, LONG)

    two(story())


def test_a_session_stays_on_the_canary_and_larger_weights_only_add_sessions(two: Running) -> None:
    sessions = [f"user {i}" for i in range(60)]

    async def story() -> None:
        before: set[str] = set()
        async with canary(two, 0):
            for step, weight in enumerate([10.0, 10.0, 30.0, 80.0, 100.0]):
                two.engine.apply_traffic(traffic(two, weight, f"r1.{step}.1"))
                runs = [(s, await admitted_to(two, session=s)) for s in sessions * 2]
                there = {session for session, name in runs if name == CANARY}
                assert len([1 for _, name in runs if name == CANARY]) == 2 * len(there)
                assert before <= there
                before = there
        assert before == set(sessions)

    two(story())


def test_a_pin_is_never_taken_to_the_canary_or_away_from_it(two: Running) -> None:
    async def story() -> None:
        async with canary(two, 100) as request_stats:
            assert {await admitted_to(two, "alpha") for _ in range(20)} == {"alpha"}
            assert await admitted_to(two, "alpha", "some session") == "alpha"
            two.engine.apply_traffic(traffic(two, 0))
            assert {await admitted_to(two, CANARY) for _ in range(20)} == {CANARY}
            assert [stats.chosen for stats in request_stats.values()] == [0, 0]

    two(story())


def test_the_default_answers_where_the_canary_is_not_or_requests_are_split_elsewhere(
    two: Running,
) -> None:
    async def story() -> None:
        async with canary(two, 100):
            two.engine.apply_traffic(traffic(two, 100, canary=full(two, "gamma")))
            assert await admitted_to(two) == "alpha"
            two.engine.apply_traffic(traffic(two, 100, placement="dedicated"))
            assert await admitted_to(two, session="s") == "alpha"
            two.engine.apply_traffic(None)
            assert await admitted_to(two) == "alpha"
            two.engine.apply_traffic(traffic(two, 100))
            two.engine.remove(two.images[CANARY].revision)
            assert await admitted_to(two) == "alpha"

    two(story())


def test_a_canary_that_became_the_default_answers_all_requests(two: Running) -> None:
    async def story() -> None:
        async with canary(two, 0):
            await two.swap(CANARY, "overlap")
            assert await admitted_to(two) == CANARY
            assert await admitted_to(two, session="s") == CANARY

    two(story())


@pytest.mark.parametrize("stream", [False, True])
def test_the_outcome_of_a_request_is_recorded(two: Running, stream: bool) -> None:
    async def story() -> None:
        async with canary(two, 100) as request_stats:
            began = time.perf_counter()
            step = await begin(two, LONG, 20, stream=stream)
            within = time.perf_counter() - began
            assert list(request_stats) == [full(two, CANARY)]
            [stats] = request_stats.values()
            assert (stats.requests, stats.errors, stats.chosen) == (1, 0, 1)
            [latency], [first], [rate] = stats.latency_s, stats.first_token_s, stats.tokens_per_s
            assert 0 < first < latency < within
            assert rate == pytest.approx((len(step.token_ids) - 1) / (latency - first))
            await two.answer(SHORT, 1, pin="alpha")
            pinned = request_stats[full(two, "alpha")]
            assert (pinned.requests, pinned.chosen, pinned.tokens_per_s) == (1, 0, [])
            assert len(pinned.first_token_s) == 1

    two(story())


def test_a_request_with_several_choices_has_the_first_token_of_any_and_the_tokens_of_all(
    two: Running,
) -> None:
    async def story() -> None:
        async with canary(two, 100) as request_stats, two.engine.admit() as ticket:
            outputs: list[GenerationOutput] = []

            async def one(ids: list[int], tokens: int, stream: bool) -> None:
                how: dict[str, Any] = {"sampling": GREEDY, "stream": stream}
                async for step in ticket.generate(ids, max_tokens=tokens, **how):
                    outputs.append(step)

            await asyncio.gather(one(SHORT, 30, False), one(LONG, 7, True), one([9], 1, False))
            ended = [step for step in outputs if step.finished]
            assert ticket.tokens == sum(len(step.token_ids) for step in ended)
            assert ticket.first_at == min(step.first_at or 0 for step in outputs)
            assert not request_stats, "it is not over"

    two(story())


def test_the_first_token_of_a_whole_answer_is_long_before_its_last(two: Running) -> None:
    """Although both are delivered together."""

    async def story() -> None:
        await two.swap("alpha")
        for stream in (False, True):
            async with two.engine.admit() as ticket:
                how: dict[str, Any] = {"sampling": GREEDY, "stream": stream}
                times = [
                    step.first_at async for step in ticket.generate(SHORT, max_tokens=50, **how)
                ]
                over = time.perf_counter()
            [first] = set(times)
            assert first is not None
            assert first < over
            if not stream:
                assert len(times) == 1

    two(story())


def test_a_failed_request_is_an_error_of_its_revision_and_its_times_are_not_sampled(
    make: Callable[..., Running],
) -> None:
    running = make(lanes=2, request_timeout_s=0.15)

    async def story() -> None:
        async with canary(running, 100) as request_stats:
            with pytest.raises(GenerationFailed):
                await running.answer(SHORT, 10**6)
            with pytest.raises(DeadlineExceeded):
                await running.answer(SHORT, 1500)
            assert request_stats == {
                full(running, CANARY): RequestStats(requests=2, errors=2, chosen=2)
            }

    running(story())


def test_refused_and_cancelled_requests_are_not_recorded(two: Running) -> None:
    async def story() -> None:
        async with canary(two, 50) as request_stats:
            with pytest.raises(RevisionNotServed):
                await two.answer(SHORT, pin="unknown")
            gone = begin(two, SHORT, 500)
            await until(lambda: bool(in_lanes(two)))
            gone.cancel()
            await asyncio.wait([gone])
            async with two.steps(SHORT, 500, stream=True) as unfinished:
                await anext(unfinished)
            seen = sum(stats.requests for stats in request_stats.values())
            assert seen == 1, "a client that has read enough was answered"
            with pytest.raises(ZeroDivisionError):  # the client's own fault
                async with two.engine.admit():
                    raise ZeroDivisionError
            assert sum(stats.requests for stats in request_stats.values()) == seen

    two(story())


def test_busy_lanes_are_no_error_of_the_revision(make: Callable[..., Running]) -> None:
    running = make(lanes=1, lane_overflow="refuse")

    async def story() -> None:
        async with canary(running, 100) as request_stats:
            long = begin(running, SHORT, 200, pin="alpha")
            await lane_of(running, running.world.revision("alpha"))
            with pytest.raises(LanesTaken):
                await running.answer(SHORT)
            assert not request_stats
            await long

    running(story())


def test_the_requests_of_probes_are_not_recorded(two: Running) -> None:
    async def story() -> None:
        async with canary(two, 50) as request_stats:
            assert await admitted_to(two, CANARY, PROBE) == CANARY
            assert await admitted_to(two, "alpha", PROBE) == "alpha"
            assert not request_stats

    two(story())


def test_a_new_canary_step_starts_with_nothing_and_ignores_older_requests(two: Running) -> None:
    async def story() -> None:
        async with canary(two, 100) as request_stats:
            await two.answer(SHORT, 2)
            assert sum(stats.requests for stats in request_stats.values()) == 1
            late = begin(two, SHORT, 60)
            await lane_of(two, two.world.revision(CANARY))
            two.engine.apply_traffic(traffic(two, 50, "r1.2.1"))
            assert two.engine.recorder.request_stats == {}
            await late
            assert two.engine.recorder.request_stats == {}
            two.engine.apply_traffic(traffic(two, 60, "r1.2.1"))
            await two.answer(SHORT, 2)
            two.engine.apply_traffic(traffic(two, 70, "r1.2.1"))
            assert len(two.engine.recorder.request_stats) == 1, "the same canary step goes on"
        assert (two.engine.recorder.step_id, two.engine.recorder.request_stats) == (None, {})
        await two.answer(SHORT, 2)
        assert two.engine.recorder.request_stats == {}

    two(story())
