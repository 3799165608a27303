"""A canary's steps: who carries its share, for how long, and what a verdict does."""

from __future__ import annotations

import pytest

from serve_app.rollout.analysis import Outcome
from serve_app.rollout.canary import traffic
from serve_app.rollout.events import Judged, Left
from serve_app.rollout.machine import advance
from serve_app.rollout.plan import CanaryStep, OnFailure, Placement
from serve_app.rollout.recovery import restored
from serve_app.rollout.state import Fleet, Pause, State
from tests.serve_app.rollout.fleets import (
    NEW,
    OLD,
    OTHER,
    TENANT,
    WATCHED,
    abort,
    after,
    ask,
    broken,
    canary,
    desired,
    fleet_of,
    judged,
    later,
    load,
    manual,
    obeyed,
    of,
    pause,
    promote,
    resume,
    retry,
    rolled,
    said,
    settled,
    staged_everywhere,
    state_of,
    step,
    unload,
    waits_for,
)

PLACEMENTS: list[Placement] = ["shared", "dedicated"]


def begun(
    count: int,
    *steps: CanaryStep,
    placement: Placement = "shared",
    watched: bool = False,
    on_failure: OnFailure = "rollback",
    deadline_s: float = 600,
) -> Fleet:
    """Every replica has staged NEW, and none knows of its share yet."""
    asked = canary(
        *(steps or (step(10, 60), step(50, 60))),
        placement=placement,
        analysis=WATCHED if watched else None,
        on_failure=on_failure,
        deadline_s=deadline_s,
    )
    return staged_everywhere(advance(fleet_of(count), asked))


def placed(
    count: int,
    *steps: CanaryStep,
    placement: Placement = "shared",
    watched: bool = False,
    on_failure: OnFailure = "rollback",
    deadline_s: float = 600,
) -> Fleet:
    """Every replica does its part in the first step, since 11.0."""
    fleet = begun(
        count,
        *steps,
        placement=placement,
        watched=watched,
        on_failure=on_failure,
        deadline_s=deadline_s,
    )
    return settled(fleet)


def weight(fleet: Fleet) -> float:
    now = traffic(fleet)
    assert now is not None
    return now.weight


def on(fleet: Fleet, revision: str) -> list[str]:
    return sorted(r for r, what in fleet.assigned.items() if what == revision)


# ---- shared -------------------------------------------------------------------------------------


def test_no_request_gets_the_canary_before_all_have_staged_it() -> None:
    fleet = advance(fleet_of(2), canary(step(10)))
    fleet = advance(fleet, said("r1", staged=NEW))
    assert (traffic(fleet), desired(fleet, "r1").also_serves) == (None, ())


def test_a_shared_canary_is_served_besides_stable_on_every_replica_with_its_weight() -> None:
    fleet = begun(3)
    for replica in ("r1", "r2", "r3"):
        want = desired(fleet, replica)
        assert (want.hold, want.also_serves) == (OLD, (NEW,))
        assert want.traffic is not None
        assert (want.traffic.canary, want.traffic.weight) == (NEW, 10)
        assert (want.traffic.placement, want.traffic.step_id) == ("shared", "rollout-1.1.1")


def test_a_canary_is_shared_where_its_plan_does_not_say() -> None:
    fleet = staged_everywhere(advance(fleet_of(1), canary(step(10, 60))))
    assert desired(fleet, "r1").also_serves == (NEW,)


def test_a_step_is_held_from_when_the_last_replica_does_its_part() -> None:
    fleet = obeyed(begun(2), "r1", at=20)
    assert of(fleet).placed_at is None
    fleet = obeyed(fleet, "r2", at=30)
    assert (of(fleet).placed_at, of(fleet).hold_until) == (30, 90)


def test_a_replica_that_goes_by_the_weight_without_the_canary_does_not_do_its_part() -> None:
    fleet = begun(1)
    fleet = advance(fleet, said("r1", staged=NEW, traffic=traffic(fleet)))
    assert of(fleet).placed_at is None


