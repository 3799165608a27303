"""The transition table of a rollout, and the same as documentation.

Theory of operation. A rollout is in one state. `TABLE` lists each event that may change the state,
and the states that it may lead to; `when` says which one. `serve_app.rollout.walk.to` refuses every
other transition, and a user request without a row for the current state raises `IllegalEvent`.

After each event the machine also looks at the reports that it has and at the clock, so that several
rows may apply one after the other. Such a row stands under the event that carries the fact:
`Reported` for the state of the replicas (`ReportBatch` and `Left` change that state as well),
`Ticked` for the time. `LoadRequested` and `UnloadRequested` change no rollout.

``python -m serve_app.rollout.table`` prints what stands between the marks in docs/rollouts.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from serve_app.rollout.events import (
    AbortRequested,
    Event,
    Judged,
    PauseRequested,
    PromoteRequested,
    Reported,
    ResumeRequested,
    RetryRequested,
    StartRequested,
    Ticked,
)
from serve_app.rollout.state import ENDS, State


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `before` None: the rollout does not exist yet."""

    before: State | None
    event: type[Event]
    after: State
    when: str


_NEWER = "a newer plan takes its place"
_FAILED = "a replica failed"
_LATE = "the deadline has passed"
_NOTHING = "nothing changes"

TABLE: tuple[Row, ...] = (
    Row(None, StartRequested, State.PENDING, "the plan and the adapter were accepted"),
    Row(State.PENDING, StartRequested, State.STAGING, "at once: replicas stage the target"),
    # staging
    Row(State.STAGING, Reported, State.PROGRESSING, "every replica has staged the target"),
    Row(State.STAGING, Reported, State.ABORTING, f"{_FAILED}, with `on_failure: rollback`"),
    Row(State.STAGING, Reported, State.PAUSED, f"{_FAILED}, with `on_failure: pause`"),
    Row(State.STAGING, Ticked, State.ABORTING, f"{_LATE}, with `on_failure: rollback`"),
    Row(State.STAGING, Ticked, State.PAUSED, f"{_LATE}, with `on_failure: pause`"),
    Row(State.STAGING, PromoteRequested, State.STAGING, "`full`: all steps will be skipped"),
    Row(State.STAGING, PauseRequested, State.PAUSED, "always"),
    Row(State.STAGING, ResumeRequested, State.STAGING, _NOTHING),
    Row(State.STAGING, AbortRequested, State.ABORTING, "always"),
    Row(State.STAGING, StartRequested, State.SUPERSEDED, _NEWER),
    # progressing
    Row(State.PROGRESSING, Reported, State.PROMOTING, "every replica serves the target"),
    Row(State.PROGRESSING, Reported, State.PAUSED, "the step is in place, with `hold: manual`"),
    Row(State.PROGRESSING, Reported, State.ABORTING, f"{_FAILED}, with `on_failure: rollback`"),
    Row(State.PROGRESSING, Reported, State.PAUSED, f"{_FAILED}, with `on_failure: pause`"),
    Row(State.PROGRESSING, Ticked, State.PROGRESSING, "the hold is over: next step"),
    Row(State.PROGRESSING, Ticked, State.ABORTING, f"{_LATE}, with `on_failure: rollback`"),
    Row(State.PROGRESSING, Ticked, State.PAUSED, f"{_LATE}, with `on_failure: pause`"),
    Row(State.PROGRESSING, Judged, State.PROGRESSING, "passed and the hold is over: next step"),
    Row(State.PROGRESSING, Judged, State.ABORTING, "failed, with `on_failure: rollback`"),
    Row(State.PROGRESSING, Judged, State.PAUSED, "failed, with `on_failure: pause`"),
    Row(State.PROGRESSING, PromoteRequested, State.PROGRESSING, "next step; `full`: no more steps"),
    Row(State.PROGRESSING, PauseRequested, State.PAUSED, "always"),
    Row(State.PROGRESSING, ResumeRequested, State.PROGRESSING, _NOTHING),
    Row(State.PROGRESSING, AbortRequested, State.ABORTING, "always"),
    Row(State.PROGRESSING, StartRequested, State.SUPERSEDED, _NEWER),
    # paused
    Row(State.PAUSED, ResumeRequested, State.STAGING, "some replicas have not staged yet"),
    Row(State.PAUSED, ResumeRequested, State.PROGRESSING, "all replicas have staged"),
    Row(State.PAUSED, PromoteRequested, State.STAGING, "some replicas have not staged yet"),
    Row(State.PAUSED, PromoteRequested, State.PROGRESSING, "next step; `full`: no more steps"),
    Row(State.PAUSED, RetryRequested, State.STAGING, "it failed before all replicas had staged"),
    Row(State.PAUSED, RetryRequested, State.PROGRESSING, "it failed after that"),
    Row(State.PAUSED, Judged, State.ABORTING, "failed, with `on_failure: rollback`"),
    Row(State.PAUSED, Judged, State.PAUSED, "failed, with `on_failure: pause`"),
    Row(State.PAUSED, PauseRequested, State.PAUSED, _NOTHING),
    Row(State.PAUSED, AbortRequested, State.ABORTING, "always"),
    Row(State.PAUSED, StartRequested, State.SUPERSEDED, _NEWER),
    # promoting and aborting
    Row(State.PROMOTING, Reported, State.SUCCEEDED, "at once: the target is stable"),
    Row(State.ABORTING, Reported, State.ABORTED, "every replica serves stable, and it alone"),
    Row(State.ABORTING, Reported, State.FAILED, "a replica cannot go back to stable"),
    Row(State.ABORTING, AbortRequested, State.ABORTING, _NOTHING),
    Row(State.ABORTING, StartRequested, State.SUPERSEDED, _NEWER),
)
_TRANSITIONS = frozenset((row.before, row.event, row.after) for row in TABLE)
_HANDLED = frozenset((row.before, row.event) for row in TABLE)


def allows(before: State | None, event: type[Event], after: State) -> bool:
    """Returns True if the table has this transition."""
    return (before, event, after) in _TRANSITIONS


def handles(state: State, event: type[Event]) -> bool:
    """Returns True if the event may come in this state."""
    return (state, event) in _HANDLED


# ---- documentation ------------------------------------------------------------------------------


_NOTE = """\
After each event the machine also looks at the reports and at the clock, so that several rows may
apply one after the other. `Reported` stands for everything that changes the state of the replicas,
`Ticked` for the time."""


def documentation() -> str:
    """The part of docs/rollouts.md between the marks."""
    return f"{diagram()}\n\n{_NOTE}\n\n{table()}"


def diagram() -> str:
    """A Mermaid state diagram: one arrow for each pair of states, labelled with its events."""
    return "\n".join(["```mermaid", "stateDiagram-v2", *_edges(), "```"])


def table() -> str:
    """A Markdown table, one line for each row of `TABLE`."""
    head = ["| in | event | leads to | when |", "| --- | --- | --- | --- |"]
    lines = (
        f"| {row.before or 'none'} | {row.event.__name__} | {row.after} | {row.when} |"
        for row in TABLE
    )
    return "\n".join([*head, *lines])


def _edges() -> Iterator[str]:
    labels: dict[tuple[State | None, State], list[str]] = {}
    for row in TABLE:
        events = labels.setdefault((row.before, row.after), [])
        if row.event.__name__ not in events and row.when != _NOTHING:
            events.append(row.event.__name__)
    for (before, after), events in labels.items():
        if events:
            yield f"    {before or '[*]'} --> {after}: {', '.join(events)}"
    for state in State:
        if state in ENDS:
            yield f"    {state} --> [*]"


if __name__ == "__main__":
    print(documentation())
