"""Fleets and events in one line each, for the examples of every rule."""

from __future__ import annotations

from serve_app.rollout.analysis import Analysis, Check, Measurement, Outcome, Verdict
from serve_app.rollout.documents import Documents
from serve_app.rollout.events import (
    AbortRequested,
    Event,
    Judged,
    LoadRequested,
    PauseRequested,
    PromoteRequested,
    Reported,
    ResumeRequested,
    RetryRequested,
    StartRequested,
    Ticked,
    UnloadRequested,
)
from serve_app.rollout.machine import advance
from serve_app.rollout.plan import CanaryStep, InFlight, OnFailure, Placement, Plan, Strategy
from serve_app.rollout.precondition import Precondition
from serve_app.rollout.state import (
    Desired,
    Failure,
    Fleet,
    Observed,
    Pause,
    ReplicaState,
    Rollout,
    State,
    Traffic,
)

OLD, NEW, OTHER = "old@1", "new@2", "other@3"
TENANT = "tenant@4"
FIRST = "rollout-1"
WATCHED = Analysis(checks=(Check(metric="error_rate", max=0.01),))


# ---- events -------------------------------------------------------------------------------------


def ask(
    target: str = NEW,
    *,
    strategy: Strategy = "rolling",
    max_unavailable: int = 1,
    in_flight: InFlight | None = None,
    deadline_s: float = 600,
    on_failure: OnFailure = "rollback",
    history_limit: int = 20,
    at: float = 10.0,
    expected: int | None = None,
    key: str | None = None,
) -> StartRequested:
    plan = Plan(
        adapter=target,
        strategy=strategy,
        max_unavailable=max_unavailable,
        in_flight=in_flight,
        progress_deadline=deadline_s,
        on_failure=on_failure,
        history_limit=history_limit,
    )
    given = Precondition(expected_generation=expected, key=key)
    return StartRequested(plan=plan, target=target, at=at, precondition=given)


def canary(
    *steps: CanaryStep,
    target: str = NEW,
    placement: Placement | None = None,
    analysis: Analysis | None = None,
    max_unavailable: int = 1,
    deadline_s: float = 600,
    on_failure: OnFailure = "rollback",
    history_limit: int = 20,
    at: float = 10.0,
) -> StartRequested:
    plan = Plan(
        adapter=target,
        strategy="canary",
        steps=steps,
        placement=placement,
        analysis=analysis,
        max_unavailable=max_unavailable,
        progress_deadline=deadline_s,
        on_failure=on_failure,
        history_limit=history_limit,
    )
    return StartRequested(plan=plan, target=target, at=at)


def step(weight: float, hold: float = 0.0) -> CanaryStep:
    return CanaryStep(weight=weight, hold=hold)


def manual(weight: float) -> CanaryStep:
    return CanaryStep(weight=weight, hold="manual")


def said(
    replica: str,
    holds: str | None = OLD,
    *,
    staged: str | None = None,
    serving: bool = True,
    failure: Failure | None = None,
    also_serves: tuple[str, ...] = (),
    refused: tuple[Failure, ...] = (),
    traffic: Traffic | None = None,
    at: float = 11.0,
) -> Reported:
    state = ReplicaState(
        holds=holds,
        staged=staged,
        serving=serving,
        failure=failure,
        also_serves=also_serves,
        refused=refused,
        traffic=traffic,
    )
    return Reported(replica=replica, state=state, at=at)


def load(
    revision: str = TENANT, *, instead_of: str | None = None, expected: int | None = None
) -> LoadRequested:
    given = Precondition(expected_generation=expected)
    return LoadRequested(revision=revision, instead_of=instead_of, precondition=given, at=12.0)


def unload(revision: str = TENANT, *, expected: int | None = None) -> UnloadRequested:
    given = Precondition(expected_generation=expected)
    return UnloadRequested(revision=revision, precondition=given, at=12.0)


def abort(id: str = FIRST, *, at: float = 12.0) -> AbortRequested:
    return AbortRequested(id=id, reason="no good", at=at)


def pause(id: str = FIRST, *, at: float = 12.0) -> PauseRequested:
    return PauseRequested(id=id, at=at)


