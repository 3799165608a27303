"""Whole rollouts: the controller with real control loops over a fleet of slots."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.engine.admission import DrainTimeout
from tests.e2e.tiny_world import TinyWorld
from tests.serve_app.controller.hall import (
    CANARY,
    ERRORS,
    Hall,
    answered,
    paused,
    placed,
    tell,
    weights,
)
from tests.serve_app.fakes import until


@pytest.mark.parametrize("strategy", ["rolling", "all_at_once"])
def test_a_rollout_brings_its_adapter_to_every_replica(
    world: TinyWorld, tmp_path: Path, strategy: str
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2", "r3")
            done = await hall.ended(await hall.roll("beta", strategy=strategy))
            assert (done.state, done.total, done.committed) == ("succeeded", 3, 3)
            assert hall.holds() == {"beta"}
            fleet = await hall.controller.fleet()
            assert (fleet.stable, fleet.ready) == (done.target, True)
            assert len(hall.put.images) == 2, "the base and beta, packed once each"

    tell(story())


def test_a_replica_that_fails_sends_the_fleet_back_and_the_reason_is_kept(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2")
            await hall.ended(await hall.roll("alpha"))
            hall.engines["r2"].faults.append(DrainTimeout(2, 0.5))
            done = await hall.ended(await hall.roll("beta"))
            assert done.state == "aborted"
            assert done.reason == ("replica r2: 2 requests were still running after 0.5 s of drain")
            await hall.until_serving("r1", "r2")
            assert hall.holds() == {"alpha"}

    tell(story())


def test_an_abort_during_staging_or_swapping_brings_stable_back(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2")
            hall.engines["r2"].drained.clear()
            running = await hall.roll("beta")
            await until(lambda: not hall.engines["r2"].admission.is_open)
            assert hall.engines["r1"].default.name == "beta"
            await hall.controller.abort(running.id)
            done = await hall.ended(running)
            assert (done.state, done.reason) == ("aborted", "aborted by request")
            hall.engines["r2"].drained.set()
            await hall.until_serving("r1", "r2")
            assert hall.holds() == {"base"}
            again = await hall.controller.abort(running.id)
            assert again == done, "an abort of what has ended changes nothing"

    tell(story())


def test_a_rollout_over_a_running_one_takes_its_place(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path) as hall:
            await hall.replicas("r1", "r2")
            await hall.ended(await hall.roll("alpha"))
            hall.engines["r1"].drained.clear()
            first = await hall.roll("beta")
            await until(lambda: not hall.engines["r1"].admission.is_open)
            second = await hall.roll("gamma")
            assert (await hall.controller.rollout(first.id)).state == "superseded"
            assert second.previous.startswith("alpha@")
            hall.engines["r1"].drained.set()
            assert (await hall.ended(second)).state == "succeeded"
            assert hall.holds() == {"gamma"}
            ids = [rollout.id for rollout in await hall.controller.rollouts()]
            assert ids == [second.id, first.id, "rollout-1"]

    tell(story())


def test_a_rollout_overlaps_where_the_fleet_can_and_drains_elsewhere(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        for lanes, policy in ((1, "drain"), (2, "overlap")):
            async with Hall(world, tmp_path / policy, lanes=lanes) as hall:
                await hall.replicas("r1")
                done = await hall.ended(await hall.roll("alpha"))
                assert done.in_flight == policy
                assert hall.engines["r1"].policies[-1] == policy

    tell(story())


def test_an_abort_goes_back_the_way_it_came(world: TinyWorld, tmp_path: Path) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, lanes=2) as hall:
            await hall.replicas("r1", "r2")
            hall.engines["r2"].faults.append(DrainTimeout(2, 0.5))
            done = await hall.ended(await hall.roll("beta", in_flight="overlap"))
            assert done.state == "aborted"
            await until(lambda: hall.holds() == {"base"})
            assert hall.engines["r1"].policies == ["overlap", "overlap"]

    tell(story())


@pytest.mark.parametrize("placement", ["shared", "dedicated"])
def test_a_canary_goes_step_by_step_until_it_is_stable(
    world: TinyWorld, tmp_path: Path, placement: str
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, lanes=2) as hall:
            await hall.replicas("r1", "r2", "r3")
            running = await hall.roll("alpha", **CANARY, placement=placement)
            canary = await paused(hall, running)
            assert (canary.placement, canary.steps) == (placement, [10, 50])
            assert (canary.step, canary.weight, canary.pause) == (0, 10, "step")
            await until(lambda: weights(hall) == [10, 10, 10])
            held = [engine.default.name for engine in hall.engines.values()]
            assert sorted(held).count("alpha") == (1 if placement == "dedicated" else 0)
            others = [{"alpha"}] * 3 if placement == "shared" else [set()] * 3
            assert hall.also_serves() == others
            await hall.controller.promote(running.id)
            assert (await hall.ended(running)).state == "succeeded"
            await until(lambda: weights(hall) == [None] * 3)
            await until(lambda: hall.also_serves() == [set()] * 3)
            assert hall.holds() == {"alpha"}

    tell(story())


def test_a_canary_that_fails_its_analysis_is_taken_back_with_its_numbers(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, lanes=2, poll_s=0.05) as hall:
            await hall.replicas("r1", "r2")
            steps = [{"weight": 25, "hold": "1h"}]
            running = await hall.roll("beta", strategy="canary", steps=steps, analysis=ERRORS)
            await placed(hall, running)
            answered(hall, "base", failed=0, of=12)
            answered(hall, "beta", failed=2, of=4)
            done = await hall.ended(running)
            assert (done.state, hall.holds()) == ("aborted", {"base"})
            assert done.reason is not None
            assert "error_rate is 0.5, and has to be at most 0.1" in done.reason
            assert done.canary is not None
            [verdict] = [one for one in done.canary.verdicts if one.outcome == "fail"]
            assert (verdict.step, verdict.weight, verdict.share) == (0, 25, 25)
            assert (verdict.requests, verdict.measurements[0].canary) == (32, 0.5)
            await until(lambda: hall.also_serves() == [set(), set()])

    tell(story())


def test_a_canary_that_passes_its_analysis_is_promoted_by_it(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, lanes=2, poll_s=0.05) as hall:
            await hall.replicas("r1", "r2")
            hall.probing.scores = {"mine:probe": {"gain": 0.5}}
            probe = {"function": "mine:probe", "scores": {"gain": {"min": 0}}}
            analysis = ERRORS | {"probes": [probe]}
            steps = [{"weight": 25, "hold": 0.1}]
            running = await hall.roll("beta", strategy="canary", steps=steps, analysis=analysis)
            await placed(hall, running)
            answered(hall, "beta", failed=0, of=4)
            done = await hall.ended(running)
            assert (done.state, hall.holds()) == ("succeeded", {"beta"})
            assert done.canary is not None
            assert [one.outcome for one in done.canary.verdicts] == ["pass"]

    tell(story())


def test_a_restarted_controller_goes_on_in_the_step_that_was_reached(
    world: TinyWorld, tmp_path: Path
) -> None:
    async def story() -> None:
        async with Hall(world, tmp_path, lanes=2) as hall:
            await hall.replicas("r1", "r2")
            running = await hall.roll("alpha", **CANARY)
            await paused(hall, running)
            await hall.restart()
            await hall.until_serving("r1", "r2")
            canary = await paused(hall, running)
            assert (canary.step, canary.weight) == (0, 10)
            assert weights(hall) == [10, 10]
            await hall.controller.promote(running.id, full=True)
            assert (await hall.ended(running)).state == "succeeded"

    tell(story())
