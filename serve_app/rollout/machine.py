"""The rollout machine: what happened goes in, what the fleet shall hold comes out.

Theory of operation. `advance(fleet, event)` returns the next state; nothing else decides. It is
pure: no ray, no clock, no thread, no random. The controller feeds events in, journals the new
state, and only then lets replicas hear of it.

A rollout walks through `TRANSITIONS`. After every event the machine settles: it applies the rule of
the current state until nothing changes. What is loaded beside the default has no states: replicas
are told, whatever runs, and no rollout waits for it or ends with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import TypeVar, assert_never

from .assignment import next_wave
from .events import (
    AbortRequested,
    Asked,
    Event,
    Left,
    LoadRequested,
    Reported,
    Ticked,
    UnloadRequested,
)
from .state import (
    TRANSITIONS,
    Desired,
    Fleet,
    GenerationMismatch,
    IllegalEvent,
    Observed,
    Progress,
    Rollout,
    State,
)

V = TypeVar("V")
_REMEMBERED = 50  # rollouts and stable revisions: the journal is written whole at every decision


def advance(fleet: Fleet, event: Event) -> Fleet:
    """The next state.

    Raises, changing nothing:
        IllegalEvent: it cannot happen now.
        GenerationMismatch: it was asked for by someone who did not know of the last decision.
    """
    after = _settle(_apply(fleet, event), at=event.at)
    if after.decision() != fleet.decision():
        after = replace(after, generation=fleet.generation + 1)
    return after


def desired(fleet: Fleet, replica: str) -> Desired:
    """What `replica` shall hold now; a replica nobody knows yet gets stable."""
    rollout = fleet.running
    staging = rollout is not None and rollout.state is not State.ABORTING
    hold = fleet.assigned.get(replica, fleet.stable)
    return Desired(
        epoch=fleet.epoch,
        generation=fleet.generation,
        hold=hold,
        stage=rollout.target if rollout and staging else None,
        beside=tuple(name for name in fleet.loaded if name != hold),
        in_flight=fleet.in_flight,
    )


def pending(fleet: Fleet) -> dict[str, Desired]:
    """The commands: every known replica whose observed state is not yet the desired one."""
    commands = {}
    for replica, observed in fleet.observed.items():
        want = desired(fleet, replica)
        ready = observed.serves(want.hold) and set(observed.beside) == set(want.beside)
        if not ready or (want.stage is not None and not observed.has(want.stage)):
            commands[replica] = want
    return commands


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


def restored(fleet: Fleet, *, at: float) -> Fleet:
    """After a restart: a new epoch, the intent as journaled, nothing observed yet.

    Every replica that was assigned something is expected back and counts as out of service until it
    reports; so no wave starts and no rollout ends on a fleet that nobody has looked at.
    """
    expected = {replica: Observed(seen_at=at) for replica in fleet.assigned}
    return replace(fleet, epoch=fleet.epoch + 1, observed=expected)


def silent(fleet: Fleet, *, at: float, after_s: float) -> list[str]:
    """Replicas that did not report for more than `after_s` seconds."""
    return [r for r, seen in fleet.observed.items() if at - seen.seen_at > after_s]


def _apply(fleet: Fleet, event: Event) -> Fleet:
    match event:
        case Asked():
            return _begin(fleet, event)
        case Reported():
            seen = Observed(
                holds=event.holds,
                staged=event.staged,
                serving=event.serving,
                failure=event.failure,
                beside=event.beside,
                seen_at=event.at,
            )
            return replace(
                fleet,
                observed={**fleet.observed, event.replica: seen},
                # a late joiner gets stable: what it has never held is proven on others first
                assigned={event.replica: fleet.stable, **fleet.assigned},
            )
        case Left():
            return replace(
                fleet,
                observed=_without(fleet.observed, event.replica),
                assigned=_without(fleet.assigned, event.replica),
            )
        case AbortRequested():
            if fleet.running is None or fleet.running.state is State.ABORTING:
                return fleet
            return _to(fleet, State.ABORTING, at=event.at, reason=event.reason)
        case LoadRequested():
            _expect(fleet, event.expected_generation)
            loaded = tuple(name for name in fleet.loaded if name != event.instead_of)
            if event.revision not in loaded:
                loaded = (*loaded, event.revision)
            return replace(fleet, loaded=loaded)
        case UnloadRequested():
            _expect(fleet, event.expected_generation)
            return replace(
                fleet, loaded=tuple(name for name in fleet.loaded if name != event.revision)
            )
        case Ticked():
            return fleet
        case _:
            assert_never(event)


def _expect(fleet: Fleet, generation: int | None) -> None:
    if generation is not None and generation != fleet.generation:
        raise GenerationMismatch(generation, fleet.generation)


def _begin(fleet: Fleet, asked: Asked) -> Fleet:
    if not fleet.observed:
        raise IllegalEvent("a rollout", "no replica has reported yet")
    since = fleet.generation + 1
    if (running := fleet.running) is not None:
        # replicas act on the same document as before then, so its failures are this one's too
        if running.target == asked.target and running.state is not State.ABORTING:
            since = running.since
        reason = f"replaced by a rollout to {asked.target}"
        fleet = _to(fleet, State.SUPERSEDED, at=asked.at, reason=reason)
    number = fleet.rollouts + 1
    rollout = Rollout(
        id=f"rollout-{number}",
        plan=asked.plan,
        target=asked.target,
        previous=fleet.stable,  # also when it supersedes: the way back stays the proven revision
        since=since,
        created_at=asked.at,
        deadline_at=asked.at + asked.plan.progress_deadline_s,
    )
    past = fleet.past if fleet.rollout is None else (*fleet.past, fleet.rollout)
    return replace(fleet, rollout=rollout, rollouts=number, past=past[-_REMEMBERED:])


def _settle(fleet: Fleet, *, at: float) -> Fleet:
    while fleet.running is not None:
        after = _step(fleet, fleet.running, at=at)
        if after == fleet:
            return fleet
        fleet = after
    return fleet


def _step(fleet: Fleet, rollout: Rollout, *, at: float) -> Fleet:
    match rollout.state:
        case State.PENDING:
            return _to(fleet, State.STAGING, at=at)
        case State.STAGING | State.PROGRESSING:
            if (why := _why_abort(fleet, rollout, at=at)) is not None:
                return _to(fleet, State.ABORTING, at=at, reason=why)
            if rollout.state is State.STAGING:
                return _stage(fleet, rollout, at=at)
            return _progress(fleet, rollout, at=at)
        case State.PROMOTING:
            history = (*fleet.history, rollout.target)[-_REMEMBERED:]
            fleet = replace(fleet, stable=rollout.target, history=history)
            return _to(fleet, State.SUCCEEDED, at=at)
        case State.ABORTING:
            return _abort(fleet, rollout, at=at)
        case State.SUCCEEDED | State.ABORTED | State.FAILED | State.SUPERSEDED:
            return fleet
        case _:
            assert_never(rollout.state)


def _stage(fleet: Fleet, rollout: Rollout, *, at: float) -> Fleet:
    seen = fleet.observed.values()
    if seen and all(observed.has(rollout.target) for observed in seen):
        return _to(fleet, State.PROGRESSING, at=at)
    return fleet


def _progress(fleet: Fleet, rollout: Rollout, *, at: float) -> Fleet:
    if fleet.observed and _all_serve(fleet, rollout.target):
        return _to(fleet, State.PROMOTING, at=at)
    staged = {r for r, observed in fleet.observed.items() if observed.has(rollout.target)}
    broken = {r for r in fleet.observed if _failed_on_assigned(fleet, r)}
    return _send(fleet, rollout, rollout.target, ready=staged, free=broken)


def _abort(fleet: Fleet, rollout: Rollout, *, at: float) -> Fleet:
    if _all_serve(fleet, fleet.stable):
        return _to(_all_to_stable(fleet), State.ABORTED, at=at)
    for replica, observed in fleet.observed.items():
        failure = observed.failure
        if failure and failure.revision == fleet.stable and failure.generation > rollout.since:
            reason = f"{rollout.reason}; then {replica} could not go back: {failure.reason}"
            return _to(_all_to_stable(fleet), State.FAILED, at=at, reason=reason)
    # whoever does not serve anyway goes back at once; the others in waves, like on the way there
    idle = {r for r in fleet.observed if not _in_service(fleet, r)}
    return _send(fleet, rollout, fleet.stable, ready=set(fleet.observed), free=idle)


def _send(
    fleet: Fleet,
    rollout: Rollout,
    revision: str,
    *,
    ready: AbstractSet[str],
    free: AbstractSet[str],
) -> Fleet:
    """The next wave on its way to `revision`, all of them for `all_at_once`."""
    everywhere = rollout.plan.strategy == "all_at_once"
    wave = next_wave(
        target=revision,
        assigned=fleet.assigned,
        in_service={r for r in fleet.observed if _in_service(fleet, r)},
        broken=free,
        ready=ready,
        max_unavailable=len(fleet.observed) if everywhere else rollout.plan.max_unavailable,
        keep_one=not everywhere,
    )
    sent = {r: replace(fleet.observed[r], outdated=True) for r in wave}
    return replace(
        fleet,
        assigned={**fleet.assigned, **dict.fromkeys(wave, revision)},
        observed={**fleet.observed, **sent},
    )


def _all_to_stable(fleet: Fleet) -> Fleet:
    return replace(fleet, assigned=dict.fromkeys(fleet.assigned, fleet.stable))


def _why_abort(fleet: Fleet, rollout: Rollout, *, at: float) -> str | None:
    for replica, observed in fleet.observed.items():
        failure = observed.failure
        if failure and failure.revision == rollout.target and failure.generation >= rollout.since:
            return f"replica {replica}: {failure.reason}"
    if at >= rollout.deadline_at:
        return f"not finished within {rollout.plan.progress_deadline_s:g} s"
    return None


def _all_serve(fleet: Fleet, revision: str) -> bool:
    # assigned too: who was just sent elsewhere is on its way, whatever it said before it heard
    return all(fleet.assigned[r] == revision and _in_service(fleet, r) for r in fleet.observed)


def _in_service(fleet: Fleet, replica: str) -> bool:
    return fleet.observed[replica].serves(fleet.assigned[replica])


def _failed_on_assigned(fleet: Fleet, replica: str) -> bool:
    failure = fleet.observed[replica].failure
    return failure is not None and failure.revision == fleet.assigned[replica]


def _to(fleet: Fleet, state: State, *, at: float, reason: str | None = None) -> Fleet:
    rollout = fleet.rollout
    assert rollout is not None
    assert state in TRANSITIONS[rollout.state], (rollout, state)
    rollout = replace(rollout, state=state, reason=rollout.reason if reason is None else reason)
    if rollout.ended:
        rollout = replace(rollout, ended_at=at, progress=progress(fleet, rollout))
    return replace(fleet, rollout=rollout)


def _without(mapping: Mapping[str, V], key: str) -> dict[str, V]:
    return {k: v for k, v in mapping.items() if k != key}
