"""Reports and answers: decided upon together, by one controller, with or without its journal."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest

from hotswap_lib import BASE, AdapterRefused, Layout
from serve_app.controller.journal import Journal, JournalEntry
from serve_app.rollout.state import Desired
from serve_app.wire.errors import Fenced
from tests.e2e.tiny_world import TinyWorld
from tests.serve_app.controller.test_deployment import Hall, introduced, report, tell
from tests.serve_app.fakes import bucket, settled, until


class Watched(Journal):
    """Counts what is written, and waits or fails when it is told to."""

    def __init__(self, state_uri: str) -> None:
        super().__init__(state_uri)
        self.written = self.failures = 0
        self.slow_s = 0.0

    def write(self, entry: JournalEntry) -> None:
        time.sleep(self.slow_s)
        if self.failures > 0:
            self.failures -= 1
            raise OSError("the bucket does not answer")
        self.written += 1
        super().write(entry)


def watched(hall: Hall) -> Watched:
    journal = Watched(str(hall.state))
    journal._mine = hall.controller._journal._mine
    hall.controller._desired_state._journal = journal
    return journal


# ---- many reports, few decisions ----------------------------------------------------------------


def test_reports_that_come_while_a_decision_is_written_are_decided_upon_together(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=5) as hall:
            await hall.join("r0", layout)
            journal = watched(hall)
            journal.slow_s = 0.05
            names = [f"r{number}" for number in range(40)]
            answers = await asyncio.gather(
                *(hall.report(report(layout, replica=name)) for name in names)
            )
            assert journal.written <= 3, "each of them joins, which alone is a decision"
            assert {answer.desired.hold for answer in answers if answer.desired} == {BASE.key}
            assert all(answer.desired for answer in answers)
            assert set(hall.journal()["assigned"]) == set(names)

    tell(story())


def test_whoever_reported_hears_that_the_journal_failed_and_the_next_report_works(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=5) as hall:
            await hall.join("r1", layout)
            journal = watched(hall)
            journal.failures = 1
            both = [hall.report(report(layout, replica=name)) for name in ("r1", "r2")]
            failed = await asyncio.gather(*both, return_exceptions=True)
            assert [type(each) for each in failed] == [OSError, OSError]
            assert hall.controller._fleet.observed == {}
            answer = await hall.report(report(layout))
            assert answer.desired is not None
            assert hall.journal()["assigned"] == {"r1": BASE.key}

    tell(story())


def test_a_report_that_waits_to_be_decided_upon_brings_no_replica_back_that_has_left(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=5) as hall:
            await introduced(hall, layout)
            journal = watched(hall)
            journal.slow_s = 0.05
            first = asyncio.create_task(hall.report(report(layout, replica="r2")))
            await until(lambda: hall.controller._desired_state._lock.locked())
            late = asyncio.create_task(hall.report(report(layout)))
            await settled()
            late.cancel()
            await hall.leave("r1")
            await first
            assert set(hall.controller._fleet.observed) == {"r2"}

    tell(story())


# ---- two controllers ----------------------------------------------------------------------------


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
            assert old._ticker is not None
            await old._ticker  # it looks no more
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
                return {lane.routing_stats()["decision"][0] for lane in hall.lanes.values()}

            await until(lambda: epochs() == {2})
            # what it hears of them tells the older one, too
            with pytest.raises(Fenced):
                await old.report(hall.lanes["r1"]._report())
            assert (hall.holds(), hall.engines["r1"].swaps) == ({"beta"}, [world.revision("beta")])
            assert (await hall.ended(await hall.roll("alpha"))).state == "succeeded"

    tell(story())


def test_a_controller_that_cannot_start_takes_nobodys_place(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            with pytest.raises(AdapterRefused):
                await hall.replace(adapter=str(tmp_path / "nothing"))
            assert (await hall.ended(await hall.roll("alpha"))).state == "succeeded"

    tell(story())


# ---- a journal that is lost ---------------------------------------------------------------------


def lose(hall: Hall, how: str) -> None:
    journal = Path(hall.state, "journal.json")
    match how:
        case "deleted":
            journal.unlink()
        case "deleted with the epochs":
            journal.unlink()
            for epoch in Path(hall.state, "epochs").iterdir():
                epoch.unlink()
        case "corrupted":
            journal.write_text("{")


LOSSES = ["deleted", "deleted with the epochs", "corrupted"]


@pytest.mark.parametrize("how", LOSSES)
def test_a_controller_without_a_journal_takes_over_what_the_fleet_holds(
    world: TinyWorld, tmp_path: Path, how: str
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, adapter=str(world.adapter("gamma"))) as hall:
            await hall.replicas("r1", "r2")
            await hall.ended(await hall.roll("beta"))
            await hall.load("alpha")
            before = await hall.controller.fleet()
            hall.kill()
            lose(hall, how)
            await hall.start()
            await hall.until_serving("r1", "r2")
            fleet = await hall.controller.fleet()
            assert (fleet.stable, fleet.loaded) == (before.stable, before.loaded)
            assert (fleet.epoch > before.epoch, fleet.rollout) == (True, None)
            [view] = await hall.controller.adapters()
            assert view.lora_path == hall.adapter("alpha")
            await hall.replicas("r3")
            assert (hall.holds(), hall.also_serves()) == ({"beta"}, [{"alpha"}] * 3)
            swaps = [engine.swaps for engine in hall.engines.values()]
            gamma, beta = world.revision("gamma"), world.revision("beta")
            assert swaps == [[gamma, beta], [gamma, beta], [beta]], "nobody was reset"
            assert (await hall.ended(await hall.roll("gamma"))).id == "rollout-2"
            assert hall.journal()["stable"].startswith("gamma@")

    tell(story())


@pytest.mark.parametrize("how", LOSSES)
def test_a_rollout_whose_plan_was_lost_is_taken_back(
    world: TinyWorld, tmp_path: Path, how: str
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2")
            await hall.ended(await hall.roll("alpha"))
            hall.engines["r2"].drained.clear()
            running = await hall.roll("beta")
            await until(lambda: not hall.engines["r2"].admission.is_open)
            assert hall.engines["r1"].default.name == "beta"
            hall.kill()
            lose(hall, how)
            await hall.start()
            hall.engines["r2"].drained.set()
            await until(lambda: hall.holds() == {"alpha"})
            await until(lambda: hall.controller._fleet.rollout is not None)
            done = await hall.ended(running)
            assert (done.id, done.state) == (running.id, "aborted")
            assert done.reason == "the journal was lost while it was under way"
            assert (await hall.controller.fleet()).stable.startswith("alpha@")

    tell(story())


def test_a_controller_whose_journal_is_lost_while_it_lives_writes_it_again(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            lose(hall, "deleted with the epochs")
            assert (await hall.ended(await hall.roll("alpha"))).state == "succeeded"
            assert hall.journal()["stable"].startswith("alpha@")

    tell(story())


def test_a_fleet_that_nobody_has_led_before_begins_with_the_declared_adapter(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        (tmp_path / "journal.json").write_text("{")
        async with Hall(world, tmp_path, adapter=str(world.adapter("gamma"))) as hall:
            await hall.replicas("r1", "r2")
            assert hall.holds() == {"gamma"}

    tell(story())


def test_a_journal_that_is_older_than_the_fleet_is_followed_in_a_newer_epoch(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=60) as hall:
            await introduced(hall, layout)
            await hall.restart()
            await hall.join("r1", layout)
            later = Desired(epoch=9, generation=4, hold=BASE.key, stable=BASE.key)
            answer = await hall.report(report(layout, acting_on=later))
            assert answer.desired is not None
            assert answer.desired.epoch > 9, "a replica refuses what is older"

    tell(story())


# ---- in a bucket --------------------------------------------------------------------------------


def test_a_controller_finds_everything_again_in_a_bucket(
    world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(uri: str) -> None:
        async with Hall(world, uri) as hall:
            await hall.replicas("r1")
            await hall.ended(await hall.roll("alpha"))
            await hall.ended(await hall.roll("beta"))
            await hall.load("gamma")
            before = await hall.controller.fleet()
            await hall.restart()
            await hall.until_serving("r1")
            fleet = await hall.controller.fleet()
            assert (fleet.epoch, fleet.stable) == (before.epoch + 1, before.stable)
            assert (fleet.history, fleet.loaded) == (before.history, before.loaded)
            assert (await hall.ended(await hall.controller.undo())).state == "succeeded"
            assert hall.holds() == {"alpha"}
            old = await hall.replace()
            with pytest.raises(Fenced):
                await old.start_rollout({"adapter": "base"})
            names = fsspec.filesystem("s3").ls(f"{uri}/adapters", detail=False)
            assert len(names) == 3, "adapters are kept beside the journal"

    with bucket(monkeypatch) as uri:
        tell(story(uri))
