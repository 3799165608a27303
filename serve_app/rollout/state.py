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

from serve_app.rollout.analysis import Outcome, Verdict
from serve_app.rollout.plan import CanaryStep, InFlight, Placement, Plan


class State(StrEnum):
    PENDING = "pending"
    STAGING = "staging"
    PROGRESSING = "progressing"
    PAUSED = "paused"
    PROMOTING = "promoting"
    SUCCEEDED = "succeeded"
    ABORTING = "aborting"
    ABORTED = "aborted"
    FAILED = "failed"
    SUPERSEDED = "superseded"


ENDS = frozenset({State.SUCCEEDED, State.ABORTED, State.FAILED, State.SUPERSEDED})


class Pause(StrEnum):
    """What a paused rollout waits for."""

    ASKED = "asked"  # for whoever paused it
    STEP = "step"  # its step is held until somebody promotes it
    FAILURE = "failure"  # something failed, and the plan says to wait rather than go back


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A replica could not do what generation `generation` asked of it for `revision`."""

    revision: str
    reason: str
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """`weight` percent of the requests that name no revision go to `canary`.

    `shared`: each replica sees to it for its own. `dedicated`: whoever routes requests does.
    `step_id`: the step of the rollout that they are for; what is measured belongs to it.
    """

    canary: str
    weight: float
    placement: Placement
    step_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaState:
    """The state of one replica, as the replica reports it.

    Attributes:
        holds: the default revision, for requests that name none. None: no revision yet.
        staged: the revision that is staged for a later commit.
        serving: `holds` is the revision that it was assigned, is verified, and requests are let in.
        failure: the error of the default or of the staged revision.
        also_serves: further revisions, for requests that name them or for a canary's share.
        refused: the errors of revisions that it was to serve besides its default.
        traffic: the traffic split that it applies.
    """

    holds: str | None
    staged: str | None = None
    serving: bool = False
    failure: Failure | None = None
    also_serves: tuple[str, ...] = ()
    refused: tuple[Failure, ...] = ()
    traffic: Traffic | None = None

    @property
    def served(self) -> tuple[str, ...]:
        """Every revision that requests can run on, the default first."""
        return (*(() if self.holds is None else (self.holds,)), *self.also_serves)

    def failures_of(self, revision: str) -> list[Failure]:
        every = (*(() if self.failure is None else (self.failure,)), *self.refused)
        return [failure for failure in every if failure.revision == revision]


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """The last report of a replica.

    Attributes:
        state: None: no report since the controller was restarted; the replica is expected back.
        outdated: it was assigned another revision since the report.
        seen_at: when it reported.
    """

    state: ReplicaState | None = None
    outdated: bool = False
    seen_at: float = 0.0

    def has(self, revision: str) -> bool:
        """Returns True if the revision is served or staged."""
        return self.state is not None and revision in (self.state.staged, *self.state.served)

    def serves(self, revision: str) -> bool:
        """Returns True if it is the default, and no newer assignment may have changed that."""
        state = self.state
        return state is not None and state.serving and state.holds == revision and not self.outdated

    def failures_of(self, revision: str) -> list[Failure]:
        return [] if self.state is None else self.state.failures_of(revision)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Of `total` live replicas, how many have the target beside their weights, and in them."""

    total: int
    staged: int
    committed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One rollout: the plan, and how far it is. Times are seconds since the epoch.

    `begun`: every replica had staged the target. `step`: the index in the plan's steps; behind the
    last one, the whole fleet moves. `placed_at`: when every replica did its part in the step, and
    its hold began. `attempt`: grows with every retry. `pause`: what it waits for while paused.
    `since`: the generation it began in, or was retried in; failures from before do not count.
    """

    id: str
    plan: Plan
    target: str
    previous: str
    state: State = State.PENDING
    reason: str | None = None
    key: str | None = None
    since: int = 0
    begun: bool = False
    step: int = 0
    placed_at: float | None = None
    attempt: int = 1
    pause: Pause | None = None
    verdicts: tuple[Verdict, ...] = ()
    created_at: float = 0.0
    deadline_at: float = 0.0
    ended_at: float | None = None
    progress: Progress | None = None  # how far it was when it ended

    @property
    def ended(self) -> bool:
        return self.state in ENDS

    @property
    def current(self) -> CanaryStep | None:
        """The step that it is in; None: it has no steps, or has left the last one."""
        steps = self.plan.steps
        return steps[self.step] if self.step < len(steps) else None

    @property
    def step_id(self) -> str:
        return f"{self.id}.{self.step + 1}.{self.attempt}"

    @property
    def hold_until(self) -> float | None:
        """When the current step has been held for long enough; None: nobody knows yet."""
        if self.placed_at is None or self.current is None or self.current.hold == "manual":
            return None
        return self.placed_at + self.current.hold

    @property
    def unclear(self) -> Verdict | None:
        """The verdict on the current step that said nothing, if that is all there is."""
        last = self.verdicts[-1] if self.verdicts else None
        if last is None or last.step != self.step or last.outcome is not Outcome.INCONCLUSIVE:
            return None
        return last


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The machine's whole state. `rollout` is the running one, or the last one that ran.

    `loaded`: revisions that every replica serves for requests that name them, oldest first.
    `keys`: of the requests that users gave a key of their own, newest last.
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
    keys: tuple[str, ...] = ()
    observed: Mapping[str, Observed] = field(default_factory=dict)

    @property
    def running(self) -> Rollout | None:
        return None if self.rollout is None or self.rollout.ended else self.rollout

    @property
    def in_flight(self) -> InFlight:
        """How a replica gets to what it shall hold: as the last rollout says, there and back."""
        asked = None if self.rollout is None else self.rollout.plan.in_flight
        return asked or "drain"  # which every fleet can


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """The whole document for one replica.

    `hold`: the revision for requests that name none; `in_flight`: how to get there. `also_serves`: those
    to serve for requests that name them. `stage`: the one to have ready for a later document.
    `traffic`: the share of the requests that a canary gets. `stable`, `loaded`, `rollouts` and
    `sources` (revision, where it came from) are for a controller that has lost its journal
    (`serve_app.rollout.recovery`).
    """

    epoch: int
    generation: int
    hold: str
    stage: str | None = None
    also_serves: tuple[str, ...] = ()
    in_flight: InFlight = "drain"
    traffic: Traffic | None = None
    stable: str = ""
    loaded: tuple[str, ...] = ()
    rollouts: int = 0
    sources: tuple[tuple[str, str], ...] = ()
