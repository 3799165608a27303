"""The nouns of a rollout: what is intended, what was observed, how far it is.

Between plan and machine. Half of a `Fleet` is intent (stable, loaded, assigned, rollout) and is
journaled; the other half (observed) is what replicas said last, and is asked for again after a
restart.
Revisions are opaque strings here. Times are seconds since the epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from .plan import InFlight, Plan


class State(StrEnum):
    PENDING = "pending"
    STAGING = "staging"
    PROGRESSING = "progressing"
    PROMOTING = "promoting"
    SUCCEEDED = "succeeded"
    ABORTING = "aborting"
    ABORTED = "aborted"
    FAILED = "failed"
    SUPERSEDED = "superseded"


_TO_END = frozenset({State.ABORTING, State.SUPERSEDED})

TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.PENDING: frozenset({State.STAGING}) | _TO_END,
    State.STAGING: frozenset({State.PROGRESSING}) | _TO_END,
    State.PROGRESSING: frozenset({State.PROMOTING}) | _TO_END,
    State.PROMOTING: frozenset({State.SUCCEEDED}),
    State.ABORTING: frozenset({State.ABORTED, State.FAILED, State.SUPERSEDED}),
    State.SUCCEEDED: frozenset(),
    State.ABORTED: frozenset(),
    State.FAILED: frozenset(),
    State.SUPERSEDED: frozenset(),
}


class IllegalEvent(Exception):
    """The event cannot happen now; nothing has changed."""

    code = "illegal_event"

    def __init__(self, what: str, why: str) -> None:
        super().__init__(what, why)
        self.what, self.why = what, why

    def __str__(self) -> str:
        return f"{self.what} is not possible now: {self.why}"


class GenerationMismatch(Exception):
    """Something was decided since the caller looked at the fleet; nothing has changed."""

    code = "generation_mismatch"

    def __init__(self, expected: int, actual: int) -> None:
        super().__init__(expected, actual)
        self.expected, self.actual = expected, actual

    def __str__(self) -> str:
        return f"generation {self.expected} was expected, and the fleet is at {self.actual}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A replica could not do what generation `generation` asked of it for `revision`."""

    revision: str
    reason: str
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What a replica said last. `serving`: its revision is committed, verified, and it admits.

    `beside`: what it answers with, too, when a request names it. `outdated`: it was sent to another
    revision after it said that, and may be anywhere by now.
    """

    holds: str | None = None
    staged: str | None = None
    serving: bool = False
    failure: Failure | None = None
    beside: tuple[str, ...] = ()
    outdated: bool = False
    seen_at: float = 0.0

    def has(self, revision: str) -> bool:
        return revision in (self.holds, self.staged)

    def serves(self, revision: str) -> bool:
        return self.serving and self.holds == revision and not self.outdated


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Of `total` live replicas, how many have the target beside their weights, and in them."""

    total: int
    staged: int
    committed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One rollout: the plan, and how far it is. Times are seconds since the epoch."""

    id: str
    plan: Plan
    target: str
    previous: str
    state: State = State.PENDING
    reason: str | None = None
    since: int = 0  # the generation it began in; failures from before it do not count
    created_at: float = 0.0
    deadline_at: float = 0.0
    ended_at: float | None = None
    progress: Progress | None = None  # how far it was when it ended

    @property
    def ended(self) -> bool:
        return not TRANSITIONS[self.state]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The machine's whole state. `rollout` is the running one, or the last one that ran.

    `loaded`: revisions that every replica serves for requests that name them, oldest first.
    """

    stable: str
    epoch: int = 1
    generation: int = 1
    loaded: tuple[str, ...] = ()
    assigned: Mapping[str, str] = field(default_factory=dict)
    rollout: Rollout | None = None
    past: tuple[Rollout, ...] = ()
    history: tuple[str, ...] = ()
    rollouts: int = 0
    observed: Mapping[str, Observed] = field(default_factory=dict)

    @property
    def running(self) -> Rollout | None:
        return None if self.rollout is None or self.rollout.ended else self.rollout

    @property
    def in_flight(self) -> InFlight:
        """How a replica gets to what it shall hold: as the last rollout says, there and back."""
        asked = None if self.rollout is None else self.rollout.plan.in_flight
        return asked or "drain"  # which every fleet can

    def decision(self) -> object:
        """Everything that a replica could see; when it changes, the generation grows."""
        staging = self.running.target if self.running else None
        how_far = self.rollout and self.rollout.state
        return self.stable, self.loaded, self.assigned, self.in_flight, staging, how_far


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """The whole document for one replica.

    `hold`: the revision for requests that name none; `in_flight`: how to get there. `beside`: those
    to serve for requests that name them. `stage`: the one to have ready for a later document.
    """

    epoch: int
    generation: int
    hold: str
    stage: str | None = None
    beside: tuple[str, ...] = ()
    in_flight: InFlight = "drain"
