"""Canaries on two nodes with four replicas: dedicated placement, the share, and deaths."""

from __future__ import annotations

import itertools
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from ray import serve

from serve_app.client import RequestRejected, ServerUnreachable
from serve_app.rollout.plan import Placement

from .canaries import (
    at_step,
    canary,
    check_garbage_is_taken_back,
    check_sessions_and_pins,
    ended,
    revisions,
)
from .conftest import CPUS, Cluster, deployed
from .fleet import Fleet, Load, eventually
from .tiny_world import TinyWorld

pytestmark = pytest.mark.slow
REPLICAS = 4


@pytest.fixture(scope="module")
def fleet(cluster: Cluster, world: TinyWorld) -> Iterator[Fleet]:
    """Four replicas, two on each of two nodes; gateway and controller are on the first one."""
    settings: dict[str, Any] = {"replicas": REPLICAS, "num_cpus": CPUS / 2 - 1, "app": "canary"}

    def second_node() -> None:
        """Once the first one is full, so that nothing but replicas is on the second."""

        def full() -> bool:
            model = serve.status().applications["canary"].deployments["Model"]
            return bool(model.replica_states.get("RUNNING") == REPLICAS // 2)

        eventually(full, within_s=200, what="a full node")
        cluster.nodes.add_node(num_cpus=CPUS)

    settings |= {"adapter": str(world.adapter("alpha")), "meanwhile": second_node}
    with deployed(cluster, world, **settings) as running:
        yield running
    for node in list(cluster.nodes.worker_nodes):
        cluster.kill(node)


def test_a_dedicated_canary_that_answers_garbage_is_taken_back_at_its_first_step(
    fleet: Fleet, tmp_path: Path
) -> None:
    check_garbage_is_taken_back(fleet, tmp_path, "dedicated", replicas=REPLICAS)


@pytest.mark.parametrize(
    ("placement", "step", "requests"), [("shared", 0, 2_000), ("dedicated", 1, 1_000)]
)
def test_the_canarys_share_of_the_answers_is_its_weight(
    fleet: Fleet, placement: Placement, step: int, requests: int
) -> None:
    rollout = canary(fleet, "gamma", placement=placement)
    at_step(fleet, rollout.id, 0)
    for _ in range(step):
        fleet.client.promote(rollout.id)
    now = at_step(fleet, rollout.id, step)
    if placement == "dedicated":  # until those who route have heard of it
        eventually(
            lambda: 2 <= Counter(revisions(fleet, [None] * 10))[rollout.target] <= 8,
            what="requests on both",
        )
    before = fleet.client.rollout(rollout.id)
    got = Counter(revisions(fleet, [None] * requests))
    share = 100 * got[rollout.target] / requests
    assert abs(share - now.weight) <= 2, got

    def measured() -> bool:
        """Once every replica has reported: the fleet says the same."""
        seen = fleet.client.rollout(rollout.id).canary
        assert seen is not None
        return seen.requests >= requests and abs((seen.share or 0) - now.weight) <= 5

    eventually(measured, what="the measured share")
    assert set(got) == {rollout.target, before.previous}
    fleet.client.abort(rollout.id)
    assert ended(fleet, rollout.id).state == "aborted"


def test_sessions_of_a_dedicated_canary_stay_and_only_join_and_pins_are_kept(fleet: Fleet) -> None:
    check_sessions_and_pins(fleet, "dedicated")


# ---- a table of what dies at which step -------------------------------------------------------

Kill = Callable[[Fleet, Cluster], None]


def kill_controller(fleet: Fleet, _: Cluster) -> None:
    fleet.process("RolloutController").kill()


def kill_replica(fleet: Fleet, _: Cluster) -> None:
    pids = [replica.pid for replica in fleet.client.fleet().replicas if replica.pid]
    os.kill(pids[0], signal.SIGKILL)


def kill_node(_: Fleet, cluster: Cluster) -> None:
    [node] = cluster.nodes.worker_nodes
    cluster.kill(node)
    cluster.nodes.add_node(num_cpus=CPUS)


# the node first: a controller that was killed may come back on it
VICTIMS: dict[str, Kill] = {
    "node": kill_node,
    "replica": kill_replica,
    "controller": kill_controller,
}
_names = itertools.cycle(["beta", "gamma", "alpha"])


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("victim", VICTIMS)
def test_whatever_dies_at_whichever_step_the_rollout_ends_as_it_would_have(
    fleet: Fleet, cluster: Cluster, victim: str, step: int
) -> None:
    stable = fleet.settle(replicas=REPLICAS).stable
    name = next(each for each in _names if fleet.world.revision(each) != stable)
    with Load(fleet, clients=4) as load:
        load.wait_for(10)
        rollout = canary(fleet, name)
        for now in range(min(step, 1) + 1):
            at_step(fleet, rollout.id, now)
            if now < step:
                fleet.client.promote(rollout.id)
        VICTIMS[victim](fleet, cluster)  # in the last row: while the whole fleet moves
        if step < 2:
            eventually(
                lambda: fleet.client.rollout(rollout.id).canary is not None, what="the controller"
            )
            fleet.settle(replicas=REPLICAS)
            at_step(fleet, rollout.id, step)
            promote(fleet, rollout.id)
        final = ended(fleet, rollout.id)
        view = fleet.settle(replicas=REPLICAS)
        load.wait_for(20)
    assert final.state == "succeeded", final
    assert (view.stable, final.previous) == (rollout.target, stable)
    assert {tuple(replica.serves) for replica in view.replicas} == {(rollout.target,)}
    assert load.failures == [], "the gateway asks again for what a dead replica had"
    assert load.mismatched() == []


def promote(fleet: Fleet, id: str) -> None:
    """All the way; a controller that has just come back may be asked again with the same key."""

    def asked() -> bool:
        with suppress(RequestRejected, ServerUnreachable):
            fleet.client.promote(id, full=True, key=f"all of {id}")
            return True
        return False

    eventually(asked, what="the promotion")
