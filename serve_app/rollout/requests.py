"""What users ask of a rollout: how each request changes the fleet, or why it cannot be now.

The machine applies a request with this and then settles. A request that names a generation which
is not the fleet's is refused; one whose key was seen before has been answered already.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from serve_app.rollout.errors import GenerationMismatch, IllegalEvent
from serve_app.rollout.events import (
    AbortRequested,
    Asked,
    LoadRequested,
    PauseRequested,
    PromoteRequested,
    Requested,
    ResumeRequested,
    RetryRequested,
    UnloadRequested,
)
from serve_app.rollout.state import Fleet, Pause, Rollout, State
from serve_app.rollout.walk import to

_KEYS = 200  # of the last requests: who has not heard of its answer asks again soon


def apply(fleet: Fleet, asked: Requested) -> Fleet:
    """The fleet with the request in it. Raises `IllegalEvent` and `GenerationMismatch`."""
    if asked.key is not None and asked.key in fleet.keys:
        return fleet
    expected = asked.expected_generation
    if expected is not None and expected != fleet.generation:
        raise GenerationMismatch(expected, fleet.generation)
    after = _apply(fleet, asked)
    if asked.key is not None:
        after = replace(after, keys=(*after.keys, asked.key)[-_KEYS:])
    return after


def next_step(fleet: Fleet, *, at: float, full: bool = False) -> Fleet:
    """Leave the step that the rollout is in, or all that are left; its hold begins when placed."""
    rollout = fleet.rollout
    assert rollout is not None
    step = len(rollout.plan.steps) if full else rollout.step + 1
    deadline_at = at + rollout.plan.progress_deadline
    rollout = replace(rollout, step=step, placed_at=None, deadline_at=deadline_at)
    return replace(fleet, rollout=rollout)


def _apply(fleet: Fleet, asked: Requested) -> Fleet:
    match asked:
        case Asked():
            return _begin(fleet, asked)
        case AbortRequested():
            if fleet.running is None or fleet.running.state is State.ABORTING:
                return fleet
            return to(fleet, State.ABORTING, at=asked.at, reason=asked.reason)
        case PauseRequested():
            rollout = _going(fleet, "a pause")
            if rollout.state is State.PAUSED:
                return fleet
            return to(fleet, State.PAUSED, at=asked.at, reason="paused", pause=Pause.ASKED)
        case ResumeRequested():
            return _resume(fleet, at=asked.at)
        case PromoteRequested():
            return _promote(fleet, asked)
        case RetryRequested():
            rollout = _going(fleet, "a retry")
            if rollout.pause is not Pause.FAILURE:
                raise IllegalEvent("a retry", "nothing has failed")
            return _forgiven(fleet, at=asked.at)
        case LoadRequested():
            loaded = tuple(name for name in fleet.loaded if name != asked.instead_of)
            if asked.revision not in loaded:
                loaded = (*loaded, asked.revision)
            return replace(fleet, loaded=loaded)
        case UnloadRequested():
            loaded = tuple(name for name in fleet.loaded if name != asked.revision)
            return replace(fleet, loaded=loaded)
        case _:
            assert_never(asked)


def _begin(fleet: Fleet, asked: Asked) -> Fleet:
    if not fleet.observed:
        raise IllegalEvent("a rollout", "no replica has reported yet")
    since = fleet.generation + 1
    if (running := fleet.running) is not None:
        # replicas act on the same document as before then, so its failures are this one's too;
        # but not those that it was waiting with: to ask again is to retry
        going = running.state is not State.ABORTING and running.pause is not Pause.FAILURE
        if running.target == asked.target and going:
            since = running.since
        reason = f"replaced by a rollout to {asked.target}"
        fleet = to(fleet, State.SUPERSEDED, at=asked.at, reason=reason)
    number = fleet.rollouts + 1
    rollout = Rollout(
        id=f"rollout-{number}",
        plan=asked.plan,
        target=asked.target,
        previous=fleet.stable,  # also when it supersedes: the way back stays the proven revision
        key=asked.key,
        since=since,
        created_at=asked.at,
        deadline_at=asked.at + asked.plan.progress_deadline,
    )
    past = fleet.past if fleet.rollout is None else (*fleet.past, fleet.rollout)
    limit = asked.plan.history_limit
    return replace(fleet, rollout=rollout, rollouts=number, past=past[-limit:])


def _resume(fleet: Fleet, *, at: float) -> Fleet:
    rollout = _going(fleet, "to resume")
    if rollout.pause is None:
        return fleet
    if rollout.pause is Pause.STEP:
        raise IllegalEvent("to resume", "its step waits to be promoted")
    if rollout.pause is Pause.FAILURE:
        raise IllegalEvent("to resume", "it failed; retry, promote or abort it")
    step = rollout.current
    held_s = 0.0 if step is None else step.hold_s
    deadline_at = at + held_s + rollout.plan.progress_deadline
    return _on(replace(fleet, rollout=replace(rollout, deadline_at=deadline_at)), at=at)


def _promote(fleet: Fleet, asked: PromoteRequested) -> Fleet:
    rollout = _going(fleet, "to promote")
    if rollout.current is not None and (rollout.begun or asked.full):
        fleet = next_step(fleet, at=asked.at, full=asked.full)
    elif rollout.current is not None:
        raise IllegalEvent("to promote a step", "the fleet has not staged the adapter yet")
    elif rollout.pause is None:
        raise IllegalEvent("to promote", "there is no step left to promote")
    elif rollout.pause is Pause.ASKED:
        return _resume(fleet, at=asked.at)
    if rollout.pause is Pause.FAILURE:
        return _forgiven(fleet, at=asked.at)
    return fleet if rollout.pause is None else _on(fleet, at=asked.at)


def _forgiven(fleet: Fleet, *, at: float) -> Fleet:
    """What failed until now counts no more, and what was measured neither."""
    rollout = fleet.rollout
    assert rollout is not None
    verdicts = rollout.verdicts if rollout.unclear is None else rollout.verdicts[:-1]
    rollout = replace(
        rollout,
        verdicts=verdicts,
        since=fleet.generation + 1,
        attempt=rollout.attempt + 1,
        placed_at=None,
        deadline_at=at + rollout.plan.progress_deadline,
    )
    return _on(replace(fleet, rollout=rollout), at=at)


def _on(fleet: Fleet, *, at: float) -> Fleet:
    assert fleet.rollout is not None
    state = State.PROGRESSING if fleet.rollout.begun else State.STAGING
    return to(fleet, state, at=at, reason="")


def _going(fleet: Fleet, what: str) -> Rollout:
    """The rollout that goes forward. Raises `IllegalEvent`."""
    rollout = fleet.running
    if rollout is None:
        raise IllegalEvent(what, "no rollout is running")
    if rollout.state is State.ABORTING:
        raise IllegalEvent(what, "the rollout is being taken back")
    return rollout
