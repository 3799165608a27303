"""Adapters that every replica serves for requests that name them."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from hotswap_lib import AdapterImage, AdapterRefused, Layout
from serve_app.rollout.errors import GenerationMismatch
from serve_app.wire.errors import (
    AdapterAlreadyLoaded,
    AdapterLoadFailed,
    AdapterLoadTimeout,
    AdapterNotLoaded,
    FleetNotReady,
)
from tests.e2e.tiny_world import TinyWorld
from tests.serve_app.controller.hall import (
    Hall,
    introduced,
    report,
    tell,
)
from tests.serve_app.fakes import until


def test_a_loaded_adapter_is_served_by_every_replica_when_the_call_returns(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2")
            view = await hall.load("alpha")
            assert hall.also_serves() == [{"alpha"}, {"alpha"}]
            assert (view.lora_name, view.lora_path) == ("alpha", hall.adapter("alpha"))
            assert (view.revision, view.ready, view.total) == (world.revision("alpha"), 2, 2)
            assert await hall.controller.adapters() == [view]
            fleet = await hall.controller.fleet()
            assert (fleet.generation, fleet.loaded) == (view.generation, [view.revision])
            assert fleet.replicas[0].serves == [fleet.stable, view.revision]
            assert hall.holds() == {"base"}

    tell(story())


def test_an_unloaded_adapter_is_named_by_no_replica_when_the_call_returns(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2")
            loaded = await hall.load("alpha")
            view = await hall.controller.unload_adapter("alpha")
            assert hall.also_serves() == [set(), set()]
            assert (view.revision, view.ready) == (loaded.revision, 0)
            assert view.generation > loaded.generation
            assert await hall.controller.adapters() == []
            with pytest.raises(AdapterNotLoaded, match="no adapter is loaded as 'alpha'"):
                await hall.controller.unload_adapter("alpha")

    tell(story())


def test_the_same_content_again_changes_nothing_and_another_needs_load_inplace(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            first = await hall.load("bot", "alpha")
            assert await hall.load("bot", "alpha") == first
            assert await hall.load("bot", "alpha", load_inplace=True) == first
            with pytest.raises(AdapterAlreadyLoaded, match="load_inplace"):
                await hall.load("bot", "beta")
            assert await hall.controller.adapters() == [first]
            second = await hall.load("bot", "beta", load_inplace=True)
            assert second.generation == first.generation + 1, "one decision"
            assert await hall.controller.adapters() == [second]
            assert [str(one) for one in hall.engines["r1"].serves[1:]] == [second.revision]

    tell(story())


def test_replacing_an_adapter_leaves_no_moment_without_its_name(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            await hall.load("bot", "alpha")
            hall.engines["r1"].served.clear()
            for name in ("beta", "gamma", "alpha"):
                await hall.load("bot", name, load_inplace=True)
            assert all("bot" in names for names in hall.engines["r1"].served)

    tell(story())


@pytest.mark.parametrize("name", ["", "base", "a:b", "a@b", "a/b", "a b"])
def test_a_name_that_no_request_could_use_is_refused(
    world: TinyWorld, tmp_path: Path, name: str
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            with pytest.raises(AdapterRefused, match="name"):
                await hall.load(name, "alpha")
            assert hall.also_serves() == [set()]

    tell(story())


def test_an_adapter_that_no_replica_could_hold_is_refused_with_nothing_changed(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path / "state") as hall:
            with pytest.raises(FleetNotReady):
                await hall.load("alpha")
            await hall.replicas("r1")
            journal = hall.journal()
            with pytest.raises(AdapterRefused):
                await hall.controller.load_adapter("x", str(tmp_path / "missing"))
            assert hall.journal() == journal

    tell(story())


def test_a_generation_that_has_passed_is_refused_for_loading_and_unloading(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            seen = (await hall.controller.fleet()).generation
            loaded = await hall.load("alpha", expected_generation=seen)
            with pytest.raises(GenerationMismatch) as refused:
                await hall.load("beta", expected_generation=seen)
            assert (refused.value.expected, refused.value.actual) == (seen, loaded.generation)
            with pytest.raises(GenerationMismatch):
                await hall.controller.unload_adapter("alpha", expected_generation=seen)
            assert hall.also_serves() == [{"alpha"}]
            now = loaded.generation
            await hall.controller.unload_adapter("alpha", expected_generation=now)

    tell(story())


def test_an_adapter_that_one_replica_cannot_serve_is_unloaded_again(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2")
            hall.engines["r2"].holding_fails["beta"] = RuntimeError("no memory")
            with pytest.raises(AdapterLoadFailed, match=r"beta.*: replica r2: no memory"):
                await hall.load("beta")
            assert await hall.controller.adapters() == []
            await until(lambda: hall.also_serves() == [set(), set()])
            await hall.until_serving("r1", "r2")
            hall.engines["r2"].holding_fails.clear()
            assert (await hall.load("beta")).ready == 2, "an old failure is no reason"

    tell(story())


def test_a_replacement_that_fails_brings_back_what_it_replaced(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2")
            first = await hall.load("bot", "alpha")
            hall.engines["r2"].holding_fails["bot"] = RuntimeError("no memory")
            with pytest.raises(AdapterLoadFailed):
                await hall.load("bot", "beta", load_inplace=True)
            hall.engines["r2"].holding_fails.clear()
            [back] = await hall.controller.adapters()
            assert (back.revision, back.lora_path) == (first.revision, hall.adapter("alpha"))
            await until(
                lambda: all(
                    [str(one) for one in each.serves[1:]] == [first.revision]
                    for each in hall.engines.values()
                )
            )

    tell(story())


def test_an_adapter_that_is_not_served_in_time_is_unloaded_again(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        hall = Hall(world, tmp_path, poll_s=60)
        hall.load_timeout_s = 0.1
        async with hall:
            await introduced(hall, layout)
            with pytest.raises(AdapterLoadTimeout) as late:
                await hall.load("alpha")
            assert (late.value.replicas, late.value.timeout_s) == (("r1",), 0.1)
            assert await hall.controller.adapters() == []
            assert hall.journal()["loaded"] == []

    tell(story())


def test_a_report_counts_no_more_once_it_was_answered_with_another_document(
    world: TinyWorld, layout: Layout, tmp_path: Path, images: dict[str, AdapterImage]
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=60) as hall:
            alpha = images["alpha"].revision
            want = await introduced(hall, layout)
            open_report = asyncio.create_task(hall.report(report(layout, acting_on=want)))
            loading = asyncio.create_task(hall.load("alpha"))
            with_it = (await asyncio.wait_for(open_report, 5)).desired
            assert with_it is not None
            serves = report(layout, acting_on=with_it, also_serves=(alpha.key,))
            open_report = asyncio.create_task(hall.report(serves))
            await asyncio.wait_for(loading, 5)
            unloading = asyncio.create_task(hall.controller.unload_adapter("alpha"))
            answer = await asyncio.wait_for(open_report, 5)
            assert answer.desired is not None
            assert answer.desired.also_serves == ()
            # it drops alpha now, while its latest report says that it serves it
            again = asyncio.create_task(hall.load("alpha"))
            await hall.until_fleet(lambda fleet: bool(fleet.loaded))
            await asyncio.wait_for(unloading, 5)
            assert not again.done()
            without = report(layout, acting_on=answer.desired)
            answer = await asyncio.wait_for(hall.report(without), 5)
            assert answer.desired is not None
            last = report(layout, acting_on=answer.desired, also_serves=(alpha.key,))
            open_report = asyncio.create_task(hall.report(last))
            assert (await asyncio.wait_for(again, 5)).ready == 1
            open_report.cancel()

    tell(story())


def test_a_late_joiner_serves_what_is_loaded_before_it_is_ready(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            await hall.load("alpha")
            await hall.replicas("r2")
            assert hall.also_serves() == [{"alpha"}, {"alpha"}]

    tell(story())


def test_a_restarted_controller_knows_what_was_loaded_and_from_where(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            loaded = await hall.load("alpha")
            await hall.restart()
            await hall.until_serving("r1")
            [again] = await hall.controller.adapters()
            assert (again.revision, again.lora_path) == (loaded.revision, loaded.lora_path)
            await hall.replicas("r2")
            assert hall.also_serves() == [{"alpha"}, {"alpha"}]
            await hall.restart(adapter=hall.adapter("gamma"))
            await until(lambda: hall.holds() == {"gamma"})
            assert hall.also_serves() == [{"alpha"}, {"alpha"}], "another default is no reason"

    tell(story())


def test_a_rollout_goes_on_while_adapters_come_and_go(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2")
            hall.engines["r1"].drained.clear()
            running = await hall.roll("beta")
            await until(lambda: not hall.engines["r1"].admission.is_open)
            loading = asyncio.create_task(hall.load("alpha"))
            await until(lambda: "alpha" in {one.name for one in hall.engines["r2"].also_serves})
            hall.engines["r1"].drained.set()
            assert (await loading).ready == 2
            assert (await hall.ended(running)).state == "succeeded"
            assert (hall.holds(), hall.also_serves()) == ({"beta"}, [{"alpha"}, {"alpha"}])

    tell(story())


def test_a_loaded_adapter_that_becomes_the_default_stays_loaded(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2")
            await hall.load("alpha")
            await hall.ended(await hall.roll("alpha"))
            [view] = await hall.controller.adapters()
            assert (view.ready, hall.also_serves()) == (2, [set(), set()])
            await hall.ended(await hall.roll("beta"))
            await until(lambda: hall.also_serves() == [{"alpha"}, {"alpha"}])
            assert all("alpha" in names for names in hall.engines["r1"].served)

    tell(story())


def test_an_adapter_that_cannot_be_packed_any_more_keeps_no_replica_from_its_default(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            loaded = await hall.load("alpha")
            shutil.rmtree(tmp_path / "adapters")
            await hall.restart()
            await hall.until_serving("r1")
            await hall.replicas("r2")
            await hall.until_serving("r1", "r2")
            assert hall.also_serves() == [{"alpha"}, set()]
            fleet = await hall.until_fleet(lambda fleet: fleet.replicas[1].failure is not None)
            assert str(fleet.replicas[1].failure).startswith(f"{loaded.revision}: ")
            [view] = await hall.controller.adapters()
            assert (view.ready, view.total) == (1, 2)
            await hall.load("alpha")  # which keeps a copy of it again
            assert hall.also_serves() == [{"alpha"}, {"alpha"}]

    tell(story())


def test_a_user_who_goes_away_while_an_adapter_fails_leaves_nothing_half_loaded(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2")
            hall.engines["r2"].holding_fails["beta"] = RuntimeError("no memory")
            before = (await hall.controller.fleet()).generation
            loading = asyncio.create_task(hall.load("beta"))
            # not: until it is loaded, which is over at once
            await hall.until_fleet(lambda fleet: fleet.generation > before)
            loading.cancel()
            await hall.until_fleet(lambda fleet: not fleet.loaded)
            await until(lambda: hall.also_serves() == [set(), set()])

    tell(story())
