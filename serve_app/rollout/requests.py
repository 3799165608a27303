"""User requests: how each one changes the fleet, or the reason that it is refused.

The machine applies a request with this and then settles. A request that expects another generation
than the fleet's is refused. A request whose idempotency key was used before changes nothing. The
transition table says which requests are possible in which state.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from serve_app.rollout.errors import GenerationMismatch, IllegalEvent
from serve_app.rollout.events import (
    AbortRequested,
    AnyRolloutRequest,
    AnyUserRequest,
    LoadRequested,
    PauseRequested,
    PromoteRequested,
    ResumeRequested,
    RetryRequested,
    StartRequested,
    UnloadRequested,
)
from serve_app.rollout.state import Fleet, Pause, Rollout, State
from serve_app.rollout.table import handles
from serve_app.rollout.walk import next_step, to

_KEYS = 200  # of the last requests: a caller that got no answer asks again soon
_VERBS: dict[type[AnyRolloutRequest], str] = {
    AbortRequested: "abort",
    PauseRequested: "pause",
    ResumeRequested: "resume",
    PromoteRequested: "promote",
    RetryRequested: "retry",
}


def apply(fleet: Fleet, request: AnyUserRequest) -> Fleet:
    """The fleet after the request.

    Raises, changing nothing:
        GenerationMismatch: the fleet is at another generation than the request expects.
        IllegalEvent: the request is not possible now, or its rollout is not the running one.
    """
    given = request.precondition
    if given.key is not None and given.key in fleet.keys:
        return fleet
    if isinstance(request, AnyRolloutRequest):
        _require_running(fleet, request)
    expected = given.expected_generation
    if expected is not None and expected != fleet.generation:
        raise GenerationMismatch(expected, fleet.generation)
    after = _apply(fleet, request)
    if given.key is not None:
        after = replace(after, keys=(*after.keys, given.key)[-_KEYS:])
    return after


def _apply(fleet: Fleet, request: AnyUserRequest) -> Fleet:
    match request:
        case StartRequested():
            return _start(fleet, request)
        case LoadRequested():
            loaded = tuple(name for name in fleet.loaded if name != request.instead_of)
            if request.revision not in loaded:
                loaded = (*loaded, request.revision)
            return replace(fleet, loaded=loaded)
        case UnloadRequested():
            loaded = tuple(name for name in fleet.loaded if name != request.revision)
            return replace(fleet, loaded=loaded)
        case _:
            return _steer(fleet, request, _steerable(fleet, request))


def _start(fleet: Fleet, request: StartRequested) -> Fleet:
    if not fleet.observed:
        raise IllegalEvent("a rollout", "no replica has reported yet")
    since = fleet.generation + 1
    if (running := fleet.running) is not None:
        # the same target again: replicas keep acting on the same document, so that a failure
        # reported for the earlier rollout counts for this one, unless that one is given up
        going = running.state is not State.ABORTING and running.pause is not Pause.FAILURE
        if running.target == request.target and going:
            since = running.since
        reason = f"replaced by a rollout to {request.target}"
        fleet = to(fleet, State.SUPERSEDED, event=StartRequested, at=request.at, reason=reason)
    number = fleet.rollouts + 1
    rollout = Rollout(
        id=f"rollout-{number}",
        plan=request.plan,
        target=request.target,
        previous=fleet.stable,  # also over a running rollout: back to what is proven
        key=request.precondition.key,
        since=since,
        created_at=request.at,
        deadline_at=request.at + request.plan.progress_deadline,
    )
    past = fleet.past if fleet.rollout is None else (*fleet.past, fleet.rollout)
    limit = request.plan.history_limit
    return replace(fleet, rollout=rollout, rollouts=number, past=past[-limit:])


def _require_running(fleet: Fleet, request: AnyRolloutRequest) -> Rollout:
    if fleet.running is None or fleet.running.id != request.id:
        raise IllegalEvent(f"to change {request.id}", "it has ended")
    return fleet.running


def _steerable(fleet: Fleet, request: AnyRolloutRequest) -> Rollout:
    """The running rollout, if the request is possible in its state."""
    rollout = _require_running(fleet, request)
    if not handles(rollout.state, type(request)):
        raise IllegalEvent(f"to {_VERBS[type(request)]}", f"{rollout.id} is {rollout.state}")
    return rollout


def _steer(
    fleet: Fleet,
    request: AbortRequested | PauseRequested | ResumeRequested | PromoteRequested | RetryRequested,
    rollout: Rollout,
) -> Fleet:
    match request:
        case AbortRequested():
            if rollout.state is State.ABORTING:
                return fleet
            return to(
                fleet, State.ABORTING, event=AbortRequested, at=request.at, reason=request.reason
            )
        case PauseRequested():
            if rollout.state is State.PAUSED:
                return fleet
            return to(
                fleet,
                State.PAUSED,
                event=PauseRequested,
                at=request.at,
                reason="paused",
                pause=Pause.ASKED,
            )
        case ResumeRequested():
            return _resume(fleet, request, rollout)
        case PromoteRequested():
            return _promote(fleet, request, rollout)
        case RetryRequested():
            if rollout.pause is not Pause.FAILURE:
                raise IllegalEvent("to retry", "nothing has failed")
            return _go_on(_forgiven(fleet, at=request.at), request)
        case _:
            assert_never(request)


def _resume(fleet: Fleet, request: ResumeRequested | PromoteRequested, rollout: Rollout) -> Fleet:
    if rollout.pause is None:
        return fleet
    if rollout.pause is Pause.STEP:
        raise IllegalEvent("to resume", "its step waits to be promoted")
    if rollout.pause is Pause.FAILURE:
        raise IllegalEvent("to resume", "it failed; retry, promote or abort it")
    step = rollout.current
    held_s = 0.0 if step is None else step.hold_s
    deadline_at = request.at + held_s + rollout.plan.progress_deadline
    return _go_on(replace(fleet, rollout=replace(rollout, deadline_at=deadline_at)), request)


def _promote(fleet: Fleet, request: PromoteRequested, rollout: Rollout) -> Fleet:
    if rollout.current is not None and (rollout.begun or request.full):
        fleet = next_step(fleet, at=request.at, full=request.full)
    elif rollout.current is not None:
        raise IllegalEvent("to promote a step", "the fleet has not staged the adapter yet")
    elif rollout.pause is None:
        raise IllegalEvent("to promote", "there is no step left to promote")
    elif rollout.pause is Pause.ASKED:
        return _resume(fleet, request, rollout)
    if rollout.pause is Pause.FAILURE:
        fleet = _forgiven(fleet, at=request.at)
    return _go_on(fleet, request)


def _forgiven(fleet: Fleet, *, at: float) -> Fleet:
    """Discards earlier failures and measurements of this step."""
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
    return replace(fleet, rollout=rollout)


def _go_on(fleet: Fleet, request: ResumeRequested | PromoteRequested | RetryRequested) -> Fleet:
    assert fleet.rollout is not None
    state = State.PROGRESSING if fleet.rollout.begun else State.STAGING
    return to(fleet, state, event=type(request), at=request.at, reason="")
