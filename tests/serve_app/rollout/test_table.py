"""The transition table: complete, and the same in the documentation."""

from __future__ import annotations

import re
from pathlib import Path

from serve_app.rollout.state import TABLE, TRANSITIONS, State
from serve_app.rollout.table import diagram, table

DOCS = Path(__file__).parents[3] / "docs" / "rollouts.md"
ENDS = {State.SUCCEEDED, State.ABORTED, State.FAILED, State.SUPERSEDED}


def reachable(state: State) -> set[State]:
    found = {state}
    while more := {after for one in found for after in TRANSITIONS[one]} - found:
        found |= more
    return found


def test_every_state_is_reachable_and_four_of_them_are_ends() -> None:
    assert reachable(State.PENDING) == set(State)
    assert {state for state, after in TRANSITIONS.items() if not after} == ENDS


def test_from_every_state_that_is_no_end_a_rollout_can_succeed_or_be_taken_back() -> None:
    for state in set(State) - ENDS - {State.PROMOTING, State.ABORTING}:
        assert reachable(state) >= {State.SUCCEEDED, State.ABORTED}
    assert State.SUCCEEDED not in reachable(State.ABORTING)


def test_no_step_stands_in_the_table_twice() -> None:
    steps = [(row.before, row.after) for row in TABLE]
    assert len(set(steps)) == len(steps)


def test_the_diagram_and_the_table_have_a_line_for_every_step() -> None:
    assert diagram().count("-->") == len(TABLE) + 1 + len(ENDS)
    for row in TABLE:
        assert f"{row.before} --> {row.after}\n" in diagram()
        assert f"| {row.before} | {row.after} | {row.when} |" in table()


def test_the_documentation_has_what_the_table_says() -> None:
    marks = r"<!-- table: python -m serve_app.rollout.table -->\n(.*)\n<!-- end of table -->"
    found = re.search(marks, DOCS.read_text(), re.DOTALL)
    assert found is not None
    assert found[1] == f"{diagram()}\n\n{table()}"
