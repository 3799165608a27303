"""What replicas are told: the whole document for each, made from the machine's state."""

from __future__ import annotations

from dataclasses import replace

from serve_app.rollout.canary import traffic
from serve_app.rollout.state import Desired, Fleet, State, Traffic


class Documents:
    """What each replica shall hold now. What is the same for all of them is looked at once."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        rollout = fleet.running
        forward = rollout is not None and rollout.state is not State.ABORTING
        now = traffic(fleet)
        self._assigned = fleet.assigned
        self._beside = _beside(fleet, now)
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
        self._made: dict[str, Desired] = {}  # by what they hold: most replicas get the same one

    def of(self, replica: str) -> Desired:
        """A replica that nobody knows yet gets stable."""
        hold = self._assigned.get(replica, self._stable.hold)
        if hold not in self._made:
            beside = tuple(name for name in self._beside if name != hold)
            self._made[hold] = replace(self._stable, hold=hold, also_serves=beside)
        return self._made[hold]


def _beside(fleet: Fleet, now: Traffic | None) -> tuple[str, ...]:
    """What every replica serves for requests that name it, or that a canary's share goes to."""
    if now is None or now.placement == "dedicated" or now.weight == 0:
        return fleet.loaded
    return (*fleet.loaded, *({now.canary} - {*fleet.loaded}))
