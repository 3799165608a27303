"""A controller that starts again: from its journal, or from the replicas alone."""

from __future__ import annotations

from serve_app.rollout.events import Ticked
from serve_app.rollout.machine import advance
from serve_app.rollout.recovery import rebuilt, redeclared, restored
from serve_app.rollout.state import Desired, Fleet, Observed, State
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
    later,
    load,
    of,
    pause,
    pending,
    promote,
    rolled,
    said,
    settled,
    staged_everywhere,
    state_of,
    step,
)


def documents(fleet: Fleet) -> dict[str, Desired]:
    """The documents of replicas that act on the last decision."""
    return {replica: desired(fleet, replica) for replica in fleet.assigned}


# ---- from the journal ---------------------------------------------------------------------------


def test_a_restart_keeps_everything_that_was_intended() -> None:
    asked = canary(step(10, 60), step(50, 60))
    fleet = settled(after(fleet_of(2), load(), asked))
    fleet = after(fleet, promote(at=20), pause(at=21))
    again = restored(fleet, at=99)
    assert (again.epoch, again.observed["r1"]) == (fleet.epoch + 1, Observed(seen_at=99))
    for kept in ("generation", "stable", "loaded", "assigned", "rollout", "history", "rollouts"):
        assert getattr(again, kept) == getattr(fleet, kept)


def test_after_a_restart_in_an_abort_no_replica_is_called_back_before_it_has_reported() -> None:
    fleet = staged_everywhere(advance(fleet_of(4), ask()))
    for replica in ("r1", "r2", "r3"):
        fleet = advance(fleet, said(replica, NEW, staged=NEW))
    fleet = restored(advance(fleet, abort()), at=99)
    before = fleet.assigned
    fleet = advance(fleet, Ticked(at=100))
    assert fleet.assigned == before
    assert state_of(rolled(fleet, OLD)) is State.ABORTED


# ---- from the replicas --------------------------------------------------------------------------


def test_what_the_replicas_hold_when_nothing_runs_is_taken_over_and_moves_no_replica() -> None:
    fleet = rolled(after(fleet_of(2), load(), ask()))
    again = rebuilt(documents(fleet), at=99)
    assert (again.epoch, again.generation) == (fleet.epoch + 1, fleet.generation + 1)
    assert (again.stable, again.loaded, again.history) == (NEW, (TENANT,), (NEW,))
    assert (again.rollouts, again.running, again.assigned) == (1, None, {"r1": NEW, "r2": NEW})
    assert pending(settled(again)) == {}


def test_numbers_of_rollouts_go_on_where_they_were() -> None:
    fleet = rolled(advance(fleet_of(2), ask()))
    again = settled(rebuilt(documents(fleet), at=99))
    assert of(advance(again, ask(OTHER))).id == "rollout-2"


def test_the_newest_document_knows_the_most() -> None:
    fleet = fleet_of(2)
    older = desired(advance(fleet, load()), "r1")
    fleet = rolled(after(fleet, load(), load(OTHER), ask()))
    again = rebuilt({"r1": older, "r2": desired(fleet, "r2")}, at=99)
    assert (again.stable, again.loaded, again.rollouts) == (NEW, (TENANT, OTHER), 1)
    later_epoch = Desired(epoch=7, generation=1, hold=OTHER, stable=OTHER)
    again = rebuilt({"r1": desired(fleet, "r1"), "r2": later_epoch}, at=99)
    assert (again.epoch, again.stable) == (8, OTHER)


def test_a_rollout_that_was_staged_is_taken_back() -> None:
    fleet = advance(fleet_of(2), ask())
    again = rebuilt(documents(fleet), at=99)
    assert (state_of(again), of(again).target, of(again).id) == (State.ABORTING, NEW, "rollout-1")
    assert of(again).reason == "the journal was lost while it was under way"
    assert desired(again, "r1").stage is None
    assert state_of(rolled(again, OLD)) is State.ABORTED


def test_a_canary_that_was_under_way_is_taken_back_and_what_was_loaded_stays() -> None:
    fleet = settled(after(fleet_of(2), load(), canary(step(10, 60))))
    again = rebuilt(documents(fleet), at=99)
    assert (desired(again, "r1").also_serves, desired(again, "r1").traffic) == ((TENANT,), None)
    again = rolled(again, OLD)
    assert (state_of(again), again.loaded) == (State.ABORTED, (TENANT,))


def test_an_abort_that_was_under_way_goes_on() -> None:
    fleet = settled(advance(fleet_of(2), canary(step(10, 60))))
    again = rebuilt(documents(advance(fleet, abort())), at=99)
    assert (state_of(again), of(again).target) == (State.ABORTING, NEW)


def test_who_holds_something_else_than_stable_shows_that_a_rollout_was_under_way() -> None:
    fleet = staged_everywhere(advance(fleet_of(3), ask()))
    fleet = advance(after(fleet, said("r1", NEW, staged=NEW), said("r2", NEW)), abort())
    again = rebuilt(documents(fleet), at=99)
    assert (state_of(again), of(again).target, again.stable) == (State.ABORTING, NEW, OLD)
    again = advance(again, Ticked(at=100))
    assert NEW in again.assigned.values(), "in waves, once they have reported"
    assert state_of(rolled(again, OLD)) is State.ABORTED


def test_what_fails_on_the_first_document_after_it_counts() -> None:
    fleet = advance(fleet_of(1), ask())
    again = rebuilt(documents(fleet), at=99)
    stale = said("r1", NEW, serving=False, failure=broken(OLD, fleet.generation))
    again = advance(again, stale)
    assert state_of(again) is State.ABORTING
    stuck = said("r1", NEW, serving=False, failure=broken(OLD, again.generation))
    assert state_of(advance(again, stuck)) is State.FAILED


def test_a_rollout_after_it_goes_ahead_as_ever() -> None:
    fleet = advance(fleet_of(2), ask())
    again = later(rebuilt(documents(fleet), at=99), 100)
    assert rolled(advance(again, ask(OTHER)), OTHER).stable == OTHER


# ---- a deploy with another adapter --------------------------------------------------------------


def test_a_declared_adapter_is_stable_and_ends_what_runs() -> None:
    before = after(fleet_of(2), load(), ask())
    again = redeclared(before, Fleet(stable=OTHER, history=(OTHER,)), at=99)
    assert (again.stable, again.history, again.rollout) == (OTHER, (OTHER,), None)
    assert (again.loaded, again.rollouts) == ((TENANT,), 1)
    [past] = again.past
    assert (past.state, past.ended_at) == (State.SUPERSEDED, 99)
    assert past.reason == "a deploy declared another adapter"


def test_a_declared_adapter_keeps_what_the_fleet_remembers() -> None:
    ended = rolled(advance(fleet_of(2), ask(key="mine")))
    for before in (fleet_of(2), ended):
        again = redeclared(before, Fleet(stable=OTHER), at=99)
        assert (again.keys, len(again.past)) == (before.keys, before.rollouts)
    assert again.past == (ended.rollout,)
