"""The rollout machine: each rule of staging, waves, aborting and membership by a small example.

A canary's steps are in test_canary, requests in test_requests; all of them together meet a fleet
gone wild in test_wild_fleet.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.rollout.errors import GenerationMismatch, IllegalEvent
from serve_app.rollout.events import Event, Left, ReportBatch, Reported, Ticked
from serve_app.rollout.machine import advance, silent
from serve_app.rollout.plan import InFlight, Strategy
from serve_app.rollout.recovery import restored
from serve_app.rollout.state import Desired, Fleet, Observed, State
from serve_app.rollout.walk import progress
from tests.serve_app.rollout.fleets import (
    NEW,
    OLD,
    OTHER,
    TENANT,
    abort,
    after,
    ask,
    broken,
    canary,
    desired,
    fleet_of,
    load,
    pending,
    rolled,
    said,
    staged_everywhere,
    state_of,
    step,
    unload,
)


def plain(fleet: Fleet) -> Desired:
    """The document of a replica that shall hold OLD, and nothing else."""
    return Desired(epoch=1, generation=fleet.generation, hold=OLD, stable=OLD, rollouts=1)


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
    acting_on = fleet.generation  # r1 has this document; the next one is the same for it
    fleet = after(fleet, ask(), said("r1", failure=broken(NEW, acting_on)))
    assert state_of(fleet) in (State.ABORTING, State.ABORTED)


def test_a_rollout_that_takes_too_long_is_taken_back() -> None:
    fleet = after(fleet_of(2), ask(deadline_s=30, at=100), said("r1", staged=NEW, at=101))
    assert state_of(advance(fleet, Ticked(at=129.9))) is State.STAGING
    fleet = advance(fleet, Ticked(at=130.0))
    assert fleet.rollout is not None
    assert fleet.rollout.reason == "it was not over within 30 s"
    assert state_of(fleet) is State.ABORTED


def test_the_deadline_is_a_moment_that_a_restart_does_not_move() -> None:
    fleet = after(fleet_of(2), ask(deadline_s=30, at=100))
    fleet = restored(fleet, at=129)
    assert state_of(advance(fleet, Ticked(at=131))) is State.ABORTING


def test_an_abort_outranks_the_target_and_drops_what_was_staged() -> None:
    fleet = staged_everywhere(advance(fleet_of(2), ask()))
    fleet = after(fleet, said("r1", NEW, staged=NEW), said("r2", NEW, serving=False), abort())
    assert state_of(fleet) is State.ABORTING
    assert desired(fleet, "r2") == plain(fleet)
    assert desired(fleet, "r1").stage is None
    fleet = advance(fleet, said("r2", NEW))
    assert state_of(fleet) is State.ABORTING, "it committed the target after all: too late"
    assert state_of(rolled(fleet, OLD)) is State.ABORTED


def test_a_second_abort_changes_nothing() -> None:
    fleet = staged_everywhere(advance(fleet_of(2), ask()))
    aborting = after(fleet, said("r1", NEW), abort())
    assert advance(aborting, abort(at=13)) == aborting


def test_an_abort_is_not_over_while_a_replica_that_was_sent_to_the_target_has_not_answered() -> (
    None
):
    fleet = staged_everywhere(advance(fleet_of(2), ask()))
    assert fleet.assigned["r1"] == NEW
    # r1 received it and drains; its last report is older
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
    serving = {r for r, seen in fleet.observed.items() if seen.state and seen.state.serving}
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
    assert rolled(advance(fleet, abort("rollout-2")), OLD).stable == OLD


def test_a_new_rollout_goes_ahead_of_an_abort_that_is_still_under_way() -> None:
    fleet = staged_everywhere(advance(fleet_of(2), ask()))
    fleet = after(fleet, said("r1", NEW), abort(), ask(OTHER))
    assert fleet.past[0].state is State.SUPERSEDED
    assert rolled(fleet, OTHER).stable == OTHER


def test_a_rollout_to_stable_waits_for_the_replica_that_was_just_sent_elsewhere() -> None:
    fleet = staged_everywhere(advance(fleet_of(2), ask()))
    assert fleet.assigned["r1"] == NEW
    fleet = after(fleet, said("r1", OLD, staged=NEW), ask(OLD))  # r1 reported before it knew of NEW
    assert fleet.running is not None
    assert rolled(fleet, OLD).assigned == {"r1": OLD, "r2": OLD}


def test_a_late_joiner_gets_stable_whatever_runs() -> None:
    fleet = staged_everywhere(advance(fleet_of(2), ask()))
    assert desired(fleet, "late").hold == OLD
    fleet = advance(fleet, said("late", None, serving=False))
    assert fleet.assigned["late"] == OLD
    fleet = advance(advance(fleet_of(2), ask(OTHER)), abort())
    assert desired(fleet, "late") == plain(fleet)


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


def test_a_restart_is_a_new_epoch_in_which_no_replica_serves_before_reporting() -> None:
    fleet = staged_everywhere(advance(fleet_of(2), ask()))
    again = restored(fleet, at=99.0)
    assert (again.epoch, again.generation) == (fleet.epoch + 1, fleet.generation)
    assert again.assigned == fleet.assigned
    assert again.observed == {"r1": Observed(seen_at=99.0), "r2": Observed(seen_at=99.0)}
    again = advance(again, said("r1", NEW))
    assert again.assigned == fleet.assigned, "no wave before r2 has reported"
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


def test_what_is_loaded_is_served_by_every_replica_besides_its_default() -> None:
    fleet = after(fleet_of(2), load(), load(OTHER))
    for replica in ("r1", "r2", "late"):
        assert desired(fleet, replica).also_serves == (TENANT, OTHER)
    assert set(pending(fleet)) == {"r1", "r2"}
    fleet = rolled(advance(fleet, unload()), OLD)
    assert desired(fleet, "r1").also_serves == (OTHER,)


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


def test_what_a_replica_holds_is_never_in_also_serves() -> None:
    fleet = staged_everywhere(after(fleet_of(2), load(NEW), load(), ask(NEW)))
    assert desired(fleet, "r1").hold == NEW
    assert desired(fleet, "r1").also_serves == (TENANT,)
    assert desired(fleet, "r2").also_serves == (NEW, TENANT)
    fleet = rolled(fleet)
    assert fleet.loaded == (NEW, TENANT), "it was loaded, and it still is"
    assert desired(rolled(advance(fleet, ask(OTHER)), OTHER), "r1").also_serves == (NEW, TENANT)


def test_a_rollout_does_not_wait_for_what_is_loaded() -> None:
    fleet = after(fleet_of(1), load(), ask(), said("r1", staged=NEW), said("r1", NEW))
    assert state_of(fleet) is State.SUCCEEDED
    assert set(pending(fleet)) == {"r1"}


def test_loading_in_the_middle_of_a_rollout_moves_no_replica() -> None:
    fleet = staged_everywhere(advance(fleet_of(3), ask()))
    for event in (load(), load(NEW), unload()):
        after_it = advance(fleet, event)
        assert (after_it.assigned, after_it.rollout) == (fleet.assigned, fleet.rollout)


def test_a_restart_keeps_what_was_loaded() -> None:
    fleet = after(fleet_of(2), load(), load(OTHER))
    assert restored(fleet, at=99.0).loaded == (TENANT, OTHER)


def test_a_failure_among_several_reports_counts() -> None:
    fleet = staged_everywhere(advance(fleet_of(2), ask()))
    failed = said("r1", OLD, staged=NEW, failure=broken(NEW, fleet.generation))
    fleet = advance(fleet, ReportBatch(reports=(failed, said("r2", staged=NEW)), at=12))
    assert state_of(fleet) is State.ABORTING


def test_of_two_reports_of_one_replica_the_later_one_counts() -> None:
    fleet = advance(fleet_of(2), ask())
    reports = said("r1", at=11), said("r1", staged=NEW, at=12)
    fleet = advance(fleet, ReportBatch(reports=reports, at=12))
    seen = fleet.observed["r1"]
    assert seen.state is not None
    assert (seen.state.staged, seen.seen_at) == (NEW, 12)


a_report = st.builds(
    said,
    st.sampled_from(["r1", "r2", "r3", "r4", "r5"]),
    st.sampled_from([OLD, NEW]),
    staged=st.sampled_from([NEW, None]),
    serving=st.booleans(),
)
BEFORE = {
    "nothing runs": fleet_of(3),
    "staging": advance(fleet_of(3), ask()),
    "in waves": staged_everywhere(advance(fleet_of(3), ask())),
    "a canary": staged_everywhere(advance(fleet_of(3), canary(step(10)))),
    "a dedicated canary": staged_everywhere(
        advance(fleet_of(3), canary(step(50), placement="dedicated"))
    ),
}


@given(
    before=st.sampled_from(sorted(BEFORE)),
    reports=st.lists(a_report, min_size=1, max_size=5, unique_by=lambda each: each.replica),
)
def test_several_reports_at_once_are_the_same_as_one_by_one(
    before: str, reports: list[Reported]
) -> None:
    fleet = BEFORE[before]
    at_once = advance(fleet, ReportBatch(reports=tuple(reports), at=11))
    one_by_one = after(fleet, *reports)
    assert at_once.observed.keys() == one_by_one.observed.keys()
    joined = [each for each in reports if each.replica not in fleet.assigned]
    undecided = after(fleet, *reports[:-1]).generation == fleet.generation
    if undecided:  # else what was decided early was decided without the later ones
        assert at_once == one_by_one
    if len(joined) == len(reports) and before == "nothing runs":
        assert replace(at_once, generation=one_by_one.generation) == one_by_one
        assert at_once.generation == fleet.generation + 1, "one decision for all of them"