def test_after_its_hold_a_step_gives_way_to_the_next() -> None:
    fleet = placed(2)
    assert of(later(fleet, 70.9)).step == 0
    fleet = later(fleet, 71)
    assert (of(fleet).step, of(fleet).placed_at, weight(fleet)) == (1, None, 50)
    assert of(fleet).step_id == "rollout-1.2.1"
    assert of(settled(fleet, at=80)).hold_until == 140


def test_behind_the_last_step_the_whole_fleet_moves_in_waves() -> None:
    fleet = later(placed(3, step(10, 1)), 12)
    assert (of(fleet).current, weight(fleet)) == (None, 100)
    assert (on(fleet, NEW), desired(fleet, "r1").also_serves) == (["r1"], ())
    assert desired(fleet, "r2").also_serves == (NEW,)
    fleet = rolled(fleet)
    assert (state_of(fleet), fleet.stable, traffic(fleet)) == (State.SUCCEEDED, NEW, None)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("count", [2, 3, 7])
def test_a_canary_that_nothing_disturbs_ends_with_the_target_as_stable(
    placement: Placement, count: int
) -> None:
    fleet = rolled(begun(count, step(1), step(50), step(100), placement=placement))
    assert (state_of(fleet), fleet.stable, fleet.history) == (State.SUCCEEDED, NEW, (OLD, NEW))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_canary_of_what_is_stable_already_goes_through_its_steps(placement: Placement) -> None:
    fleet = advance(fleet_of(2), canary(step(10), step(50), target=OLD, placement=placement))
    assert state_of(rolled(fleet, OLD)) is State.SUCCEEDED


def test_what_is_loaded_already_is_not_served_twice_as_the_canary() -> None:
    fleet = after(fleet_of(1), load(NEW), load(), canary(step(10, 60)))
    fleet = settled(fleet)
    assert desired(fleet, "r1").also_serves == (NEW, TENANT)
    fleet = advance(settled(advance(fleet, abort())), unload())
    assert (state_of(fleet), desired(fleet, "r1").also_serves) == (State.ABORTED, (NEW,))


def test_a_late_joiner_gets_stable_and_also_serves_the_canary() -> None:
    fleet = advance(placed(2), said("late", None, serving=False))
    want = desired(fleet, "late")
    assert (want.hold, want.also_serves, want.traffic) == (OLD, (NEW,), traffic(fleet))


def test_a_late_joiner_does_not_move_the_step_and_is_waited_for() -> None:
    fleet = advance(placed(2), said("late", None, serving=False))
    assert (of(fleet).step, of(fleet).placed_at) == (0, 11)
    waiting = later(fleet, 100)
    assert of(waiting).step == 0
    assert of(obeyed(waiting, at=101)).step == 1


def test_a_stable_revision_that_no_replica_can_hold_does_not_block_its_canary() -> None:
    fleet = fleet_of(1)
    failed = broken(OLD, fleet.generation)
    fleet = after(fleet, said("r1", None, serving=False, failure=failed), canary(step(10)))
    fleet = advance(fleet, said("r1", None, staged=NEW, serving=False, failure=failed))
    now = traffic(fleet)
    told = said("r1", None, serving=False, failure=failed, also_serves=(NEW,), traffic=now)
    fleet = advance(fleet, told)
    assert on(fleet, NEW) == ["r1"]
    assert rolled(fleet).stable == NEW


def test_an_abort_takes_the_canary_away_from_everyone() -> None:
    fleet = advance(placed(2), abort())
    assert (state_of(fleet), weight(fleet)) == (State.ABORTING, 0)
    assert desired(fleet, "r1").also_serves == ()
    fleet = obeyed(fleet, "r1")
    assert state_of(fleet) is State.ABORTING, "r2 serves it yet"
    assert state_of(settled(fleet)) is State.ABORTED


