"""User requests about rollouts: what each one does, and when it is refused."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hotswap_lib import AdapterRefused, Layout
from serve_app.engine.admission import DrainTimeout
from serve_app.rollout.errors import GenerationMismatch, IllegalEvent
from serve_app.wire.errors import (
    FleetNotReady,
    KeyReused,
    NothingToUndo,
    PlanImpossible,
    ProbeInvalid,
    RolloutNotFound,
)
from tests.e2e.tiny_world import TinyWorld
from tests.serve_app.controller.hall import (
    CANARY,
    Hall,
    introduced,
    paused,
    tell,
    until_writing,
    weights,
)
from tests.serve_app.fakes import until


def test_a_bad_adapter_is_refused_and_nothing_has_changed(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path / "state") as hall:
            await hall.replicas("r1", "r2")
            bad = tmp_path / "bad"
            bad.mkdir()
            config = json.loads((world.adapter("alpha") / "adapter_config.json").read_text())
            (bad / "adapter_config.json").write_text(json.dumps({**config, "r": 4096}))
            (bad / "adapter_model.safetensors").write_bytes(
                (world.adapter("alpha") / "adapter_model.safetensors").read_bytes()
            )
            journal = (tmp_path / "state" / "journal.json").read_bytes()
            for source in (str(bad), str(tmp_path / "missing")):
                with pytest.raises(AdapterRefused):
                    await hall.controller.start_rollout({"adapter": source})
            assert (tmp_path / "state" / "journal.json").read_bytes() == journal
            assert not (tmp_path / "state" / "adapters").exists()
            assert (hall.holds(), await hall.controller.rollouts()) == ({"base"}, [])

    tell(story())


def test_no_rollout_starts_before_a_replica_has_reported(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            with pytest.raises(FleetNotReady):
                await hall.roll("alpha")

    tell(story())


def test_an_unknown_rollout_is_named(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            for ask in (hall.controller.rollout, hall.controller.abort):
                with pytest.raises(RolloutNotFound, match="there is no rollout 'rollout-9'"):
                    await ask("rollout-9")

    tell(story())


def test_overlap_on_one_lane_is_refused_before_anything_has_changed(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            with pytest.raises(PlanImpossible, match="needs two lanes") as refused:
                await hall.roll("alpha", in_flight="overlap")
            assert refused.value.code == "plan_impossible"
            assert await hall.controller.rollouts() == []

    tell(story())


@pytest.mark.parametrize(
    ("plan", "lanes", "error", "why"),
    [
        ({**CANARY, "placement": "dedicated"}, 2, PlanImpossible, "needs two replicas"),
        (CANARY, 1, PlanImpossible, "needs two replicas"),
        ({**CANARY, "placement": "shared"}, 1, PlanImpossible, "needs two lanes"),
        ({"in_flight": "overlap"}, 1, PlanImpossible, "needs two lanes"),
        (
            CANARY | {"analysis": {"probes": [{"function": "a:b", "scores": {"x": {"min": 0}}}]}},
            2,
            ProbeInvalid,
            "a:b cannot be imported",
        ),
    ],
)
def test_a_plan_that_this_fleet_cannot_do_is_refused_with_nothing_changed(
    world: TinyWorld,
    tmp_path: Path,
    plan: dict[str, Any],
    lanes: int,
    error: type[Exception],
    why: str,
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, lanes=lanes) as hall:
            await hall.replicas("r1")
            journal = hall.journal()
            with pytest.raises(error, match=why):
                await hall.roll("alpha", **plan)
            assert (await hall.controller.rollouts(), hall.journal()) == ([], journal)

    tell(story())


def test_a_plan_may_say_drain_and_its_undo_drains_as_well(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, lanes=2) as hall:
            await hall.replicas("r1")
            await hall.ended(await hall.roll("alpha", in_flight="drain"))
            done = await hall.ended(await hall.controller.undo())
            assert (done.state, done.in_flight) == ("succeeded", "drain")
            assert set(hall.engines["r1"].policies) == {"drain"}

    tell(story())


def test_undo_goes_back_one_revision_though_its_source_is_gone(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        moved = tmp_path / "alpha"
        shutil.copytree(world.adapter("alpha"), moved)
        async with Hall(world, tmp_path / "state") as hall:
            await hall.replicas("r1", "r2")
            await hall.ended(await hall.controller.start_rollout({"adapter": str(moved)}))
            await hall.ended(await hall.roll("beta"))
            shutil.rmtree(moved)
            done = await hall.ended(await hall.controller.undo())
            assert (done.state, hall.holds()) == ("succeeded", {"alpha"})

    tell(story())


def test_undo_of_the_first_rollout_is_the_base_model(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            await hall.ended(await hall.roll("alpha"))
            await hall.ended(await hall.controller.undo())
            assert hall.holds() == {"base"}

    tell(story())


def test_undo_while_something_runs_aborts_it(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2")
            hall.engines["r1"].drained.clear()
            running = await hall.roll("alpha")
            undone = await hall.controller.undo()
            assert undone.id == running.id
            hall.engines["r1"].drained.set()
            done = await hall.ended(running)
            assert (done.state, done.reason) == ("aborted", "undone")

    tell(story())


def test_there_is_nothing_to_undo_in_the_beginning(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            with pytest.raises(NothingToUndo):
                await hall.controller.undo()

    tell(story())


def test_undo_of_a_revision_whose_kept_copy_is_gone_is_refused_with_nothing_changed(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            for name in ("alpha", "beta"):
                await hall.ended(await hall.roll(name))
            await hall.restart()
            await hall.until_serving("r1")
            shutil.rmtree(tmp_path / "adapters")
            with pytest.raises(Exception, match="alpha"):
                await hall.controller.undo()
            assert (hall.holds(), len(await hall.controller.rollouts())) == ({"beta"}, 2)

    tell(story())


def test_a_pause_holds_a_rollout_until_it_is_resumed(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2")
            hall.engines["r1"].drained.clear()
            running = await hall.roll("alpha")
            await until(lambda: not hall.engines["r1"].admission.is_open)
            assert (await hall.controller.pause(running.id)).state == "paused"
            hall.engines["r1"].drained.set()
            await hall.until_serving("r1", "r2")
            assert hall.engines["r2"].default.name == "base"
            await hall.controller.resume(running.id)
            assert (await hall.ended(running)).state == "succeeded"

    tell(story())


def test_a_retry_repeats_what_failed(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2")
            hall.engines["r2"].faults.append(DrainTimeout(2, 0.5))
            running = await hall.roll("alpha", on_failure="pause")
            await hall.until_rollout(running.id, lambda now: now.state == "paused")
            with pytest.raises(IllegalEvent, match="retry, promote or abort"):
                await hall.controller.resume(running.id)
            again = await hall.controller.retry(running.id)
            assert again.id == running.id
            assert (await hall.ended(running)).state == "succeeded"
            with pytest.raises(IllegalEvent, match="has succeeded"):
                await hall.controller.retry(running.id)

    tell(story())


def test_what_was_taken_back_is_begun_again_by_a_retry(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            hall.engines["r1"].faults.append(DrainTimeout(2, 0.5))
            failed = await hall.ended(await hall.roll("alpha"))
            assert failed.state == "aborted"
            await hall.until_serving("r1")
            again = await hall.controller.retry(failed.id, key="k")
            assert again.id != failed.id
            assert (await hall.controller.retry(failed.id, key="k")).id == again.id
            assert (await hall.ended(again)).state == "succeeded"

    tell(story())


def test_undo_can_go_back_to_any_earlier_revision(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            for name in ("alpha", "beta", "gamma"):
                await hall.ended(await hall.roll(name))
            for to in ("unknown", world.revision("gamma")):
                with pytest.raises(NothingToUndo, match=to):
                    await hall.controller.undo(to=to)
            for to in ("alpha", world.revision("beta"), "base"):
                undone = await hall.ended(await hall.controller.undo(to=to))
                assert undone.state == "succeeded"
                assert hall.holds() == {to.split("@")[0]}

    tell(story())


def test_every_verb_refuses_an_earlier_generation(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, lanes=2) as hall:
            await hall.replicas("r1")
            running = await hall.roll("alpha", **CANARY)
            await paused(hall, running)
            control = hall.controller
            now = (await control.fleet()).generation
            late: dict[str, Any] = {"expected_generation": now - 1}
            asks = [
                control.start_rollout({"adapter": "base"}, **late),
                control.promote(running.id, **late),
                control.abort(running.id, **late),
                control.pause(running.id, **late),
                control.resume(running.id, **late),
                control.retry(running.id, **late),
                control.undo(**late),
            ]
            for ask in asks:
                with pytest.raises(GenerationMismatch):
                    await ask
            assert (await control.fleet()).generation == now
            await control.promote(running.id, expected_generation=now)
            assert (await hall.ended(running)).state == "succeeded"

    tell(story())


def test_the_same_request_under_the_same_key_changes_nothing(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, lanes=2) as hall:
            await hall.replicas("r1")
            control = hall.controller
            plan = {"adapter": hall.adapter("alpha"), **CANARY}
            plan["steps"] = [{"weight": 10 * n, "hold": "manual"} for n in (1, 2, 3)]
            both = await asyncio.gather(*(control.start_rollout(plan, key="k") for _ in range(2)))
            assert {rollout.id for rollout in both} == {"rollout-1"}
            await paused(hall, both[0])
            await control.promote("rollout-1", key="k")
            await until(lambda: weights(hall) == [20])
            assert (await paused(hall, both[0])).step == 1
            seen = (await control.fleet()).generation
            late: dict[str, Any] = {"key": "k", "expected_generation": 1}
            assert (await control.promote("rollout-1", **late)).canary.step == 1  # type: ignore[union-attr]
            assert (await control.start_rollout(plan, **late)).id == "rollout-1"
            await hall.restart()
            await hall.until_serving("r1")
            control = hall.controller
            assert (await control.promote("rollout-1", **late)).canary.step == 1  # type: ignore[union-attr]
            assert (await control.fleet()).generation == seen
            with pytest.raises(KeyReused, match="'k' was used for another request"):
                await control.start_rollout({"adapter": "base"}, key="k")
            await control.promote("rollout-1", key="another")
            assert (await paused(hall, both[0])).step == 2
            await control.undo(key="k")
            assert (await hall.ended(both[0])).reason == "undone"
            again = await control.undo(key="k")
            assert (again.id, len(await control.rollouts())) == ("rollout-1", 1)

    tell(story())


def test_an_undo_under_the_same_key_goes_back_once(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1")
            for name in ("alpha", "beta", "gamma"):
                await hall.ended(await hall.roll(name))
            first = await hall.ended(await hall.controller.undo(key="k"))
            assert (await hall.controller.undo(key="k")).id == first.id
            assert hall.holds() == {"beta"}
            with pytest.raises(KeyReused):
                await hall.controller.undo(to="alpha", key="k")

    tell(story())


def test_a_verb_for_a_rollout_that_was_replaced_meanwhile_does_not_reach_the_new_one(
    world: TinyWorld, layout: Layout, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, poll_s=60) as hall:
            await introduced(hall, layout)
            first = await hall.roll("alpha")
            hall.watched.slow_s = 0.1
            newer = asyncio.create_task(hall.roll("beta"))
            await until_writing(hall)
            aborting = asyncio.create_task(hall.controller.abort(first.id))
            with pytest.raises(IllegalEvent, match=first.id):
                await aborting
            second = await newer
            assert (await hall.controller.rollout(second.id)).state == "staging"
            for verb in ("promote", "pause", "resume"):
                with pytest.raises(IllegalEvent, match=first.id):
                    await getattr(hall.controller, verb)(first.id)

    tell(story())