def resume(id: str = FIRST, *, at: float = 12.0) -> ResumeRequested:
    return ResumeRequested(id=id, at=at)


def promote(id: str = FIRST, *, full: bool = False, at: float = 12.0) -> PromoteRequested:
    return PromoteRequested(id=id, full=full, at=at)


def retry(id: str = FIRST, *, at: float = 12.0) -> RetryRequested:
    return RetryRequested(id=id, at=at)


def judged(
    fleet: Fleet, outcome: Outcome, *, at: float = 12.0, step_id: str | None = None, why: str = "so"
) -> Judged:
    """A verdict on the step that the fleet is in, unless `step_id` names another one."""
    rollout = of(fleet)
    verdict = Verdict(
        step=rollout.step,
        weight=5.0,
        outcome=outcome,
        at=at,
        measurements=(Measurement(name="error_rate", outcome=outcome, why=why),),
    )
    return Judged(step_id=step_id or rollout.step_id, verdict=verdict, at=at)


def broken(revision: str, generation: int) -> Failure:
    return Failure(revision=revision, reason="no luck", generation=generation)


# ---- fleets -------------------------------------------------------------------------------------


def after(fleet: Fleet, *events: Event) -> Fleet:
    for event in events:
        fleet = advance(fleet, event)
    return fleet


def fleet_of(count: int) -> Fleet:
    """`count` replicas r1, r2, ... that all serve OLD."""
    return after(Fleet(stable=OLD, history=(OLD,)), *(said(f"r{i + 1}") for i in range(count)))


def staged_everywhere(fleet: Fleet, target: str = NEW) -> Fleet:
    for replica, seen in fleet.observed.items():
        assert seen.state is not None
        state = ReplicaState(holds=seen.state.holds, staged=target, serving=seen.state.serving)
        fleet = advance(fleet, Reported(replica=replica, state=state, at=11.0))
    return fleet


def desired(fleet: Fleet, replica: str) -> Desired:
    """The document of one replica."""
    return Documents(fleet).of(replica)


def pending(fleet: Fleet) -> dict[str, Desired]:
    """The documents of replicas whose reported state is not the desired one yet."""
    documents = Documents(fleet)
    return {
        replica: want
        for replica, seen in fleet.observed.items()
        if not _is_as_desired(seen, want := documents.of(replica))
    }


def _is_as_desired(seen: Observed, want: Desired) -> bool:
    state = seen.state
    return (
        state is not None
        and seen.serves(want.hold)
        and set(state.also_serves) == set(want.also_serves)
        and state.traffic == want.traffic
        and (want.stage is None or seen.has(want.stage))
    )


def obeyed(fleet: Fleet, *only: str, at: float = 11.0) -> Fleet:
    """Every replica, or `only` those, has done what it is told now, and says so."""
    told = pending(fleet)
    return after(fleet, *(done(r, told[r], at=at) for r in told if not only or r in only))


def done(replica: str, want: Desired, *, at: float = 11.0) -> Reported:
    """What a replica says that is as `want` has it."""
    also_serves, traffic = want.also_serves, want.traffic
    return said(
        replica, want.hold, staged=want.stage, also_serves=also_serves, traffic=traffic, at=at
    )


def settled(fleet: Fleet, *, at: float = 11.0) -> Fleet:
    """Every replica does at once what it was told, until no document asks for more."""
    for _ in range(6 * len(fleet.observed) + 12):
        fleet = obeyed(fleet, at=at)
    assert pending(fleet) == {}
    return fleet


def rolled(fleet: Fleet, target: str = NEW) -> Fleet:
    """The same, and then all of them hold `target`."""
    fleet = settled(fleet)
    assert all(seen.state and seen.state.holds == target for seen in fleet.observed.values())
    return fleet


def later(fleet: Fleet, at: float) -> Fleet:
    return advance(fleet, Ticked(at=at))


def of(fleet: Fleet) -> Rollout:
    assert fleet.rollout is not None
    return fleet.rollout


def state_of(fleet: Fleet) -> State:
    return of(fleet).state


def waits_for(fleet: Fleet) -> Pause | None:
    return of(fleet).pause
