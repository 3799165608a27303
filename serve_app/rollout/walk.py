"""One step of a rollout through the transition table: the only place that changes its state."""

from __future__ import annotations

from dataclasses import replace

from serve_app.rollout.state import TRANSITIONS, Fleet, Pause, Progress, Rollout, State


def to(
    fleet: Fleet,
    state: State,
    *,
    at: float,
    reason: str | None = None,
    pause: Pause | None = None,
) -> Fleet:
    """The fleet with its rollout in `state`. `reason` None keeps the one that it has."""
    rollout = fleet.rollout
    assert rollout is not None
    assert state in TRANSITIONS[rollout.state], (rollout, state)
    rollout = replace(
        rollout,
        state=state,
        reason=rollout.reason if reason is None else reason,
        pause=pause,
    )
    if rollout.ended:
        rollout = replace(rollout, ended_at=at, progress=progress(fleet, rollout))
    return replace(fleet, rollout=rollout)


def fail(fleet: Fleet, rollout: Rollout, why: str, *, at: float) -> Fleet:
    """What the plan says about failures: back to stable, or wait for somebody to decide."""
    if rollout.plan.on_failure == "rollback":
        return to(fleet, State.ABORTING, at=at, reason=why)
    return to(fleet, State.PAUSED, at=at, reason=why, pause=Pause.FAILURE)


def progress(fleet: Fleet, rollout: Rollout) -> Progress:
    """How far a rollout is; of one that has ended, how far it was then."""
    if rollout.progress is not None:
        return rollout.progress
    seen = fleet.observed.values()
    return Progress(
        total=len(seen),
        staged=sum(observed.has(rollout.target) for observed in seen),
        committed=sum(observed.serves(rollout.target) for observed in seen),
    )
