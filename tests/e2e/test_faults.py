"""Real kills, real saturation: what the fleet does when something is taken away from it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from serve_app.rollout.plan import InFlight, Plan

from .conftest import Cluster, deployed
from .fleet import Fleet, Load, eventually
from .tiny_world import TinyWorld


@pytest.fixture(scope="module")
def fleet(cluster: Cluster, world: TinyWorld) -> Iterator[Fleet]:
    """Two replicas that are full with four requests each."""
    with deployed(
        cluster, world, app="faults", adapter=str(world.adapter("alpha")), max_ongoing_requests=4
    ) as running:
        yield running


def test_swaps_go_through_while_every_replica_is_saturated(fleet: Fleet) -> None:
    with Load(fleet, clients=16, max_tokens=24) as load:
        eventually(
            lambda: all(r.running == 4 for r in fleet.client.fleet().replicas),
            what="both replicas being full",
        )
        for name in ("beta", "alpha"):
            fleet.roll(name)
        load.wait_for(20)
    assert load.failures == []
    assert load.mismatched() == []


def test_a_replica_killed_under_load_comes_back_on_what_the_fleet_holds(fleet: Fleet) -> None:
    held = fleet.roll("beta")  # not the first one
    victim = fleet.settle(replicas=2).replicas[0]
    assert victim.pid is not None
    with Load(fleet, clients=4) as load:
        load.wait_for(10)
        os.kill(victim.pid, signal.SIGKILL)
        eventually(
            lambda: (
                {r.id for r in fleet.client.fleet().replicas if r.serving} - {victim.id}
                and victim.id not in {r.id for r in fleet.client.fleet().replicas}
            ),
            what="the dead replica leaving",
        )
        view = fleet.settle(replicas=2)
        load.wait_for(20)
    assert {r.revision for r in view.replicas} == {held}
    assert {answer.revision for answer in load.answers} == {held}
    assert load.mismatched() == []
    newcomer = next(r for r in view.replicas if r.id != victim.id)
    eventually(lambda: fleet.ask("who").replica == newcomer.id or None, what="the newcomer serving")


@pytest.mark.parametrize("in_flight", ["drain", pytest.param("overlap", marks=pytest.mark.slow)])
def test_a_controller_killed_in_the_middle_of_a_rolling_swap_resumes_and_finishes(
    fleet: Fleet, in_flight: InFlight
) -> None:
    before = fleet.roll("alpha")
    epoch = fleet.client.fleet().epoch
    with ThreadPoolExecutor() as pool:
        # requests that keep a draining first wave where it is, so that the kill is in the middle
        slow = [pool.submit(fleet.ask, f"slow {i}", max_tokens=2500) for i in range(6)]
        eventually(
            lambda: all(r.running > 0 for r in fleet.client.fleet().replicas),
            what="a long request on each replica",
        )
        rollout = fleet.client.start(
            Plan(adapter=str(fleet.world.adapter("gamma")), in_flight=in_flight)
        )
        eventually(
            lambda: fleet.client.rollout(rollout.id).state != "staging",
            what="the first wave",
        )
        if in_flight == "drain":  # an overlap waits for nobody: it may be over by now
            assert fleet.client.rollout(rollout.id).committed == 0
        fleet.process("RolloutController").kill()
        ended = fleet.client.wait(rollout.id, timeout_s=120)
        answers = [future.result() for future in slow]
    assert ended.state == "succeeded"
    view = fleet.settle(replicas=2)
    assert view.epoch > epoch
    assert {r.revision for r in view.replicas} == {fleet.world.revision("gamma")}
    assert view.history[-2:] == [before, fleet.world.revision("gamma")]
    # they ran on one revision from first token to last, through kill and swap
    assert all(answer.revision in fleet.world.revisions for answer in answers)
    assert all(fleet.is_exact(answer) for answer in answers)


@pytest.mark.slow
def test_an_undo_after_a_controller_crash_still_knows_the_way_back(fleet: Fleet) -> None:
    before = fleet.roll("alpha")
    fleet.roll("beta")
    fleet.process("RolloutController").kill()
    fleet.settle(replicas=2)
    undone = eventually(lambda: fleet.client.undo(), what="the new controller answering")
    assert fleet.client.wait(undone.id, timeout_s=60).state == "succeeded"
    assert fleet.ask("back").revision == before
