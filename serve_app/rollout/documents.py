"""The document of each replica, made from the machine's state."""

from __future__ import annotations

from dataclasses import replace

from serve_app.rollout.canary import traffic
from serve_app.rollout.state import Desired, Fleet, State, Traffic


class Documents:
    """The desired state of each replica. The parts that all replicas share are made once."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        rollout = fleet.running
        forward = rollout is not None and rollout.state is not State.ABORTING
        now = traffic(fleet)
        self._assigned = fleet.assigned
        self._also_serves = _also_serves(fleet, now)
        self._stable = Desired(
            epoch=fleet.epoch,
            generation=fleet.generation,
            hold=fleet.stable,
            stage=rollout.target if rollout and forward else None,
            in_flight=fleet.in_flight,
            traffic=now,
            stable=fleet.stable,
            loaded=fleet.loaded,
            rollouts=fleet.rollouts,
        )
        self._made: dict[str, Desired] = {}  # by revision: most replicas get the same document

    def of(self, replica: str) -> Desired:
        """The replica's document. A replica that is not in the fleet yet gets stable."""
        hold = self._assigned.get(replica, self._stable.hold)
        if hold not in self._made:
            others = tuple(name for name in self._also_serves if name != hold)
            self._made[hold] = replace(self._stable, hold=hold, also_serves=others)
        return self._made[hold]


def _also_serves(fleet: Fleet, now: Traffic | None) -> tuple[str, ...]:
    """Revisions that every replica serves: the loaded adapters, and a shared canary."""
    if now is None or now.placement == "dedicated" or now.weight == 0:
        return fleet.loaded
    return (*fleet.loaded, *({now.canary} - {*fleet.loaded}))
