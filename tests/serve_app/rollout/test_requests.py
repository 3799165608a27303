"""What users ask of a rollout, and why it cannot be now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from serve_app.rollout.analysis import Outcome
from serve_app.rollout.canary import traffic
from serve_app.rollout.errors import GenerationMismatch, IllegalEvent
from serve_app.rollout.events import AnyUserRequest
from serve_app.rollout.machine import advance
from serve_app.rollout.plan import OnFailure
from serve_app.rollout.precondition import Precondition
from serve_app.rollout.state import Fleet, Pause, State
from tests.serve_app.rollout.fleets import (
    NEW,
    OLD,
    OTHER,
    WATCHED,
    abort,
    after,
    ask,
    broken,
    canary,
    fleet_of,
    judged,
    later,
    load,
    manual,
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

EVERY: list[AnyUserRequest] = [
    ask(),
    abort(),
    pause(),
    resume(),
    promote(),
    promote(full=True),
    retry(),
    load(),
    unload(),
]


def keyed(event: AnyUserRequest, key: str) -> AnyUserRequest:
    return replace(event, precondition=Precondition(key=key))


def running(*, on_failure: OnFailure = "rollback") -> Fleet:
    """A canary of two steps, placed on both replicas since 11.0."""
    asked = canary(step(10, 60), step(50, 60), on_failure=on_failure)
    return settled(advance(fleet_of(2), asked))


def failed(*, strategy: Callable[..., AnyUserRequest] = ask, begun: bool = False) -> Fleet:
    """A rolling rollout that waits since r2 could not."""
    fleet = advance(fleet_of(2), strategy(on_failure="pause"))
    if begun:
        fleet = staged_everywhere(fleet)
    failure = broken(NEW, fleet.generation)
    return advance(fleet, said("r2", serving=not begun, failure=failure))


# ---- those who know of another decision, or ask twice -------------------------------------------


@pytest.mark.parametrize("event", EVERY, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("expected", [0, 99])
def test_who_knows_of_another_decision_is_refused(event: AnyUserRequest, expected: int) -> None:
    fleet = running()
    with pytest.raises(GenerationMismatch) as refused:
        advance(fleet, replace(event, precondition=Precondition(expected_generation=expected)))
    assert (refused.value.expected, refused.value.actual) == (expected, fleet.generation)


def test_a_rollout_that_has_ended_is_named_before_the_generation_is_compared() -> None:
    fleet = running()
    request = replace(pause(), id="rollout-7", precondition=Precondition(expected_generation=0))
    with pytest.raises(IllegalEvent, match=r"to change rollout-7 .* it has ended"):
        advance(fleet, request)


def test_who_knows_of_the_last_decision_is_accepted() -> None:
    fleet = running()
    given = Precondition(expected_generation=fleet.generation)
    fleet = advance(fleet, replace(pause(), precondition=given))
    assert state_of(fleet) is State.PAUSED


def test_the_same_request_a_second_time_changes_nothing_whatever_it_expects() -> None:
    fleet = running()
    given = Precondition(key="mine", expected_generation=fleet.generation)
    event = replace(promote(), precondition=given)
    promoted = advance(fleet, event)
    assert (of(promoted).step, promoted.keys) == (1, ("mine",))
    assert advance(promoted, event) == promoted
    assert of(advance(promoted, keyed(event, "yours"))).step == 2


def test_a_request_that_was_refused_may_be_made_again_under_its_key() -> None:
    fleet = fleet_of(2)
    with pytest.raises(IllegalEvent):
        advance(fleet, keyed(pause(), "mine"))
    fleet = after(fleet, ask(), keyed(pause(), "mine"))
    assert state_of(fleet) is State.PAUSED


def test_a_rollout_is_known_by_the_key_that_it_was_asked_for_with() -> None:
    fleet = advance(fleet_of(2), ask(key="mine"))
    assert of(fleet).key == "mine"
    assert advance(fleet, ask(key="mine", at=99)) == fleet


def test_what_is_remembered_of_keys_stays_small() -> None:
    fleet = fleet_of(1)
    for number in range(250):
        fleet = advance(fleet, keyed(load(), f"k{number}"))
    assert (len(fleet.keys), fleet.keys[-1]) == (200, "k249")


# ---- with nothing to steer ----------------------------------------------------------------------


@pytest.mark.parametrize("event", [abort(), pause(), resume(), promote(), retry()])
def test_a_rollout_that_is_not_running_cannot_be_changed(event: AnyUserRequest) -> None:
    ended = rolled(advance(fleet_of(2), ask()))
    for fleet in (fleet_of(2), ended, advance(ended, ask(OTHER))):
        with pytest.raises(IllegalEvent, match=r"to change rollout-1 .* it has ended"):
            advance(fleet, event)


@pytest.mark.parametrize("event", [pause(), resume(), promote(), retry()])
def test_an_abort_cannot_be_turned_around(event: AnyUserRequest) -> None:
    fleet = advance(running(), abort())
    with pytest.raises(IllegalEvent, match="rollout-1 is aborting"):
        advance(fleet, event)


# ---- pause and resume ---------------------------------------------------------------------------


def test_a_pause_sends_no_further_replica_to_the_target_until_it_is_resumed() -> None:
    fleet = staged_everywhere(advance(fleet_of(3), ask()))
    fleet = after(fleet, pause(), said("r1", NEW))
    assert (state_of(fleet), of(fleet).reason) == (State.PAUSED, "paused")
    assert fleet.assigned == {"r1": NEW, "r2": OLD, "r3": OLD}
    fleet = advance(fleet, resume())
    assert (state_of(fleet), of(fleet).reason, waits_for(fleet)) == (State.PROGRESSING, "", None)
    assert fleet.assigned == {"r1": NEW, "r2": NEW, "r3": OLD}


def test_a_pause_before_all_have_staged_goes_on_with_staging() -> None:
    fleet = staged_everywhere(after(fleet_of(2), ask(), pause()))
    assert state_of(fleet) is State.PAUSED
    assert state_of(advance(fleet_of(2), ask())) is State.STAGING
    fleet = advance(fleet, resume())
    assert (state_of(fleet), of(fleet).begun) == (State.PROGRESSING, True)


def test_a_second_pause_and_a_resume_of_what_goes_on_change_nothing() -> None:
    fleet = running()
    assert advance(fleet, resume()) == fleet
    fleet = advance(fleet, pause())
    assert advance(fleet, pause()) == fleet


@pytest.mark.parametrize("event", [resume(at=1e6), promote(at=1e6)])
def test_a_deadline_does_not_run_while_the_waves_are_paused(event: AnyUserRequest) -> None:
    fleet = staged_everywhere(advance(fleet_of(2), ask(deadline_s=30)))
    fleet = advance(later(advance(fleet, pause()), 1e6), event)
    assert state_of(later(fleet, 1e6 + 29)) is State.PROGRESSING
    assert state_of(later(fleet, 1e6 + 30)) is State.ABORTING


def test_what_failed_meanwhile_fails_the_rollout_when_it_is_resumed() -> None:
    fleet = after(fleet_of(2), ask(), pause())
    fleet = advance(fleet, said("r1", failure=broken(NEW, fleet.generation)))
    assert state_of(fleet) is State.PAUSED
    assert of(advance(fleet, resume())).reason == "replica r1: no luck"


def test_what_waits_for_a_promotion_or_has_failed_is_not_resumed() -> None:
    waits = settled(advance(fleet_of(1), canary(manual(10))))
    with pytest.raises(IllegalEvent, match="its step waits to be promoted"):
        advance(waits, resume())
    with pytest.raises(IllegalEvent, match="it failed; retry, promote or abort it"):
        advance(failed(), resume())


# ---- promote ------------------------------------------------------------------------------------


def test_a_promotion_leaves_the_step_whatever_is_measured() -> None:
    fleet = advance(running(), promote())
    assert (of(fleet).step, state_of(fleet)) == (1, State.PROGRESSING)
    fleet = advance(fleet, promote())
    assert of(fleet).current is None
    assert rolled(fleet).stable == NEW


def test_a_full_promotion_leaves_every_step() -> None:
    fleet = advance(running(), promote(full=True))
    assert of(fleet).current is None
    now = traffic(fleet)
    assert now is not None
    assert now.weight == 100


def test_a_full_promotion_may_come_before_all_have_staged() -> None:
    fleet = after(fleet_of(2), canary(step(10, 60)), promote(full=True))
    assert (state_of(fleet), of(fleet).current) == (State.STAGING, None)
    assert rolled(fleet).stable == NEW


def test_a_step_that_has_not_begun_is_not_promoted() -> None:
    fleet = advance(fleet_of(2), canary(step(10, 60)))
    with pytest.raises(IllegalEvent, match="the fleet has not staged the adapter yet"):
        advance(fleet, promote())


def test_behind_the_last_step_there_is_nothing_to_promote() -> None:
    for fleet in (advance(fleet_of(2), ask()), advance(running(), promote(full=True))):
        with pytest.raises(IllegalEvent, match="there is no step left to promote"):
            advance(fleet, promote())


def test_a_promotion_of_what_is_paused_goes_on_with_the_next_step() -> None:
    fleet = after(running(), pause(), promote())
    assert (state_of(fleet), of(fleet).step) == (State.PROGRESSING, 1)


def test_a_promotion_of_what_failed_forgives_it() -> None:
    fleet = running(on_failure="pause")
    fleet = advance(fleet, said("r1", failure=broken(NEW, fleet.generation)))
    assert waits_for(fleet) is Pause.FAILURE
    fleet = advance(fleet, promote())
    assert (state_of(fleet), of(fleet).step, of(fleet).attempt) == (State.PROGRESSING, 1, 2)
    fleet = advance(failed(begun=True), promote())
    assert state_of(fleet) is State.PROGRESSING


# ---- retry --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("begun", "state"), [(False, State.STAGING), (True, State.PROGRESSING)])
def test_a_retry_goes_on_from_where_it_failed(begun: bool, state: State) -> None:
    fleet = advance(failed(begun=begun), retry(at=1e6))
    assert (state_of(fleet), of(fleet).reason, of(fleet).attempt) == (state, "", 2)
    assert state_of(later(fleet, 1e6 + 599)) is state
    assert waits_for(later(fleet, 1e6 + 600)) is Pause.FAILURE
    again = advance(fleet, said("r2", failure=broken(NEW, fleet.generation)))
    assert waits_for(again) is Pause.FAILURE, "what fails after it counts"


def test_a_retry_measures_the_step_again_from_the_start() -> None:
    asked = canary(step(10, 60), analysis=WATCHED, on_failure="pause")
    fleet = settled(advance(fleet_of(2), asked))
    fleet = advance(fleet, judged(fleet, Outcome.FAIL))
    fleet = advance(fleet, retry(at=100))
    assert (of(fleet).placed_at, of(fleet).step_id) == (None, "rollout-1.1.2")
    assert of(settled(fleet, at=101)).hold_until == 161
    assert [each.outcome for each in of(fleet).verdicts] == [Outcome.FAIL], "it is still known"


def test_what_has_not_failed_is_not_retried() -> None:
    with pytest.raises(IllegalEvent, match=r"to retry .* rollout-1 is progressing"):
        advance(running(), retry())
    with pytest.raises(IllegalEvent, match="nothing has failed"):
        advance(advance(running(), pause()), retry())


def test_to_ask_again_for_what_waits_after_a_failure_is_to_retry_it() -> None:
    fleet = advance(failed(), ask(at=20))
    assert (of(fleet).id, state_of(fleet)) == ("rollout-2", State.STAGING)


# ---- what is remembered -------------------------------------------------------------------------


def test_the_plan_says_how_much_of_the_past_is_kept() -> None:
    fleet = fleet_of(1)
    for number in range(6):
        fleet = rolled(advance(fleet, ask(f"v{number}@9", history_limit=3)), f"v{number}@9")
    assert [one.id for one in fleet.past] == ["rollout-3", "rollout-4", "rollout-5"]
    assert fleet.history == ("v2@9", "v3@9", "v4@9", "v5@9")