def test_an_abort_is_not_over_while_a_replica_may_go_by_a_weight_that_it_has_not_told_of() -> None:
    fleet = advance(begun(2), abort())
    assert state_of(fleet) is State.ABORTING, "what both said last is from before the canary"
    assert state_of(settled(fleet)) is State.ABORTED


def test_a_replica_that_cannot_serve_the_canary_besides_stable_fails_it() -> None:
    fleet = begun(2)
    fleet = advance(fleet, said("r1", staged=NEW, failure=broken(NEW, fleet.generation)))
    assert (state_of(fleet), of(fleet).reason) == (State.ABORTING, "replica r1: no luck")


# ---- dedicated ----------------------------------------------------------------------------------


def test_a_dedicated_canary_is_on_as_many_replicas_as_its_weight_needs() -> None:
    fleet = begun(4, step(30, 60), placement="dedicated")
    assert on(fleet, NEW) == ["r1"], "one at a time"
    fleet = settled(fleet)
    assert (on(fleet, NEW), weight(fleet), of(fleet).placed_at) == (["r1", "r2"], 30, 11)
    assert all(desired(fleet, replica).also_serves == () for replica in fleet.assigned)


def test_the_weight_is_no_larger_than_what_is_placed() -> None:
    fleet = begun(4, step(50, 60), placement="dedicated")
    assert weight(fleet) == 0, "r1 is on its way"
    fleet = obeyed(fleet, "r1")
    assert (weight(fleet), of(fleet).placed_at) == (33.333, None), "r1 of three that serve"
    fleet = obeyed(fleet, "r2")
    assert weight(fleet) == 50


def test_to_promote_it_in_full_does_not_put_on_one_replica_what_all_shall_carry() -> None:
    fleet = placed(4, step(10, 60), step(80, 60), placement="dedicated")
    fleet = advance(fleet, promote(full=True))
    assert (weight(fleet), on(fleet, NEW)) == (33.333, ["r1", "r2"])
    assert rolled(fleet).stable == NEW


def test_below_all_of_the_requests_one_replica_stays_with_stable() -> None:
    fleet = placed(3, step(99, 60), placement="dedicated")
    assert on(fleet, OLD) == ["r3"]


def test_a_dedicated_canary_on_one_replica_is_never_placed_and_fails_in_time() -> None:
    fleet = obeyed(begun(1, placement="dedicated", deadline_s=30))
    assert (on(fleet, NEW), of(fleet).placed_at) == ([], None)
    fleet = later(fleet, 40)
    assert of(fleet).reason == "step 1 was not over within 30 s"


def test_while_it_is_taken_back_no_request_is_sent_to_a_dedicated_canary() -> None:
    fleet = advance(placed(4, step(50, 60), placement="dedicated"), abort())
    assert (weight(fleet), on(fleet, NEW)) == (0, ["r2"]), "in waves, like on the way there"
    assert state_of(rolled(fleet, OLD)) is State.ABORTED


def test_a_dead_canary_replica_is_replaced() -> None:
    fleet = advance(placed(4, step(25, 60), placement="dedicated"), Left(replica="r1", at=20))
    assert (on(fleet, NEW), weight(fleet)) == (["r2"], 0)
    fleet = obeyed(fleet, at=21)
    assert (weight(fleet), of(fleet).placed_at, of(fleet).step) == (25, 11, 0)


def test_a_step_is_not_left_while_no_replica_carries_it() -> None:
    fleet = placed(3, placement="dedicated")
    fleet = after(fleet, Left(replica="r1", at=20), Left(replica="r2", at=20))
    fleet = later(fleet, 100)
    assert (of(fleet).step, on(fleet, OLD)) == (0, ["r3"])


def test_scaling_moves_replicas_and_never_the_step() -> None:
    fleet = placed(4, step(50, 60), placement="dedicated")
    for replica in ("r5", "r6"):
        fleet = advance(fleet, said(replica, None, serving=False))
    assert of(fleet).step == 0
    fleet = settled(fleet)
    assert (on(fleet, NEW), of(fleet).step) == (["r1", "r2", "r3"], 0)


