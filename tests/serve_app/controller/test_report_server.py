"""The control lane: which reports are answered when, and with which documents."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from hotswap_lib import BASE, Layout
from serve_app.rollout.state import Desired, Failure
from serve_app.settings import Settings
from serve_app.wire.reports import Answer
from tests.e2e.tiny_world import TinyWorld
from tests.serve_app.controller.hall import (
    Hall,
    introduced,
    report,
    tell,
)
from tests.serve_app.fakes import settled


def test_a_replica_with_an_unknown_layout_is_asked_to_introduce_itself(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            assert (await hall.report(report(layout))).introduce
            await hall.join("r1", layout)
            answer = await hall.report(report(layout))
            assert answer.desired == Desired(epoch=1, generation=2, hold=BASE.key, stable=BASE.key)
            assert set(answer.images) == {BASE.key}

    tell(story())


def test_a_report_with_nothing_new_stays_open_for_poll_s_and_no_longer(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=0.3) as hall:
            want = await introduced(hall, layout)
            began = time.monotonic()
            assert await hall.report(report(layout, acting_on=want)) == Answer()
            assert time.monotonic() - began >= 0.29

    tell(story())


def test_an_open_report_is_answered_at_once_when_there_is_news(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=60) as hall:
            want = await introduced(hall, layout)
            open_report = asyncio.create_task(hall.report(report(layout, acting_on=want)))
            await settled()
            assert not open_report.done()
            rollout = await hall.roll("alpha")
            answer = await asyncio.wait_for(open_report, 5)
            assert answer.desired is not None
            assert (answer.desired.hold, str(answer.desired.stage)[:6]) == (BASE.key, "alpha@")
            assert set(answer.images) == {answer.desired.hold, answer.desired.stage}
            assert rollout.state == "staging"

    tell(story())


def test_a_newer_report_ends_the_older_one(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=60) as hall:
            want = await introduced(hall, layout)
            older = asyncio.create_task(hall.report(report(layout, acting_on=want)))
            await settled()
            newer = asyncio.create_task(hall.report(report(layout, acting_on=want)))
            assert await asyncio.wait_for(older, 5) == Answer()
            newer.cancel()

    tell(story())


def test_a_replica_that_failed_to_hold_stable_is_asked_again(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=0.05) as hall:
            want = await introduced(hall, layout)
            failure = Failure(revision=want.hold, reason="busy", generation=want.generation)
            stuck = report(layout, acting_on=want, serving=False, failure=failure)
            answers = [await hall.report(stuck) for _ in range(4)]
            assert any(answer.desired is not None for answer in answers), (
                "it is never asked to try again"
            )

    tell(story())


class Impatient(Settings):
    """Replicas are given up after a fraction of a second."""

    @property
    def silence_s(self) -> float:
        return 0.3


def test_a_replica_that_is_silent_leaves_the_fleet(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        hall = Hall(world, tmp_path, poll_s=0.05)
        hall.settings_type = Impatient
        async with hall:
            await introduced(hall, layout)
            assert hall.journal()["assigned"] == {"r1": BASE.key}
            await hall.until_fleet(lambda fleet: not fleet.replicas)
            assert hall.journal()["assigned"] == {}

    tell(story())


def test_a_replica_that_reports_its_end_leaves_at_once(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=60) as hall:
            want = await introduced(hall, layout)
            open_report = asyncio.create_task(hall.report(report(layout, acting_on=want)))
            await settled()
            await hall.leave("r1")
            assert await asyncio.wait_for(open_report, 5) == Answer()
            assert (await hall.controller.fleet()).replicas == []
            await hall.leave("r1")

    tell(story())
