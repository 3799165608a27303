"""The rollout machine: events go in, the desired state of the fleet comes out.

Theory of operation. `advance(fleet, event)` returns the next state; nothing else decides. It is
pure: no ray, no clock, no thread, no random. The controller feeds events in and journals the new
state before a replica receives its part of it (`documents`).

A rollout walks through `TABLE`. The event is applied first (`requests`, `canary.judge`), then the
machine settles: it applies the rule of the current state until nothing changes. A canary's steps
(`canary`) come before the waves that move the whole fleet; a rolling rollout has no steps. Loaded
adapters have no states: they change at once, and no rollout waits for them or ends with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar, assert_never

from serve_app.rollout import requests
from serve_app.rollout.canary import hold_step, judge, place, traffic
from serve_app.rollout.events import (
    Event,
    Judged,
    Left,
    ReportBatch,
    Reported,
    StartRequested,
    Ticked,
)
from serve_app.rollout.state import Fleet, Observed, Rollout, State
from serve_app.rollout.walk import fail, to
from serve_app.rollout.waves import all_serve, all_to_stable, broken, having, idle, send

V = TypeVar("V")


def advance(fleet: Fleet, event: Event) -> Fleet:
    """The next state.

    Raises, changing nothing:
        IllegalEvent: the event is not possible now.
        GenerationMismatch: a user expected another generation.
    """
    after = _settle(_apply(fleet, event), at=event.at)
    if _decision(after) != _decision(fleet):
        after = replace(after, generation=fleet.generation + 1)
    return after


def silent(fleet: Fleet, *, at: float, after_s: float) -> list[str]:
    """Replicas without a report for more than `after_s` seconds."""
    return [r for r, seen in fleet.observed.items() if at - seen.seen_at > after_s]


def _decision(fleet: Fleet) -> object:
    """Everything that a document shows; if it changes, the generation grows."""
    rollout = fleet.running
    return (
        (fleet.stable, fleet.loaded, fleet.assigned, fleet.in_flight, fleet.rollouts),
        (fleet.rollout and fleet.rollout.state, rollout and rollout.target, traffic(fleet)),
    )


def _apply(fleet: Fleet, event: Event) -> Fleet:
    match event:
        case Reported():
            return _take_reports(fleet, (event,))
        case ReportBatch():
            return _take_reports(fleet, event.reports)
        case Left():
            return replace(
                fleet,
                observed=_without(fleet.observed, event.replica),
                assigned=_without(fleet.assigned, event.replica),
            )
        case Judged():
            return judge(fleet, event)
        case Ticked():
            return fleet
        case _:
            return requests.apply(fleet, event)


def _take_reports(fleet: Fleet, reports: Sequence[Reported]) -> Fleet:
    seen = {report.replica: Observed(state=report.state, seen_at=report.at) for report in reports}
    # a late joiner gets stable: the target is proven on other replicas first
    joined = {replica: fleet.stable for replica in seen if replica not in fleet.assigned}
    return replace(
        fleet,
        observed={**fleet.observed, **seen},
        assigned={**fleet.assigned, **joined} if joined else fleet.assigned,
    )


def _settle(fleet: Fleet, *, at: float) -> Fleet:
    while fleet.rollout is not None:
        after = _step(fleet, fleet.rollout, at=at)
        if after == fleet:
            break
        fleet = after
    return fleet


def _step(fleet: Fleet, rollout: Rollout, *, at: float) -> Fleet:
    match rollout.state:
        case State.PENDING:
            return to(fleet, State.STAGING, event=StartRequested, at=at)
        case State.STAGING | State.PROGRESSING:
            if (why := _failure(fleet, rollout)) is not None:
                return fail(fleet, rollout, why, event=Reported, at=at)
            if at >= rollout.deadline_at:
                return fail(fleet, rollout, _too_late(rollout), event=Ticked, at=at)
            if rollout.state is State.STAGING:
                return _stage(fleet, rollout, at=at)
            if rollout.current is not None:
                return hold_step(fleet, rollout, at=at)
            return _convert(fleet, rollout, at=at)
        case State.PAUSED:
            keeps = rollout.begun and rollout.current is not None
            return place(fleet, rollout) if keeps else fleet
        case State.PROMOTING:
            limit = rollout.plan.history_limit
            fleet = replace(fleet, stable=rollout.target)
            # the same revision twice would push an earlier one out of the history
            if fleet.history[-1:] != (rollout.target,):
                history = (*fleet.history, rollout.target)
                fleet = replace(fleet, history=history[-limit - 1 :])
            return to(fleet, State.SUCCEEDED, event=Reported, at=at)
        case State.ABORTING:
            return _abort(fleet, rollout, at=at)
        case State.SUCCEEDED | State.ABORTED | State.FAILED | State.SUPERSEDED:
            return fleet
        case _:
            assert_never(rollout.state)


def _stage(fleet: Fleet, rollout: Rollout, *, at: float) -> Fleet:
    if fleet.observed and having(fleet, rollout.target) == set(fleet.observed):
        fleet = replace(fleet, rollout=replace(rollout, begun=True))
        return to(fleet, State.PROGRESSING, event=Reported, at=at)
    return fleet


def _convert(fleet: Fleet, rollout: Rollout, *, at: float) -> Fleet:
    if fleet.observed and all_serve(fleet, rollout.target):
        return to(fleet, State.PROMOTING, event=Reported, at=at)
    ready = having(fleet, rollout.target)
    return send(fleet, rollout, rollout.target, ready=ready, free=broken(fleet))


def _abort(fleet: Fleet, rollout: Rollout, *, at: float) -> Fleet:
    alone, now = {*fleet.loaded, fleet.stable}, traffic(fleet)
    # the current traffic split in its report shows that it knows of the abort
    if all_serve(fleet, fleet.stable) and all(
        seen.state is not None
        and seen.state.traffic == now
        and (rollout.target in alone or rollout.target not in seen.state.also_serves)
        for seen in fleet.observed.values()
    ):
        return to(all_to_stable(fleet), State.ABORTED, event=Reported, at=at)
    for replica, observed in fleet.observed.items():
        failure = None if observed.state is None else observed.state.failure
        if failure and failure.revision == fleet.stable and failure.generation > rollout.since:
            reason = f"{rollout.reason}; then {replica} could not go back: {failure.reason}"
            back = all_to_stable(fleet)
            return to(back, State.FAILED, event=Reported, at=at, reason=reason)
    # replicas that do not serve go back at once, the others in waves
    return send(fleet, rollout, fleet.stable, ready=set(fleet.observed), free=idle(fleet))


def _failure(fleet: Fleet, rollout: Rollout) -> str | None:
    # refused ones too: a shared canary is served besides the default
    for replica, observed in fleet.observed.items():
        for failure in observed.failures_of(rollout.target):
            if failure.generation >= rollout.since:
                return f"replica {replica}: {failure.reason}"
    return None


def _too_late(rollout: Rollout) -> str:
    what = "it" if rollout.current is None else f"step {rollout.step + 1}"
    why = "" if rollout.unclear is None else f": {rollout.unclear.why}"
    return f"{what} was not over within {rollout.plan.progress_deadline:g} s{why}"


def _without(mapping: Mapping[str, V], key: str) -> dict[str, V]:
    return {k: v for k, v in mapping.items() if k != key}
