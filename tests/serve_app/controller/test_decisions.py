"""Decisions: journaled first, made together, and made by one controller alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from hotswap_lib import BASE, Layout
from serve_app.wire.errors import (
    Fenced,
)
from tests.e2e.tiny_world import TinyWorld
from tests.serve_app.controller.hall import (
    Hall,
    introduced,
    report,
    tell,
    until_writing,
)
from tests.serve_app.fakes import settled, until


def test_a_decision_is_in_the_journal_before_a_replica_receives_it(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=60) as hall:
            want = await introduced(hall, layout)
            assert hall.journal()["assigned"] == {"r1": BASE.key}
            open_report = asyncio.create_task(hall.report(report(layout, acting_on=want)))
            await settled()
            await hall.roll("alpha")
            answer = await open_report
            assert answer.desired is not None
            journaled = hall.journal()
            assert journaled["generation"] >= answer.desired.generation
            assert journaled["rollout"]["target"] == answer.desired.stage

    tell(story())


def test_a_report_that_changes_no_decision_is_not_written_down(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=0.01) as hall:
            want = await introduced(hall, layout)
            before = (tmp_path / "journal.json").stat().st_mtime_ns
            for _ in range(5):
                await hall.report(report(layout, acting_on=want))
            assert (tmp_path / "journal.json").stat().st_mtime_ns == before

    tell(story())


def test_a_journal_that_is_out_of_reach_for_a_while_does_not_end_deadlines(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=60) as hall:
            await introduced(hall, layout)
            plan = {"adapter": str(world.adapter("alpha")), "progress_deadline": 0.1}
            await hall.controller.start_rollout(plan)  # which no replica ever stages
            hall.watched.failures = 2
            await hall.until_rollout("rollout-1", lambda now: now.reason is not None)
            assert hall.watched.failures == 0
            assert hall.journal()["rollout"]["reason"]
            [rollout] = await hall.controller.rollouts()
            assert rollout.state in ("aborting", "aborted")

    tell(story())


def test_the_journal_forgets_where_forgotten_revisions_came_from(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=60) as hall:
            await introduced(hall, layout)
            for name in ("alpha", "beta", "gamma"):  # each replaced before a replica staged it
                await hall.roll(name, history_limit=1)
            sources = {name.split("@")[0] for name in hall.document()["sources"]}
            assert sources == {"beta", "gamma"}, "the last one, and the one before"

    tell(story())


def test_a_user_who_goes_away_in_the_middle_of_a_decision_changes_nothing_about_it(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=5) as hall:
            await introduced(hall, layout)
            hall.watched.slow_s = 0.05
            asking = asyncio.create_task(hall.controller.start_rollout({"adapter": "base"}))
            await until_writing(hall)
            asking.cancel()  # Serve does this when an HTTP client hangs up
            await asyncio.wait([asking])
            await until(lambda: hall.journal()["rollouts"] == 1)
            await hall.until_fleet(lambda now: now.rollout is not None, "in the journal only")

    tell(story())


def test_a_journal_that_cannot_be_written_leaves_the_fleet_as_it_was(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path / "state") as hall:
            await hall.replicas("r1")
            before = await hall.controller.fleet()
            (tmp_path / "state").rename(tmp_path / "kept")
            (tmp_path / "state").touch()  # no folder can be made of it
            with pytest.raises(OSError, match="state"):
                await hall.controller.start_rollout({"adapter": "base"})
            after = await hall.controller.fleet()
            assert (after.generation, after.rollout) == (before.generation, None)
            (tmp_path / "state").unlink()
            (tmp_path / "kept").rename(tmp_path / "state")
            assert (await hall.ended(await hall.roll("alpha"))).state == "succeeded"

    tell(story())


def test_reports_that_come_while_a_decision_is_written_are_decided_on_together(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=5) as hall:
            await hall.join("r0", layout)
            journal = hall.watched
            journal.written, journal.slow_s = 0, 0.05
            names = [f"r{number}" for number in range(40)]
            answers = await asyncio.gather(
                *(hall.report(report(layout, replica=name)) for name in names)
            )
            assert journal.written <= 3, "each of them joins, which alone is a decision"
            assert {answer.desired.hold for answer in answers if answer.desired} == {BASE.key}
            assert all(answer.desired for answer in answers)
            assert set(hall.journal()["assigned"]) == set(names)

    tell(story())


def test_every_report_of_a_decision_fails_with_the_journal_and_the_next_report_works(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=5) as hall:
            await hall.join("r1", layout)
            hall.watched.failures = 1
            both = [hall.report(report(layout, replica=name)) for name in ("r1", "r2")]
            failed = await asyncio.gather(*both, return_exceptions=True)
            assert [type(each) for each in failed] == [OSError, OSError]
            assert (await hall.controller.fleet()).replicas == []
            answer = await hall.report(report(layout))
            assert answer.desired is not None
            assert hall.journal()["assigned"] == {"r1": BASE.key}

    tell(story())


def test_a_report_that_waits_for_a_decision_brings_no_replica_back_that_has_left(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=5) as hall:
            await introduced(hall, layout)
            hall.watched.slow_s = 0.05
            first = asyncio.create_task(hall.report(report(layout, replica="r2")))
            await until_writing(hall)
            late = asyncio.create_task(hall.report(report(layout)))
            await settled()
            late.cancel()
            await hall.leave("r1")
            await first
            assert [one.id for one in (await hall.controller.fleet()).replicas] == ["r2"]

    tell(story())


def test_a_controller_that_was_replaced_is_fenced_at_its_next_decision(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=60) as hall:
            want = await introduced(hall, layout)
            old = hall.controller
            open_report = asyncio.create_task(old.report(report(layout, acting_on=want)))
            await settled()
            await hall.replace()
            assert (await old.fleet()).epoch == 1, "it has not noticed yet"
            with pytest.raises(Fenced) as fenced:
                await old.start_rollout({"adapter": "base"})
            assert (fenced.value.epoch, fenced.value.by) == (1, 2)
            with pytest.raises(Fenced):
                await open_report
            asks: list[Any] = [old.fleet(), old.rollouts(), old.adapters(), old.undo()]
            asks += [old.rollout("rollout-1"), old.report(report(layout, acting_on=want))]
            for ask in asks:
                with pytest.raises(Fenced):
                    await ask
            with pytest.raises(Fenced):
                old.check_health()  # upon which Serve replaces it
            hall.controller.check_health()
            assert hall.journal()["epoch"] == 2

    tell(story())


def test_replicas_end_up_with_the_newer_of_two_controllers(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=0.05) as hall:
            await hall.replicas("r1", "r2")
            await hall.ended(await hall.roll("beta"))
            old = await hall.replace()
            await hall.until_serving("r1", "r2")

            def epochs() -> set[int]:
                acting_on = [one.acting_on for one in hall.reports.values()]
                return {0 if document is None else document.epoch for document in acting_on}

            await until(lambda: epochs() == {2})
            with pytest.raises(Fenced):  # a report shows the older one that it was replaced
                await old.report(hall.reports["r1"])
            assert (hall.holds(), hall.engines["r1"].swaps) == ({"beta"}, [world.revision("beta")])
            assert (await hall.ended(await hall.roll("alpha"))).state == "succeeded"

    tell(story())