def test_who_is_not_needed_any_more_after_others_left_goes_back_to_stable() -> None:
    fleet = placed(4, step(50, 60), placement="dedicated")
    fleet = after(fleet, Left(replica="r3", at=20), Left(replica="r4", at=20))
    assert (on(fleet, NEW), on(fleet, OLD)) == (["r1"], ["r2"])
    fleet = settled(fleet)
    assert weight(fleet) == 50


def test_who_serves_the_canary_stays_on_it_when_one_of_two_has_to_go_back() -> None:
    fleet = placed(4, step(50, 60), placement="dedicated", on_failure="pause")
    failed = said("r1", None, serving=False, failure=broken(NEW, fleet.generation))
    fleet = after(fleet, failed, Left(replica="r3", at=20), Left(replica="r4", at=20))
    assert (on(fleet, NEW), on(fleet, OLD)) == (["r2"], ["r1"])


# ---- whatever a superseded rollout left ---------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("first", [NEW, OTHER])
def test_what_a_superseded_rollout_moved_goes_back_to_stable_before_a_canary(
    first: str, placement: Placement
) -> None:
    fleet = staged_everywhere(advance(fleet_of(3), ask(first)), first)
    fleet = after(fleet, said("r1", first), said("r2", first), pause())
    fleet = obeyed(advance(fleet, canary(step(10, 60), placement=placement)))
    fleet = settled(fleet)
    assert len(on(fleet, NEW)) == (1 if placement == "dedicated" else 0)
    assert on(fleet, OTHER) == []
    assert of(fleet).placed_at is not None


def test_a_new_plan_takes_the_place_of_a_canary_and_keeps_the_way_back() -> None:
    fleet = advance(placed(2), ask(OTHER, at=20))
    assert (fleet.past[0].state, of(fleet).previous) == (State.SUPERSEDED, OLD)
    assert (traffic(fleet), desired(fleet, "r1").also_serves) == (None, ())
    assert rolled(fleet, OTHER).stable == OTHER


# ---- a hold that waits for a user ----------------------------------------------------------------


def test_a_step_that_is_held_by_hand_waits_to_be_promoted() -> None:
    fleet = placed(2, manual(10), manual(50))
    assert (state_of(fleet), waits_for(fleet)) == (State.PAUSED, Pause.STEP)
    assert of(fleet).reason == "step 1 of 2 waits to be promoted"
    assert of(fleet).hold_until is None
    assert later(fleet, 1e6) == fleet, "no deadline while it waits"
    fleet = advance(fleet, promote(at=1e6))
    assert (state_of(fleet), of(fleet).step, weight(fleet)) == (State.PROGRESSING, 1, 50)


def test_a_dead_canary_replica_is_replaced_while_its_step_waits_to_be_promoted() -> None:
    fleet = placed(4, manual(25), placement="dedicated")
    fleet = advance(fleet, Left(replica="r1", at=20))
    assert (state_of(fleet), on(fleet, NEW)) == (State.PAUSED, ["r2"])


# ---- verdicts -----------------------------------------------------------------------------------


def test_with_an_analysis_time_alone_does_not_end_a_step() -> None:
    fleet = placed(2, watched=True)
    assert of(later(fleet, 500)).step == 0


def test_a_pass_counts_when_the_hold_is_over() -> None:
    fleet = placed(2, watched=True)
    assert advance(fleet, judged(fleet, Outcome.PASS, at=70.9)) == fleet
    fleet = advance(fleet, judged(fleet, Outcome.PASS, at=71))
    assert (of(fleet).step, [each.outcome for each in of(fleet).verdicts]) == (1, [Outcome.PASS])


def test_a_pass_does_not_count_while_a_replica_does_not_do_its_part() -> None:
    fleet = advance(placed(2, watched=True), said("late", None, serving=False))
    assert advance(fleet, judged(fleet, Outcome.PASS, at=71)) == fleet


