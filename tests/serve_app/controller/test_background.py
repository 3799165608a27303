"""Work whose caller may go away."""

from __future__ import annotations

import asyncio

import pytest

from serve_app.controller.background import BackgroundTasks
from tests.serve_app.fakes import settled


def test_work_goes_on_when_its_caller_is_cancelled() -> None:
    async def story() -> None:
        release, done = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            await release.wait()
            done.set()

        caller = asyncio.create_task(BackgroundTasks().complete(work()))
        await settled()
        caller.cancel()
        await settled()
        assert caller.cancelled()
        release.set()
        await asyncio.wait_for(done.wait(), 5)

    asyncio.run(story())


def test_a_caller_that_stays_gets_the_result_or_the_exception() -> None:
    async def good() -> int:
        return 7

    async def bad() -> int:
        raise OSError("the bucket does not answer")

    async def story() -> None:
        tasks = BackgroundTasks()
        assert await tasks.complete(good()) == 7
        with pytest.raises(OSError, match="bucket"):
            await tasks.complete(bad())

    asyncio.run(story())
