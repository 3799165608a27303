"""The rollout machine: each rule by a small example, and all of them by a fleet gone wild."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serve_app.journal import Entry, Journal
from serve_app.rollout.events import (
    AbortRequested,
    Asked,
    Event,
    Left,
    LoadRequested,
    Reported,
    Ticked,
    UnloadRequested,
)
from serve_app.rollout.machine import advance, desired, pending, progress, restored, silent
from serve_app.rollout.plan import InFlight, Plan, Strategy
from serve_app.rollout.state import (
    TRANSITIONS,
    Desired,
    Failure,
    Fleet,
    GenerationMismatch,
    IllegalEvent,
    Observed,
    Rollout,
    State,
)

from .fake_replica import FakeReplica

OLD, NEW, OTHER = "old@1", "new@2", "other@3"
TENANT = "tenant@4"


# ---- small examples -----------------------------------------------------------------------------


def ask(
    target: str = NEW,
    *,
    strategy: Strategy = "rolling",
    max_unavailable: int = 1,
    in_flight: InFlight | None = None,
    deadline_s: float = 600,
    at: float = 10.0,
) -> Asked:
    plan = Plan(
        adapter=target,
        strategy=strategy,
        max_unavailable=max_unavailable,
        in_flight=in_flight,
        progress_deadline_s=deadline_s,
    )
    return Asked(plan=plan, target=target, at=at)


def said(
    replica: str,
    holds: str | None = OLD,
    *,
    staged: str | None = None,
    serving: bool = True,
    failure: Failure | None = None,
    beside: tuple[str, ...] = (),
    at: float = 11.0,
) -> Reported:
    return Reported(
        replica=replica,
        holds=holds,
        staged=staged,
        serving=serving,
        failure=failure,
        beside=beside,
        at=at,
    )


def load(
    revision: str = TENANT, *, instead_of: str | None = None, expected: int | None = None
) -> LoadRequested:
    return LoadRequested(
        revision=revision, instead_of=instead_of, expected_generation=expected, at=12.0
    )


def unload(revision: str = TENANT, *, expected: int | None = None) -> UnloadRequested:
    return UnloadRequested(revision=revision, expected_generation=expected, at=12.0)


def abort(at: float = 12.0) -> AbortRequested:
    return AbortRequested(reason="no good", at=at)


def after(fleet: Fleet, *events: Event) -> Fleet:
    for event in events:
        fleet = advance(fleet, event)
    return fleet


def fleet_of(count: int) -> Fleet:
    """`count` replicas r1, r2, ... that all serve OLD."""
    return after(Fleet(stable=OLD, history=(OLD,)), *(said(f"r{i + 1}") for i in range(count)))


def staged_everywhere(fleet: Fleet, target: str = NEW) -> Fleet:
    for replica, seen in fleet.observed.items():
        fleet = advance(fleet, said(replica, seen.holds, staged=target, serving=seen.serving))
    return fleet


def rolled(fleet: Fleet, target: str = NEW) -> Fleet:
    """Every replica does at once what it was told, until nobody is told anything."""
    for _ in range(4 * len(fleet.observed) + 4):
        for replica, want in pending(fleet).items():
            fleet = advance(fleet, said(replica, want.hold, staged=want.stage, beside=want.beside))
    assert pending(fleet) == {}
    assert all(seen.holds == target for seen in fleet.observed.values())
    return fleet


def state_of(fleet: Fleet) -> State:
    assert fleet.rollout is not None
    return fleet.rollout.state


def broken(revision: str, generation: int) -> Failure:
    return Failure(revision=revision, reason="no luck", generation=generation)


def test_the_fleet_stages_before_any_replica_is_moved() -> None:
    fleet = advance(fleet_of(3), ask())
    assert state_of(fleet) is State.STAGING
    assert {want.stage for want in pending(fleet).values()} == {NEW}
    assert {want.hold for want in pending(fleet).values()} == {OLD}
    fleet = after(fleet, said("r1", staged=NEW), said("r2", staged=NEW))
    assert set(fleet.assigned.values()) == {OLD}


def test_a_rolling_swap_moves_one_replica_after_the_other() -> None:
    fleet = staged_everywhere(advance(fleet_of(3), ask()))
    assert fleet.assigned == {"r1": NEW, "r2": OLD, "r3": OLD}
    fleet = advance(fleet, said("r1", OLD, staged=NEW, serving=False))
    assert fleet.assigned == {"r1": NEW, "r2": OLD, "r3": OLD}
    fleet = advance(fleet, said("r1", NEW))
    assert fleet.assigned == {"r1": NEW, "r2": NEW, "r3": OLD}


def test_all_at_once_moves_everyone_when_the_last_one_has_staged() -> None:
    fleet = advance(fleet_of(3), ask(strategy="all_at_once"))
    fleet = after(fleet, said("r1", staged=NEW), said("r2", staged=NEW))
    assert set(fleet.assigned.values()) == {OLD}
    fleet = advance(fleet, said("r3", staged=NEW))
    assert set(fleet.assigned.values()) == {NEW}


@pytest.mark.parametrize("strategy", ["rolling", "all_at_once"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_rollout_that_nothing_disturbs_ends_with_the_target_as_stable(
    strategy: Strategy, count: int
) -> None:
    fleet = rolled(advance(fleet_of(count), ask(strategy=strategy)))
    assert (state_of(fleet), fleet.stable, fleet.history) == (State.SUCCEEDED, NEW, (OLD, NEW))
    assert set(fleet.assigned.values()) == {NEW}
    assert fleet.running is None


def test_a_rollout_to_what_is_stable_already_ends_at_once() -> None:
    fleet = advance(fleet_of(2), ask(OLD))
    assert (state_of(fleet), fleet.stable) == (State.SUCCEEDED, OLD)


def test_a_failure_on_the_target_sends_every_replica_back_to_stable() -> None:
    fleet = staged_everywhere(advance(fleet_of(2), ask()))
    fleet = advance(fleet, said("r1", NEW))
    failed = broken(NEW, fleet.generation)
    fleet = advance(fleet, said("r2", staged=NEW, serving=False, failure=failed))
    assert state_of(fleet) is State.ABORTING
    assert all(desired(fleet, replica).stage is None for replica in fleet.assigned)
    fleet = rolled(fleet, OLD)
    assert fleet.rollout is not None
    assert (fleet.rollout.state, fleet.stable) == (State.ABORTED, OLD)
    assert fleet.rollout.reason == "replica r2: no luck"


def test_a_failure_from_before_the_rollout_does_not_end_it() -> None:
    fleet = fleet_of(2)
    stale = broken(NEW, fleet.generation)
    fleet = after(fleet, ask(), said("r1", failure=stale))
    assert state_of(fleet) is State.STAGING


def test_a_failure_on_the_target_counts_in_a_rollout_that_replaced_one_to_the_same_target() -> None:
    fleet = advance(fleet_of(2), ask())
    acting_on = fleet.generation  # r1 heard this document; the next one says the same to it
    fleet = after(fleet, ask(), said("r1", failure=broken(NEW, acting_on)))
    assert state_of(fleet) in (State.ABORTING, State.ABORTED)


def test_a_rollout_that_takes_too_long_is_taken_back() -> None:
    fleet = after(fleet_of(2), ask(deadline_s=30, at=100), said("r1", staged=NEW, at=101))
    assert state_of(advance(fleet, Ticked(at=129.9))) is State.STAGING
    fleet = advance(fleet, Ticked(at=130.0))
    assert fleet.rollout is not None
    assert fleet.rollout.reason == "not finished within 30 s"
    assert state_of(fleet) is State.ABORTED


def test_the_deadline_is_a_moment_that_a_restart_does_not_move() -> None:
    fleet = after(fleet_of(2), ask(deadline_s=30, at=100))
    fleet = restored(fleet, at=129)
    assert state_of(advance(fleet, Ticked(at=131))) is State.ABORTING


def test_an_abort_outranks_the_target_and_drops_what_was_staged() -> None:
    fleet = staged_everywhere(advance(fleet_of(2), ask()))
    fleet = after(fleet, said("r1", NEW, staged=NEW), said("r2", NEW, serving=False), abort())
    assert state_of(fleet) is State.ABORTING
    assert desired(fleet, "r2") == Desired(epoch=1, generation=fleet.generation, hold=OLD)
    assert desired(fleet, "r1").stage is None
    fleet = advance(fleet, said("r2", NEW))
    assert state_of(fleet) is State.ABORTING, "it committed the target after all: too late"
    assert state_of(rolled(fleet, OLD)) is State.ABORTED


def test_an_abort_with_nothing_running_changes_nothing() -> None:
    for fleet in (fleet_of(2), rolled(advance(fleet_of(2), ask()))):
        assert advance(fleet, abort()) == fleet


def test_a_second_abort_changes_nothing() -> None:
    fleet = staged_everywhere(advance(fleet_of(2), ask()))
    aborting = after(fleet, said("r1", NEW), abort())
    assert advance(aborting, abort(at=13)) == aborting


def test_an_abort_is_not_over_while_a_replica_that_was_sent_to_the_target_has_not_answered() -> (
    None
):
    fleet = staged_everywhere(advance(fleet_of(2), ask()))
    assert fleet.assigned["r1"] == NEW
    # r1 heard it and drains; its last word is from before
    assert state_of(advance(fleet, abort())) is State.ABORTING


def test_a_rolling_abort_keeps_one_replica_in_service() -> None:
    fleet = staged_everywhere(advance(fleet_of(3), ask()))
    fleet = after(fleet, said("r1", NEW, staged=NEW), said("r2", NEW, staged=NEW))
    fleet = advance(fleet, said("r3", OLD, staged=NEW, serving=False))  # it drains
    fleet = advance(fleet, abort())
    sent_out = {r for r in ("r1", "r2") if fleet.assigned[r] == OLD}
    assert sent_out < {"r1", "r2"}, "r3 drains, and r1 and r2 were told to drain as well"


def test_a_rolling_abort_takes_no_more_replicas_out_than_the_plan_allows() -> None:
    fleet = staged_everywhere(advance(fleet_of(4), ask()))
    for replica in ("r1", "r2", "r3"):
        fleet = advance(fleet, said(replica, NEW, staged=NEW))
    fleet = advance(advance(fleet, said("r4", NEW, serving=False)), abort())
    serving = {r for r, seen in fleet.observed.items() if seen.serving}
    assert len([r for r in serving if fleet.assigned[r] == OLD]) <= 1


def test_going_back_can_fail_and_that_is_said_too() -> None:
    fleet = staged_everywhere(advance(fleet_of(2), ask()))
    fleet = after(fleet, said("r1", NEW), abort())
    stuck = said("r1", NEW, serving=False, failure=broken(OLD, fleet.generation))
    fleet = advance(fleet, stuck)
    assert fleet.rollout is not None
    assert fleet.rollout.state is State.FAILED
    assert fleet.rollout.reason == "no good; then r1 could not go back: no luck"
    assert "r1" in pending(fleet)


def test_a_new_rollout_over_a_running_one_keeps_the_original_way_back() -> None:
    fleet = staged_everywhere(advance(fleet_of(3), ask()))
    fleet = advance(advance(fleet, said("r1", NEW, staged=NEW)), ask(OTHER, at=20))
    assert [(one.target, one.state) for one in fleet.past] == [(NEW, State.SUPERSEDED)]
    assert fleet.rollout is not None
    assert (fleet.rollout.target, fleet.rollout.previous) == (OTHER, OLD)
    assert fleet.past[0].ended_at == 20
    assert rolled(advance(fleet, abort()), OLD).stable == OLD


def test_a_new_rollout_goes_ahead_of_an_abort_that_is_still_under_way() -> None:
    fleet = staged_everywhere(advance(fleet_of(2), ask()))
    fleet = after(fleet, said("r1", NEW), abort(), ask(OTHER))
    assert fleet.past[0].state is State.SUPERSEDED
    assert rolled(fleet, OTHER).stable == OTHER


def test_a_rollout_to_stable_waits_for_the_replica_that_was_just_sent_elsewhere() -> None:
    fleet = staged_everywhere(advance(fleet_of(2), ask()))
    assert fleet.assigned["r1"] == NEW
    fleet = after(fleet, said("r1", OLD, staged=NEW), ask(OLD))  # r1 said so before it heard of NEW
    assert fleet.running is not None
    assert rolled(fleet, OLD).assigned == {"r1": OLD, "r2": OLD}


def test_a_late_joiner_gets_stable_whatever_runs() -> None:
    fleet = staged_everywhere(advance(fleet_of(2), ask()))
    assert desired(fleet, "late").hold == OLD
    fleet = advance(fleet, said("late", None, serving=False))
    assert fleet.assigned["late"] == OLD
    fleet = advance(advance(fleet_of(2), ask(OTHER)), abort())
    assert desired(fleet, "late") == Desired(epoch=1, generation=fleet.generation, hold=OLD)


def test_a_rollout_waits_for_the_late_joiner_and_takes_it_along() -> None:
    fleet = staged_everywhere(advance(fleet_of(2), ask()))
    fleet = after(fleet, said("r1", NEW), said("late", None, serving=False), said("r2", NEW))
    assert state_of(fleet) is State.PROGRESSING
    fleet = rolled(fleet)
    assert (state_of(fleet), fleet.assigned["late"]) == (State.SUCCEEDED, NEW)


def test_a_replica_that_left_leaves_the_count() -> None:
    fleet = staged_everywhere(advance(fleet_of(2), ask()))
    fleet = after(fleet, said("r1", NEW), Left(replica="r2", at=13))
    assert (state_of(fleet), fleet.assigned) == (State.SUCCEEDED, {"r1": NEW})


def test_that_an_unknown_replica_left_changes_nothing() -> None:
    fleet = fleet_of(2)
    assert advance(fleet, Left(replica="r9", at=13)) == fleet


def test_an_unhealthy_stable_revision_does_not_block_the_rollout_that_fixes_it() -> None:
    fleet = fleet_of(2)
    for replica in ("r1", "r2"):
        down = said(replica, None, serving=False, failure=broken(OLD, fleet.generation))
        fleet = advance(fleet, down)
    fleet = advance(fleet, ask())
    for replica in ("r1", "r2"):
        failed = broken(OLD, fleet.generation)
        fleet = advance(fleet, said(replica, None, staged=NEW, serving=False, failure=failed))
    assert fleet.assigned == {"r1": NEW, "r2": NEW}
    assert rolled(fleet).stable == NEW


def test_one_broken_replica_is_moved_before_a_serving_one_is_taken_out() -> None:
    fleet = advance(fleet_of(3), ask())
    failed = broken(OLD, fleet.generation)
    fleet = advance(fleet, said("r3", None, staged=NEW, serving=False, failure=failed))
    fleet = after(fleet, said("r1", staged=NEW), said("r2", staged=NEW))
    assert fleet.assigned == {"r1": OLD, "r2": OLD, "r3": NEW}


def test_no_rollout_begins_before_a_replica_has_reported() -> None:
    fleet = Fleet(stable=OLD)
    kept = copy.deepcopy(fleet)
    with pytest.raises(IllegalEvent, match="a rollout is not possible now: no replica has"):
        advance(fleet, ask())
    assert fleet == kept


def test_advance_never_writes_into_the_fleet_that_it_was_given() -> None:
    fleet = staged_everywhere(advance(fleet_of(2), ask()))
    kept = copy.deepcopy(fleet)
    events: list[Event] = [ask(OTHER), abort(), said("r1", NEW), load(), unload()]
    for event in [*events, Left(replica="r1", at=1), Ticked(at=1e9)]:
        advance(fleet, event)
        assert fleet == kept


def test_the_generation_grows_with_a_decision_and_with_nothing_else() -> None:
    fleet = fleet_of(2)
    assert after(fleet, said("r1", at=50), Ticked(at=51)).generation == fleet.generation
    asked = advance(fleet, ask())
    assert asked.generation == fleet.generation + 1
    assert advance(asked, said("r1", staged=NEW)).generation == asked.generation
    assert staged_everywhere(asked).generation > asked.generation


def test_a_restart_is_a_new_epoch_in_which_nobody_serves_before_reporting() -> None:
    fleet = staged_everywhere(advance(fleet_of(2), ask()))
    again = restored(fleet, at=99.0)
    assert (again.epoch, again.generation) == (fleet.epoch + 1, fleet.generation)
    assert again.assigned == fleet.assigned
    assert again.observed == {"r1": Observed(seen_at=99.0), "r2": Observed(seen_at=99.0)}
    again = advance(again, said("r1", NEW))
    assert again.assigned == fleet.assigned, "no wave before r2 was heard"
    assert rolled(again).stable == NEW


def test_a_restart_during_an_abort_still_asks_every_replica() -> None:
    fleet = staged_everywhere(advance(fleet_of(2), ask()))
    again = restored(after(fleet, said("r1", NEW), abort()), at=99.0)
    assert state_of(advance(again, Ticked(at=100.0))) is State.ABORTING
    assert state_of(rolled(again, OLD)) is State.ABORTED


def test_pending_names_those_that_are_not_yet_as_they_shall_be() -> None:
    fleet = advance(fleet_of(2), ask())
    assert set(pending(fleet)) == {"r1", "r2"}
    fleet = advance(fleet, said("r1", staged=NEW))
    assert pending(fleet) == {"r2": desired(fleet, "r2")}
    assert pending(fleet_of(2)) == {}


def test_progress_counts_live_replicas_and_stays_as_it_was_when_the_rollout_ended() -> None:
    fleet = staged_everywhere(advance(fleet_of(3), ask()))
    fleet = advance(fleet, said("r1", NEW))
    assert fleet.rollout is not None
    seen = progress(fleet, fleet.rollout)
    assert (seen.total, seen.staged, seen.committed) == (3, 3, 1)
    fleet = advance(rolled(fleet), Left(replica="r3", at=90))
    assert fleet.rollout is not None
    assert progress(fleet, fleet.rollout).total == 3


def test_silence_is_counted_from_the_last_report() -> None:
    fleet = after(fleet_of(2), said("r1", at=20.0), said("r2", at=26.0))
    assert silent(fleet, at=26.5, after_s=6.0) == ["r1"]
    assert silent(fleet, at=26.0, after_s=6.0) == []


def test_what_is_remembered_of_the_past_stays_small() -> None:
    fleet = fleet_of(1)
    for number in range(200):
        fleet = rolled(advance(fleet, ask(f"v{number}@9")), f"v{number}@9")
    assert len(fleet.past) <= 50
    assert len(fleet.history) <= 200 // 2, "the journal writes all of it at every decision"


@pytest.mark.parametrize("policy", ["drain", "overlap"])
def test_a_rollout_says_how_to_get_there_and_its_abort_goes_back_the_same_way(
    policy: InFlight,
) -> None:
    fleet = staged_everywhere(advance(fleet_of(2), ask(in_flight=policy)))
    assert desired(fleet, "r1").in_flight == policy
    fleet = after(fleet, said("r1", NEW), abort())
    assert (desired(fleet, "r2").hold, desired(fleet, "r2").in_flight) == (OLD, policy)


def test_another_way_to_the_same_target_is_a_decision() -> None:
    fleet = advance(fleet_of(2), ask(in_flight="drain"))
    again = advance(fleet, ask(in_flight="overlap"))
    assert again.generation > fleet.generation
    assert desired(again, "r1").in_flight == "overlap"


def test_what_is_loaded_is_served_by_everyone_beside_what_they_hold() -> None:
    fleet = after(fleet_of(2), load(), load(OTHER))
    for replica in ("r1", "r2", "late"):
        assert desired(fleet, replica).beside == (TENANT, OTHER)
    assert set(pending(fleet)) == {"r1", "r2"}
    fleet = rolled(advance(fleet, unload()), OLD)
    assert desired(fleet, "r1").beside == (OTHER,)


def test_loading_is_one_decision_and_loading_it_again_is_none() -> None:
    fleet = fleet_of(1)
    loaded = advance(fleet, load())
    assert loaded.generation == fleet.generation + 1
    assert advance(loaded, load()) == loaded
    assert advance(fleet, unload()) == fleet


def test_a_revision_takes_the_place_of_another_in_one_decision() -> None:
    fleet = advance(fleet_of(1), load())
    replaced = advance(fleet, load(OTHER, instead_of=TENANT))
    assert (replaced.loaded, replaced.generation) == ((OTHER,), fleet.generation + 1)


@pytest.mark.parametrize("event", [load, unload])
def test_who_does_not_know_of_the_last_decision_changes_nothing(event: Any) -> None:
    fleet = advance(fleet_of(1), load(OTHER))
    with pytest.raises(GenerationMismatch) as refused:
        advance(fleet, event(expected=fleet.generation - 1))
    assert str(refused.value) == (
        f"generation {fleet.generation - 1} was expected, and the fleet is at {fleet.generation}"
    )
    advance(fleet, event(expected=fleet.generation))


def test_what_a_replica_holds_is_never_beside_it_as_well() -> None:
    fleet = staged_everywhere(after(fleet_of(2), load(NEW), load(), ask(NEW)))
    assert desired(fleet, "r1").hold == NEW
    assert desired(fleet, "r1").beside == (TENANT,)
    assert desired(fleet, "r2").beside == (NEW, TENANT)
    fleet = rolled(fleet)
    assert fleet.loaded == (NEW, TENANT), "it was loaded, and it still is"
    assert desired(rolled(advance(fleet, ask(OTHER)), OTHER), "r1").beside == (NEW, TENANT)


def test_a_rollout_does_not_wait_for_what_is_loaded() -> None:
    fleet = after(fleet_of(1), load(), ask(), said("r1", staged=NEW), said("r1", NEW))
    assert state_of(fleet) is State.SUCCEEDED
    assert set(pending(fleet)) == {"r1"}


def test_loading_in_the_middle_of_a_rollout_moves_nobody() -> None:
    fleet = staged_everywhere(advance(fleet_of(3), ask()))
    for event in (load(), load(NEW), unload()):
        after_it = advance(fleet, event)
        assert (after_it.assigned, after_it.rollout) == (fleet.assigned, fleet.rollout)


def test_a_restart_keeps_what_was_loaded() -> None:
    fleet = after(fleet_of(2), load(), load(OTHER))
    assert restored(fleet, at=99.0).loaded == (TENANT, OTHER)


def test_every_state_has_a_row_and_every_row_leads_to_states() -> None:
    assert set(TRANSITIONS) == set(State)
    ends = {state for state, successors in TRANSITIONS.items() if not successors}
    assert ends == {State.SUCCEEDED, State.ABORTED, State.FAILED, State.SUPERSEDED}


# ---- a fleet gone wild --------------------------------------------------------------------------

TARGETS = [NEW, OTHER, OLD]
TENANTS = [TENANT, NEW, OLD, "more@5"]
some_replica = st.integers(0, 6)


def reachable(state: State) -> set[State]:
    found = {state}
    while True:
        more = found | {successor for one in found for successor in TRANSITIONS[one]}
        if more == found:
            return found
        found = more


class WildFleet(RuleBasedStateMachine):
    """Replicas obey, lag, fail, die, vanish and join, while users ask and the controller dies."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.fleet = Fleet(stable=OLD, history=(OLD,))
        self.replicas: dict[str, FakeReplica] = {}
        self.loaded: list[str] = []
        self.mail: list[tuple[Reported, Desired | None]] = []
        self.journal = Journal(f"memory://wild-fleet/{uuid.uuid4().hex}")

    # ---- what happens -----------------------------------------------------------------------

    @initialize(count=st.integers(1, 4), max_unavailable=st.integers(1, 3), staged=st.booleans())
    def a_rollout_has_begun(self, count: int, max_unavailable: int, staged: bool) -> None:
        for _ in range(count):
            self.a_replica_joins()
        self.every_replica_obeys()
        self.feed(ask(max_unavailable=max_unavailable, deadline_s=1000.0, at=self.now))
        if staged:
            self.every_replica_obeys()

    @precondition(lambda self: len(self.replicas) < 6)
    @rule()
    def a_replica_joins(self) -> None:
        name = f"r{len(self.replicas)}"
        self.replicas[name] = FakeReplica(name)
        self.feed(self.replicas[name].report(at=self.now))

    @rule(which=some_replica)
    def a_replica_hears(self, which: int) -> None:
        if replica := self.pick(which):
            replica.hear(desired(self.fleet, replica.name))

    @rule(which=some_replica)
    def a_replica_works(self, which: int) -> None:
        if replica := self.pick(which):
            replica.work()

    @rule(which=some_replica)
    def a_replica_reports(self, which: int) -> None:
        if replica := self.pick(which):
            self.feed(replica.report(at=self.now))

    @rule(which=some_replica)
    def a_replica_obeys(self, which: int) -> None:
        if replica := self.pick(which):
            self.obey(replica)

    @rule()
    def every_replica_obeys(self) -> None:
        for replica in self.living():
            self.obey(replica)

    @rule(which=some_replica)
    def a_replica_fails(self, which: int) -> None:
        replica = self.pick(which)
        if replica and replica.job is not None:
            replica.fail()

    @rule(which=some_replica, revision=st.sampled_from(TENANTS))
    def a_replica_cannot_serve_one_beside(self, which: int, revision: str) -> None:
        if replica := self.pick(which):
            replica.cannot.add(revision)

    @rule(
        revision=st.sampled_from(TENANTS),
        instead_of=st.none() | st.sampled_from(TENANTS),
        late=st.booleans(),
    )
    def a_user_loads(self, revision: str, instead_of: str | None, late: bool) -> None:
        event = load(revision, instead_of=None if instead_of == revision else instead_of)
        self.a_user_changes_tenants(event, late=late)

    @rule(revision=st.sampled_from(TENANTS), late=st.booleans())
    def a_user_unloads(self, revision: str, late: bool) -> None:
        self.a_user_changes_tenants(unload(revision), late=late)

    def a_user_changes_tenants(self, event: LoadRequested | UnloadRequested, *, late: bool) -> None:
        before = self.fleet
        event = replace(event, at=self.now, expected_generation=before.generation - late)
        if late:
            with pytest.raises(GenerationMismatch):
                advance(before, event)
            return
        gone = event.revision if isinstance(event, UnloadRequested) else event.instead_of
        self.loaded = [name for name in self.loaded if name != gone]
        if isinstance(event, LoadRequested) and event.revision not in self.loaded:
            self.loaded.append(event.revision)
        otherwise = advance(before, Ticked(at=self.now))
        self.feed(event)
        now = self.fleet
        otherwise = replace(otherwise, loaded=now.loaded, generation=now.generation)
        assert now == otherwise, "it moved somebody, or ended something"

    @rule(which=some_replica)
    def a_report_is_under_way_for_long(self, which: int) -> None:
        if replica := self.pick(which):
            self.mail.append((replica.report(at=self.now), replica.doc))

    @precondition(lambda self: self.mail)
    @rule(which=some_replica, again=st.booleans())
    def a_late_report_arrives(self, which: int, again: bool) -> None:
        late, acted_on = letter = self.mail[which % len(self.mail)]
        if not again:
            self.mail.remove(letter)
        replica = self.replicas[late.replica]
        if replica.alive and late.replica in self.fleet.observed:
            # the controller sees that it has told the replica something else since
            self.feed(late if acted_on == replica.doc else replace(late, serving=False))

    @rule(which=some_replica)
    def a_replica_dies(self, which: int) -> None:
        if replica := self.pick(which):
            replica.alive = False

    @rule(which=some_replica)
    def a_replica_is_counted_as_gone(self, which: int) -> None:
        names = [r for r in self.replicas if r in self.fleet.observed]
        if names:
            name = names[which % len(names)]
            self.replicas[name].lost = True
            self.feed(Left(replica=name, at=self.now))

    @rule(
        revision=st.sampled_from(TARGETS),
        strategy=st.sampled_from(["rolling", "rolling", "all_at_once"]),
        max_unavailable=st.integers(1, 3),
        in_flight=st.sampled_from(["drain", "overlap", None]),
        deadline_s=st.sampled_from([5.0, 1000.0]),
    )
    def a_user_asks(
        self,
        revision: str,
        strategy: Strategy,
        max_unavailable: int,
        in_flight: InFlight | None,
        deadline_s: float,
    ) -> None:
        asked = ask(
            revision,
            strategy=strategy,
            max_unavailable=max_unavailable,
            in_flight=in_flight,
            deadline_s=deadline_s,
            at=self.now,
        )
        if self.fleet.observed:
            self.feed(asked)
            return
        kept = copy.deepcopy(self.fleet)
        with pytest.raises(IllegalEvent):
            advance(self.fleet, asked)
        assert self.fleet == kept

    @rule()
    def a_user_aborts(self) -> None:
        before = self.fleet
        self.feed(abort(at=self.now))
        if before.running is None:
            assert self.fleet == before
            return
        assert self.fleet.running is None or self.fleet.running.state is State.ABORTING

    @rule(seconds=st.sampled_from([0.25, 6.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.feed(Ticked(at=self.now))

    @rule()
    def the_controller_dies_and_comes_back(self) -> None:
        self.journal.write(Entry(fleet=self.fleet, declared=None, sources={}))
        entry = self.journal.read()
        assert entry is not None
        again = restored(entry.fleet, at=self.now)
        assert (again.epoch, again.generation) > (self.fleet.epoch, self.fleet.generation)
        assert (again.rollout, again.stable) == (self.fleet.rollout, self.fleet.stable)
        assert again.loaded == self.fleet.loaded
        self.fleet = again

    def everything_calms_down(self) -> None:
        """Liveness: nothing fails any more, so the fleet gets to where it shall be.

        What cannot be served beside keeps nobody from it; that comes last.
        """
        self.mail.clear()
        if not self.living():
            self.a_replica_joins()  # Serve starts another
        for replica in self.replicas.values():
            if not replica.alive and replica.name in self.fleet.observed:
                self.feed(Left(replica=replica.name, at=self.now))
        for _ in range(6 * len(self.replicas) + 12):
            self.now += 0.25
            for replica in self.living():
                self.obey(replica)
            self.feed(Ticked(at=self.now))
            if self.fleet.running is None and all(
                each.holds == self.fleet.stable and each.is_open for each in self.living()
            ):
                break
        assert self.fleet.running is None
        for replica in self.living():
            replica.cannot.clear()
            self.obey(replica)
        assert pending(self.fleet) == {}
        assert {replica.name for replica in self.living()} == set(self.fleet.observed)
        assert all(r.holds == self.fleet.stable and r.is_open for r in self.living())
        assert all({r.holds, *r.beside} >= set(self.loaded) for r in self.living())

    def teardown(self) -> None:
        self.everything_calms_down()

    # ---- what must hold ---------------------------------------------------------------------

    @invariant()
    def every_replica_is_told_something_sensible(self) -> None:
        fleet = self.fleet
        assert set(fleet.assigned) == set(fleet.observed)
        known = {fleet.stable, *(r.target for r in self.rollouts(fleet).values())}
        assert set(fleet.assigned.values()) <= known
        if fleet.running is not None and fleet.running.state is State.ABORTING:
            assert {desired(fleet, r).stage for r in fleet.assigned} <= {None}

    @invariant()
    def what_is_loaded_is_served_by_all_of_them(self) -> None:
        assert list(self.fleet.loaded) == self.loaded
        for name in [*self.fleet.assigned, "a late joiner"]:
            want = desired(self.fleet, name)
            assert want.hold not in want.beside
            assert list(want.beside) == [one for one in self.loaded if one != want.hold]

    @invariant()
    def the_way_back_is_the_stable_revision(self) -> None:
        running = self.fleet.running
        assert running is None or running.previous == self.fleet.stable

    def feed(self, event: Event) -> None:
        before = self.fleet
        self.fleet = advance(before, event)
        self.check_numbers(before)
        self.check_walk(before)
        self.check_stable(before)
        if isinstance(event, Reported) and event.replica not in before.assigned:
            sent = self.fleet.assigned[event.replica]
            assert sent == before.stable or event.serving, "a late joiner gets stable"
        self.check_service(before)
        self.check_abort(before)
        self.check_why(event, before)
        for replica in self.replicas.values():
            if replica.is_open and desired(self.fleet, replica.name).hold == replica.holds:
                replica.lost = replica.lost and replica.name not in self.fleet.observed

    def check_numbers(self, before: Fleet) -> None:
        fleet = self.fleet
        assert (fleet.epoch, fleet.generation) >= (before.epoch, before.generation)
        if fleet.generation == before.generation:
            for name in fleet.assigned:
                assert desired(fleet, name) == desired(before, name)

    def check_walk(self, before: Fleet) -> None:
        was, now = self.rollouts(before), self.rollouts(self.fleet)
        for id, rollout in was.items():
            if rollout.ended:
                assert now[id] == rollout, "what has ended does not change"
            else:
                assert now[id].state in reachable(rollout.state)
        assert sum(not rollout.ended for rollout in now.values()) <= 1

    def check_stable(self, before: Fleet) -> None:
        fleet = self.fleet
        if succeeded := self.succeeded(before):
            assert [fleet.stable] == succeeded
            for replica in self.present():
                assert replica.holds == fleet.stable, f"{replica.name} does not hold the target"
        else:
            assert fleet.stable == before.stable

    def check_abort(self, before: Fleet) -> None:
        """Once it is going back, nobody is sent anywhere but to stable."""
        running = before.running
        same = running is not None and self.rollouts(self.fleet)[running.id].state
        if same and running and running.state is State.ABORTING and same is not State.SUPERSEDED:
            for name, revision in self.fleet.assigned.items():
                assert revision in (self.fleet.stable, before.assigned.get(name))

    def check_why(self, event: Event, before: Fleet) -> None:
        """A rollout goes back for its own target, its deadline or a user, and nothing else."""
        running = before.running
        if running is None or running.state is State.ABORTING:
            return
        now = self.rollouts(self.fleet)[running.id]
        if now.state not in (State.ABORTING, State.ABORTED):
            return
        failures = [seen.failure for seen in self.fleet.observed.values() if seen.failure]
        assert (
            isinstance(event, AbortRequested)
            or event.at >= running.deadline_at
            or any(failure.revision == running.target for failure in failures)
        )

    def check_service(self, before: Fleet) -> None:
        """Whoever is taken out of service for a rolling swap leaves enough others behind."""
        running = self.fleet.running
        if running is None or running.plan.strategy != "rolling":
            return
        if running.state is not State.PROGRESSING:
            return
        sent = [
            replica
            for replica in self.present()
            if before.assigned.get(replica.name) not in (None, running.target)
            and self.fleet.assigned[replica.name] == running.target
            and replica.is_open
            and replica.holds != running.target
            and replica.failure is None
        ]
        if not sent:
            return
        at_work = [r for r in self.present() if r.holds is not None and not self.settled(r)]
        assert len(at_work) <= running.plan.max_unavailable, "too many swap at once"
        serving = [r for r in self.present() if r.is_open and self.settled(r)]
        known = [r for r in self.replicas.values() if r.name in self.fleet.observed]
        gone = [r for r in known if r.lost or not r.alive]
        assert serving or gone or len(self.fleet.assigned) == 1, "nobody serves"

    # ---- helpers ----------------------------------------------------------------------------

    def obey(self, replica: FakeReplica) -> None:
        replica.hear(desired(self.fleet, replica.name))
        for _ in range(5):
            replica.work()
        self.feed(replica.report(at=self.now))

    def pick(self, which: int) -> FakeReplica | None:
        living = self.living()
        return living[which % len(living)] if living else None

    def living(self) -> list[FakeReplica]:
        return [replica for replica in self.replicas.values() if replica.alive]

    def present(self) -> list[FakeReplica]:
        """Alive, and never counted as gone since they served last."""
        return [r for r in self.living() if r.name in self.fleet.observed and not r.lost]

    def settled(self, replica: FakeReplica) -> bool:
        """It serves what it shall hold, or failed on it and so serves nothing that counts."""
        if replica.failure is not None and not replica.is_open:
            return True
        return replica.is_open and replica.holds == self.fleet.assigned[replica.name]

    def succeeded(self, before: Fleet) -> list[str]:
        was = self.rollouts(before)
        return [
            rollout.target
            for id, rollout in self.rollouts(self.fleet).items()
            if rollout.state is State.SUCCEEDED and (id not in was or not was[id].ended)
        ]

    @staticmethod
    def rollouts(fleet: Fleet) -> Mapping[str, Rollout]:
        every = [*fleet.past, *([] if fleet.rollout is None else [fleet.rollout])]
        return {rollout.id: rollout for rollout in every}


TestWildFleet: Any = WildFleet.TestCase
TestWildFleet.settings = settings(
    max_examples=300,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    # every run looks elsewhere; what it finds becomes an example above
    database=None,
    phases=[Phase.generate, Phase.shrink],
)