def test_a_pass_before_the_step_is_placed_or_while_it_is_paused_changes_nothing() -> None:
    fleet = begun(2, watched=True)
    assert advance(fleet, judged(fleet, Outcome.PASS, at=100)) == fleet
    fleet = advance(placed(2, watched=True), pause())
    assert advance(fleet, judged(fleet, Outcome.PASS, at=100)) == fleet


def test_a_failure_takes_the_canary_back_at_any_time() -> None:
    fleet = placed(2, watched=True)
    fleet = advance(fleet, judged(fleet, Outcome.FAIL, why="error rate 0.5 is not at most 0.01"))
    assert state_of(fleet) is State.ABORTING
    assert of(fleet).reason == ("step 1 failed its analysis: error rate 0.5 is not at most 0.01")
    assert of(fleet).verdicts[-1].outcome is Outcome.FAIL


def test_a_failure_waits_for_a_user_when_the_plan_says_so() -> None:
    fleet = placed(2, watched=True, on_failure="pause")
    fleet = advance(fleet, judged(fleet, Outcome.FAIL))
    assert (state_of(fleet), waits_for(fleet)) == (State.PAUSED, Pause.FAILURE)
    again = [judged(fleet, outcome, at=99) for outcome in Outcome]
    assert after(fleet, *again) == fleet, "it waits already"


@pytest.mark.parametrize(
    ("on_failure", "state"), [("rollback", State.ABORTING), ("pause", State.PAUSED)]
)
def test_a_failure_counts_while_a_step_waits_to_be_promoted(
    on_failure: OnFailure, state: State
) -> None:
    fleet = placed(2, manual(10), watched=True, on_failure=on_failure)
    fleet = advance(fleet, judged(fleet, Outcome.FAIL))
    assert state_of(fleet) is state
    assert waits_for(fleet) in (None, Pause.FAILURE)


def test_that_nothing_is_known_is_recorded_once_and_named_by_the_deadline() -> None:
    fleet = placed(2, watched=True)
    unclear = judged(fleet, Outcome.INCONCLUSIVE, why="3 samples, 30 are needed")
    fleet = advance(fleet, unclear)
    assert len(of(fleet).verdicts) == 1
    assert advance(fleet, unclear) == fleet
    fleet = later(fleet, 671)
    assert of(fleet).reason == "step 1 was not over within 600 s: 3 samples, 30 are needed"


def test_what_is_known_later_takes_the_place_of_that_nothing_was_known() -> None:
    fleet = placed(2, watched=True)
    fleet = advance(fleet, judged(fleet, Outcome.INCONCLUSIVE))
    fleet = advance(fleet, judged(fleet, Outcome.PASS, at=71))
    assert [each.outcome for each in of(fleet).verdicts] == [Outcome.PASS]


def test_after_a_retry_the_deadline_names_what_was_not_known_then() -> None:
    fleet = placed(1, watched=True, on_failure="pause")
    fleet = advance(fleet, judged(fleet, Outcome.FAIL, why="error rate 0.5"))
    fleet = settled(advance(fleet, retry(at=20)), at=20)
    timed_out = later(fleet, 680)
    assert of(timed_out).reason == "step 1 was not over within 600 s"
    fleet = advance(fleet, judged(fleet, Outcome.INCONCLUSIVE, why="too few samples"))
    assert of(later(fleet, 680)).reason == "step 1 was not over within 600 s: too few samples"
    fleet = settled(advance(later(fleet, 680), retry(at=700)), at=700)
    assert of(later(fleet, 1360)).reason == "step 1 was not over within 600 s", "it is from before"


def test_a_verdict_on_a_step_that_was_left_changes_nothing() -> None:
    fleet = placed(2, watched=True)
    stale = judged(fleet, Outcome.FAIL)
    fleet = advance(fleet, promote())
    assert advance(fleet, stale) == fleet


