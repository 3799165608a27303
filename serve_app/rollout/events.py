"""Everything that can happen to a fleet. Each event carries its time: the machine has no clock."""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.rollout.analysis import Verdict
from serve_app.rollout.plan import Plan
from serve_app.rollout.state import ReplicaState


@dataclass(frozen=True, slots=True, kw_only=True)
class UserRequest:
    """What a user asks for.

    `expected_generation`: the decision that the user knew of; another one may have come since.
    `key`: the user's own name for this request; a second one with the same key does nothing.
    """

    at: float
    expected_generation: int | None = None
    key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked(UserRequest):
    """For a rollout; the adapter was packed and is `target`."""

    plan: Plan
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortRequested(UserRequest):
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PauseRequested(UserRequest):
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeRequested(UserRequest):
    """To go on after a pause that was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromoteRequested(UserRequest):
    """To leave the current step now, whatever is measured; `full`: every step that is left."""

    full: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryRequested(UserRequest):
    """To try again what failed, from the step that it failed in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequested(UserRequest):
    """That every replica serves `revision` too, and `instead_of` no longer."""

    revision: str
    instead_of: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadRequested(UserRequest):
    """That no replica serves `revision` beside its own any more."""

    revision: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """A replica reported its state. With its first report it joins the fleet."""

    replica: str
    state: ReplicaState
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """Several replicas said what they hold: the same as each alone, decided upon once."""

    reports: tuple[Reported, ...]
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """A replica is gone: it said so, or it was silent for too long."""

    replica: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """The canary of `step_id` was looked at, and this came of it."""

    step_id: str
    verdict: Verdict
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticked:
    at: float


Requested = (
    Asked
    | AbortRequested
    | PauseRequested
    | ResumeRequested
    | PromoteRequested
    | RetryRequested
    | LoadRequested
    | UnloadRequested
)
Event = Requested | Reported | Heard | Left | Judged | Ticked
