"""Begin, resume, and take over: a controller's first decision, with or without its journal."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest

from hotswap_lib import BASE, AdapterImage, AdapterRefused, Layout
from serve_app.controller.journal import Journal
from serve_app.rollout.state import Desired
from serve_app.wire.errors import (
    Fenced,
)
from tests.e2e.tiny_world import TinyWorld
from tests.serve_app.controller.hall import (
    Hall,
    introduced,
    report,
    tell,
)
from tests.serve_app.fakes import bucket, until


def test_the_declared_adapter_is_what_the_fleet_begins_with(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        adapter = str(world.adapter("alpha"))
        async with Hall(world, tmp_path, adapter=adapter, adapter_name="first") as hall:
            await hall.replicas("r1")
            assert hall.holds() == {"first"}
            assert [name.split("@")[0] for name in (await hall.controller.fleet()).history] == [
                "base",
                "first",
            ]

    tell(story())


def test_a_declared_adapter_that_cannot_be_read_stops_the_start_and_writes_nothing(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        hall = Hall(world, tmp_path / "state", adapter=str(tmp_path / "nothing"))
        with pytest.raises(AdapterRefused):
            await hall.start()
        assert not (tmp_path / "state").exists()

    tell(story())


def test_a_controller_that_dies_in_the_middle_of_a_rollout_finishes_it(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2", "r3")
            hall.engines["r2"].drained.clear()
            running = await hall.roll("beta")
            await until(lambda: not hall.engines["r2"].admission.is_open)
            await hall.restart()
            fleet = await hall.controller.fleet()
            assert fleet.rollout is not None
            assert (fleet.epoch, fleet.rollout.id) == (2, running.id)
            hall.engines["r2"].drained.set()
            assert (await hall.ended(running)).state == "succeeded"
            assert hall.holds() == {"beta"}

    tell(story())


def test_a_restarted_controller_decides_nothing_before_every_replica_has_reported(
    world: TinyWorld, layout: Layout, tmp_path: Path, images: dict[str, AdapterImage]
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=5) as hall:
            beta = images["beta"].revision
            for name in ("r1", "r2"):
                await hall.join(name, layout)
                want = (await hall.report(report(layout, replica=name))).desired
                with suppress(TimeoutError):
                    one = report(layout, replica=name, acting_on=want)
                    await asyncio.wait_for(hall.report(one), 0.01)
            running = await hall.roll("beta")
            await hall.restart()
            await hall.join("r1", layout)
            first = report(layout, replica="r1", staged=beta.key)
            answer = await hall.report(first)
            assert answer.desired is not None
            assert (answer.desired.epoch, answer.desired.hold) == (2, BASE.key)
            for _ in range(3):
                with suppress(TimeoutError):
                    ready = report(layout, acting_on=answer.desired, staged=beta.key)
                    await asyncio.wait_for(hall.report(ready), 0.05)
            assert (await hall.controller.rollout(running.id)).state == "staging"
            assert set(hall.journal()["assigned"].values()) == {BASE.key}

    tell(story())


def test_a_restart_goes_on_with_what_the_fleet_holds_and_not_with_the_first_adapter(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, adapter=str(world.adapter("alpha"))) as hall:
            await hall.replicas("r1")
            await hall.ended(await hall.roll("beta"))
            await hall.restart()
            await hall.until_serving("r1")
            assert (await hall.controller.fleet()).stable.startswith("beta@")
            await hall.replicas("r2")
            assert hall.holds() == {"beta"}

    tell(story())


def test_a_deploy_that_declares_another_adapter_wins_over_the_journal(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, adapter=str(world.adapter("alpha"))) as hall:
            await hall.replicas("r1")
            await hall.ended(await hall.roll("beta"))
            await hall.restart(adapter=str(world.adapter("gamma")))
            await until(lambda: hall.holds() == {"gamma"})
            assert (await hall.controller.fleet()).epoch == 2

    tell(story())


def test_a_controller_that_lost_its_journal_is_still_obeyed(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            await hall.restart()
            await hall.until_serving("r1")
            await hall.ended(await hall.roll("beta"))
            (tmp_path / "journal.json").unlink()
            await hall.restart()
            await hall.until_serving("r1")
            assert (await hall.ended(await hall.roll("alpha"))).state == "succeeded"

    tell(story())


def test_a_journal_that_cannot_be_read_is_put_aside_and_the_fleet_says_where(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        (tmp_path / "journal.json").write_text("{")
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            [aside] = tmp_path.glob("journal.json.unreadable-*")
            assert aside.read_text() == "{"
            warnings = (await hall.controller.fleet()).warnings
            assert any(str(aside) in warning for warning in warnings)
            assert (await hall.ended(await hall.roll("alpha"))).state == "succeeded"

    tell(story())


def test_the_fleet_says_that_its_journal_may_not_survive_the_node(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            fleet = await hall.controller.fleet()
            assert fleet.journal_uri == Journal(str(tmp_path)).uri
            assert len(fleet.warnings) == 1
            await hall.restart(state_uri=str(tmp_path))
            assert (await hall.controller.fleet()).warnings == []

    tell(story())


LOSSES = ["deleted", "deleted with the epochs", "corrupted"]


def test_a_controller_that_cannot_start_replaces_none(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            with pytest.raises(AdapterRefused):
                await hall.replace(adapter=str(tmp_path / "nothing"))
            assert (await hall.ended(await hall.roll("alpha"))).state == "succeeded"

    tell(story())


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
            await hall.kill()
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
            assert swaps == [[gamma, beta], [gamma, beta], [beta]], "no replica was reset"
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
            await hall.kill()
            lose(hall, how)
            await hall.start()
            hall.engines["r2"].drained.set()
            await until(lambda: hall.holds() == {"alpha"})
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


def test_a_new_fleet_begins_with_the_declared_adapter(world: TinyWorld, tmp_path: Path) -> None:
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


@pytest.mark.slow
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
            assert len(names) == 3, "adapters are kept next to the journal"

    with bucket(monkeypatch) as uri:
        tell(story(uri))
