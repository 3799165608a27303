"""Transitions of a rollout: the only place that changes its state, and only as `TABLE` has it."""

from __future__ import annotations

from dataclasses import replace

from serve_app.rollout.errors import IllegalEvent
from serve_app.rollout.events import Event
from serve_app.rollout.state import Fleet, Pause, Progress, Rollout, State
from serve_app.rollout.table import allows


def to(
    fleet: Fleet,
    state: State,
    *,
    event: type[Event],
    at: float,
    reason: str | None = None,
    pause: Pause | None = None,
) -> Fleet:
    """The fleet with its rollout in `state`, because of `event`.

    Args:
        at: seconds since the epoch; when the rollout ends, its end.
        reason: None keeps the one that it has.
        pause: what a paused rollout waits for.

    Raises:
        IllegalEvent: the table has no such transition.
    """
    rollout = fleet.rollout
    assert rollout is not None
    if not allows(rollout.state, event, state):
        raise IllegalEvent(event.__name__, f"{rollout.state} does not lead to {state} by it")
    rollout = replace(
        rollout,
        state=state,
        reason=rollout.reason if reason is None else reason,
        pause=pause,
    )
    if rollout.ended:
        rollout = replace(rollout, ended_at=at, progress=progress(fleet, rollout))
    return replace(fleet, rollout=rollout)


def fail(fleet: Fleet, rollout: Rollout, why: str, *, event: type[Event], at: float) -> Fleet:
    """Roll back to stable, or wait for a user, as the plan's `on_failure` says."""
    if rollout.plan.on_failure == "rollback":
        return to(fleet, State.ABORTING, event=event, at=at, reason=why)
    return to(fleet, State.PAUSED, event=event, at=at, reason=why, pause=Pause.FAILURE)


def next_step(fleet: Fleet, *, at: float, full: bool = False) -> Fleet:
    """Leave the current step, or all of them; the hold of the next one begins once it is placed."""
    rollout = fleet.rollout
    assert rollout is not None
    step = len(rollout.plan.steps) if full else rollout.step + 1
    deadline_at = at + rollout.plan.progress_deadline
    rollout = replace(rollout, step=step, placed_at=None, deadline_at=deadline_at)
    return replace(fleet, rollout=rollout)


def progress(fleet: Fleet, rollout: Rollout) -> Progress:
    """The replicas that have staged and committed the target; at its end, if it has ended."""
    if rollout.progress is not None:
        return rollout.progress
    seen = fleet.observed.values()
    return Progress(
        total=len(seen),
        staged=sum(observed.has(rollout.target) for observed in seen),
        committed=sum(observed.serves(rollout.target) for observed in seen),
    )
