"""Admission: requests that wait, requests that run, and the drain."""

from __future__ import annotations

import asyncio
import pickle
from contextlib import suppress

import pytest

from serve_app.engine.admission import Admission, DrainTimeout
from tests.serve_app.fakes import settled


def test_the_gate_starts_closed_and_requests_wait_for_it() -> None:
    async def story() -> None:
        gate = Admission()
        waiting = asyncio.create_task(gate.enter())
        await settled()
        assert (waiting.done(), gate.running) == (False, 0)
        gate.open()
        await asyncio.wait_for(waiting, 1)
        assert gate.running == 1

    asyncio.run(story())


def test_a_gate_that_closes_again_at_once_admits_no_request() -> None:
    async def story() -> None:
        gate = Admission()
        waiting = asyncio.create_task(gate.enter())
        await settled()
        gate.open()
        gate.close()
        await settled()
        assert (waiting.done(), gate.running) == (False, 0)
        waiting.cancel()

    asyncio.run(story())


def test_a_drain_waits_for_running_requests_and_holds_back_new_ones() -> None:
    async def story() -> None:
        gate = Admission()
        gate.open()
        await gate.enter()
        order: list[str] = []

        async def swap() -> None:
            async with gate.drained(timeout_s=5):
                order.append(f"swap with {gate.running} inside")

        async def late() -> None:
            await gate.enter()
            order.append("late one in")

        swapping = asyncio.create_task(swap())
        await settled()
        coming = asyncio.create_task(late())
        await settled()
        assert order == []
        assert not gate.is_open
        gate.leave()
        await asyncio.gather(swapping, coming)
        assert order == ["swap with 0 inside", "late one in"]

    asyncio.run(story())


def test_a_drain_that_takes_too_long_leaves_the_gate_open_and_counts_the_running() -> None:
    async def story() -> None:
        gate = Admission()
        gate.open()
        await gate.enter()
        with pytest.raises(DrainTimeout) as refused:
            async with gate.drained(timeout_s=0.01):
                raise AssertionError("a request is running")
        assert str(refused.value) == "1 requests were still running after 0.01 s of drain"
        assert gate.is_open

    asyncio.run(story())


def test_a_closed_gate_stays_closed_after_a_drain() -> None:
    async def story() -> None:
        gate = Admission()
        async with gate.drained(timeout_s=1):
            pass
        assert not gate.is_open

    asyncio.run(story())


def test_the_gate_opens_again_when_the_work_inside_the_drain_fails_or_is_cancelled() -> None:
    async def story() -> None:
        gate = Admission()
        gate.open()
        with suppress(RuntimeError):
            async with gate.drained(timeout_s=1):
                raise RuntimeError
        assert gate.is_open
        await gate.enter()

        async def swap() -> None:
            async with gate.drained(timeout_s=60):
                pass

        swapping = asyncio.create_task(swap())
        await settled()
        assert not gate.is_open
        swapping.cancel()
        await asyncio.wait([swapping])
        assert gate.is_open

    asyncio.run(story())


@pytest.mark.parametrize("steps", range(6))
def test_a_cancelled_swap_stops_wherever_it_is(steps: int) -> None:
    async def story() -> None:
        gate = Admission()
        gate.open()

        async def swap() -> None:
            async with gate.drained(timeout_s=60):
                await asyncio.Event().wait()

        swapping = asyncio.create_task(swap())
        for _ in range(steps):
            await asyncio.sleep(0)
        swapping.cancel()
        done, _ = await asyncio.wait([swapping], timeout=0.5)
        try:
            assert done, "the cancellation was swallowed, so an abort would wait for the swap"
            assert swapping.cancelled()
            assert gate.is_open
        finally:
            swapping.cancel()
            await asyncio.wait([swapping])

    asyncio.run(story())


def test_a_cancelled_request_that_waited_leaves_nothing_behind() -> None:
    async def story() -> None:
        gate = Admission()
        waiting = asyncio.create_task(gate.enter())
        await settled()
        waiting.cancel()
        await asyncio.wait([waiting])
        gate.open()
        async with gate.drained(timeout_s=0.01):
            assert gate.running == 0

    asyncio.run(story())


def test_a_drain_timeout_survives_pickle() -> None:
    error = pickle.loads(pickle.dumps(DrainTimeout(3, 2.5)))
    assert (error.running, error.timeout_s, error.code) == (3, 2.5, "drain_timeout")