@pytest.mark.parametrize("outcome", list(Outcome))
def test_a_verdict_without_a_canary_changes_nothing(outcome: Outcome) -> None:
    fleet = placed(2, step(10), watched=True)
    verdict = judged(fleet, outcome)
    ended = rolled(advance(fleet, promote(full=True)))
    aborting = advance(fleet, abort())
    moving = advance(fleet, promote())
    behind = judged(moving, outcome)
    for then, event in ((ended, verdict), (aborting, verdict), (moving, behind)):
        assert advance(then, Judged(step_id=event.step_id, verdict=event.verdict, at=99)) == then
    fresh = fleet_of(1)
    assert advance(fresh, verdict) == fresh


def test_what_is_kept_of_the_verdicts_stays_small() -> None:
    fleet = placed(1, watched=True, on_failure="pause")
    for number in range(250):
        fleet = advance(fleet, judged(fleet, Outcome.FAIL, at=20 + number))
        fleet = settled(advance(fleet, retry(at=20 + number)), at=20 + number)
    assert len(of(fleet).verdicts) == 200


# ---- failures and deadlines ---------------------------------------------------------------------


def test_the_deadline_of_a_step_comes_after_its_hold() -> None:
    fleet = placed(1, step(10, 60), watched=True, deadline_s=30)
    assert state_of(later(fleet, 100.9)) is State.PROGRESSING
    assert state_of(later(fleet, 101)) is State.ABORTING


def test_a_replica_that_fails_pauses_the_rollout_when_the_plan_says_so() -> None:
    fleet = placed(4, step(50, 60), placement="dedicated", on_failure="pause")
    failed = said("r1", NEW, serving=False, failure=broken(NEW, fleet.generation))
    fleet = advance(fleet, failed)
    assert (state_of(fleet), waits_for(fleet)) == (State.PAUSED, Pause.FAILURE)
    assert of(fleet).reason == "replica r1: no luck"
    fleet = advance(fleet, Left(replica="r1", at=20))
    assert on(fleet, NEW) == ["r2"], "no other replica is sent to the target"


def test_a_deadline_pauses_the_rollout_when_the_plan_says_so() -> None:
    fleet = later(begun(2, on_failure="pause"), 611)
    assert (state_of(fleet), waits_for(fleet)) == (State.PAUSED, Pause.FAILURE)
    assert later(fleet, 1e6) == fleet


def test_a_user_who_pauses_the_steps_suspends_the_deadline() -> None:
    fleet = advance(placed(2, watched=True), pause())
    assert later(fleet, 1e6) == fleet
    fleet = advance(fleet, resume(at=1e6))
    assert state_of(later(fleet, 1e6 + 659)) is State.PROGRESSING
    assert state_of(later(fleet, 1e6 + 660)) is State.ABORTING


# ---- a controller that dies ---------------------------------------------------------------------


def test_a_restart_ends_no_step_before_the_replicas_have_reported() -> None:
    fleet = restored(placed(2), at=70)
    fleet = later(fleet, 80)
    assert of(fleet).step == 0
    fleet = obeyed(fleet, at=81)
    assert of(fleet).step == 1


def test_a_restart_does_not_change_the_weight_of_a_dedicated_canary() -> None:
    fleet = placed(4, step(25, 60), placement="dedicated")
    again = later(restored(fleet, at=20), 21)
    assert weight(again) == 25
    again = advance(again, said("r2"))
    assert weight(again) == 25
    again = advance(again, said("r1", None, serving=False))
    assert weight(again) == 0, "it has reported, and does not carry it"


def test_a_restart_brings_no_replica_back_from_what_it_may_still_serve() -> None:
    fleet = placed(4, step(50, 60), placement="dedicated")
    fleet = later(restored(advance(fleet, pause()), at=20), 21)
    fleet = after(fleet, abort(at=22))
    assert on(fleet, NEW) == ["r1", "r2"], "it is not known yet which replicas serve"
