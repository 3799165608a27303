"""Look-ups in the rollouts that the fleet remembers."""

from __future__ import annotations

from hotswap_lib import Revision
from serve_app.rollout.plan import InFlight
from serve_app.rollout.state import Fleet, Rollout, State
from serve_app.wire.errors import NothingToUndo, RolloutNotFound


def all_rollouts(fleet: Fleet) -> list[Rollout]:
    """Oldest first."""
    return [*fleet.past, *([] if fleet.rollout is None else [fleet.rollout])]


def find(fleet: Fleet, id: str) -> Rollout:
    """Raises `RolloutNotFound`."""
    for rollout in all_rollouts(fleet):
        if rollout.id == id:
            return rollout
    raise RolloutNotFound(id)


def started_with(fleet: Fleet, key: str | None) -> Rollout | None:
    """The rollout that was started with this idempotency key."""
    every = all_rollouts(fleet)
    return next((one for one in every if key is not None and one.key == key), None)


def revision_to_undo_to(fleet: Fleet, to: str | None) -> Revision:
    """The newest earlier stable revision, or the newest one that `to` names.

    Raises `NothingToUndo`.
    """
    earlier = [Revision.parse(key) for key in fleet.history if key != fleet.stable]
    for revision in reversed(earlier):
        if to is None or revision.matches(to):
            return revision
    raise NothingToUndo(to)


def undo_in_flight(fleet: Fleet) -> InFlight | None:
    """The in-flight policy of an undo: that of the rollout that it takes back.

    None: the fleet's default.
    """
    for rollout in reversed(all_rollouts(fleet)):
        if rollout.state is State.SUCCEEDED:
            return "drain" if rollout.plan.in_flight == "drain" else None
    return None
