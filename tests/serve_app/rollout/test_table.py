"""The transition table: complete, closed, obeyed, and the same in the documentation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from serve_app.rollout.errors import IllegalEvent
from serve_app.rollout.events import (
    AnyRolloutRequest,
    Event,
    Judged,
    Left,
    LoadRequested,
    PauseRequested,
    ReportBatch,
    Reported,
    Ticked,
    UnloadRequested,
)
from serve_app.rollout.machine import advance
from serve_app.rollout.state import ENDS, State
from serve_app.rollout.table import TABLE, allows, documentation, handles, table
from serve_app.rollout.walk import to
from tests.serve_app.rollout.fleets import ask, fleet_of

DOCS = Path(__file__).parents[3] / "docs" / "rollouts.md"
# what is loaded has no states; the other two change what `Reported` looks at
WITHOUT_ROWS = {LoadRequested, UnloadRequested, ReportBatch, Left}


def reachable(state: State) -> set[State]:
    found = {state}
    while more := {row.after for row in TABLE if row.before in found} - found:
        found |= more
    return found


def test_every_state_is_reachable_and_an_end_is_a_state_without_a_row() -> None:
    assert reachable(State.PENDING) == set(State)
    assert set(State) - {row.before for row in TABLE} == ENDS


def test_from_every_state_that_is_no_end_a_rollout_can_succeed_or_be_taken_back() -> None:
    for state in set(State) - ENDS - {State.PROMOTING, State.ABORTING}:
        assert reachable(state) >= {State.SUCCEEDED, State.ABORTED}
    assert State.SUCCEEDED not in reachable(State.ABORTING)


def test_every_event_that_changes_a_rollout_has_a_row() -> None:
    assert {row.event for row in TABLE} == set(get_args(Event)) - WITHOUT_ROWS


def test_no_row_stands_in_the_table_twice() -> None:
    rows = [(row.before, row.event, row.after, row.when) for row in TABLE]
    assert len(set(rows)) == len(rows)


def test_a_user_cannot_turn_an_abort_around_nor_change_what_has_ended() -> None:
    requests = set(get_args(AnyRolloutRequest))
    assert {each.__name__ for each in requests if handles(State.ABORTING, each)} == {
        "AbortRequested"
    }
    assert not any(handles(state, each) for state in ENDS for each in requests)


def test_the_machine_refuses_a_transition_that_the_table_lacks() -> None:
    fleet = advance(fleet_of(2), ask())
    assert not allows(State.STAGING, Judged, State.SUCCEEDED)
    with pytest.raises(IllegalEvent, match="staging does not lead to succeeded"):
        to(fleet, State.SUCCEEDED, event=Judged, at=11.0)
    assert allows(State.STAGING, PauseRequested, State.PAUSED)
    assert allows(State.STAGING, Reported, State.PROGRESSING)
    assert not allows(State.STAGING, Ticked, State.PROGRESSING)


def test_the_documentation_has_every_row_of_the_table() -> None:
    for row in TABLE:
        name, before = row.event.__name__, row.before or "none"
        assert f"| {before} | {name} | {row.after} | {row.when} |" in table()


def test_the_documentation_has_what_the_table_says() -> None:
    marks = r"<!-- table: python -m serve_app.rollout.table -->\n(.*)\n<!-- end of table -->"
    found = re.search(marks, DOCS.read_text(), re.DOTALL)
    assert found is not None
    assert found[1] == documentation()
