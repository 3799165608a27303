"""The nouns of a rollout: decisions, observations, progress.

Between plan and machine. One half of a `Fleet` is decisions (stable, loaded, assigned, rollout) and
is journaled. The other half (observed) is the last reports of the replicas, which report again
after a restart. Revisions are opaque strings here. Times are seconds since the epoch.
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
    """The reason for a pause, and so the way out of it."""

    ASKED = "asked"  # a user paused it; resume or promote
    STEP = "step"  # the step has `hold: manual`; promote
    FAILURE = "failure"  # a failure with `on_failure: pause`; retry, promote or abort


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A replica failed to stage or serve `revision` as the document of `generation` asks for."""

    revision: str
    reason: str
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """`weight` percent of the requests that name no revision go to `canary`.

    `shared`: each replica splits its own requests. `dedicated`: the request router splits them.
    `step_id`: the canary step; request statistics belong to it.
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
        if self.failure is None and not self.refused:  # the machine asks this of every replica
            return []
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
    """Of `total` live replicas, the number that has the target staged, and committed."""

    total: int
    staged: int
    committed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One rollout: the plan and its progress. Times are seconds since the epoch.

    Attributes:
        key: the idempotency key that it was started with.
        since: the generation it began or was retried in; earlier failures do not count.
        begun: every replica had staged the target.
        step: index in the plan's steps; behind the last one, the whole fleet moves.
        placed_at: when every replica carried the step, and its hold began.
        attempt: grows with every retry.
        pause: the reason, while paused.
        progress: at its end.
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
    progress: Progress | None = None

    @property
    def ended(self) -> bool:
        return self.state in ENDS

    @property
    def current(self) -> CanaryStep | None:
        """The current step; None: the plan has no steps, or the last one was left."""
        steps = self.plan.steps
        return steps[self.step] if self.step < len(steps) else None

    @property
    def step_id(self) -> str:
        return f"{self.id}.{self.step + 1}.{self.attempt}"

    @property
    def hold_until(self) -> float | None:
        """The end of the current step's hold; None: not known yet, or manual."""
        if self.placed_at is None or self.current is None or self.current.hold == "manual":
            return None
        return self.placed_at + self.current.hold

    @property
    def unclear(self) -> Verdict | None:
        """The inconclusive verdict on the current step, if there is no other."""
        last = self.verdicts[-1] if self.verdicts else None
        if last is None or last.step != self.step or last.outcome is not Outcome.INCONCLUSIVE:
            return None
        return last


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The machine's whole state.

    Attributes:
        stable: the revision that the fleet goes back to.
        epoch: the number of the controller; generation: of the decision.
        loaded: loaded adapters, served by every replica for requests that name them, oldest first.
        assigned: replica → the revision that it shall hold.
        rollout: the running one, or the last one that ran; past: those before it.
        history: stable revisions, newest last.
        rollouts: how many there were.
        keys: idempotency keys of user requests, newest last.
        observed: replica → its last report.
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
        """The policy for running requests when a replica moves: that of the last rollout."""
        asked = None if self.rollout is None else self.rollout.plan.in_flight
        return asked or "drain"  # which every fleet can


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """The whole document for one replica.

    Attributes:
        hold: the revision for requests that name none.
        stage: the revision to stage for a later document.
        also_serves: further revisions to serve.
        in_flight: what happens to running requests when `hold` changes.
        traffic: the traffic split of a canary.
        stable, loaded, rollouts, sources: for a controller that has lost its journal
            (`serve_app.rollout.recovery`); sources are (revision, path or URI) pairs.
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
