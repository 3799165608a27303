"""Every event of a fleet. Each one carries its time, because the machine has no clock.

A user request is refused with `IllegalEvent` when it is not possible now. The other events are
facts: those that come too late change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.rollout.analysis import Verdict
from serve_app.rollout.plan import Plan
from serve_app.rollout.precondition import ALWAYS, Precondition
from serve_app.rollout.state import ReplicaState


@dataclass(frozen=True, slots=True, kw_only=True)
class UserRequest:
    """A request by a user; it changes the fleet only if the precondition holds."""

    at: float
    precondition: Precondition = ALWAYS


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRequested(UserRequest):
    """Start a rollout to the revision `target`, whose adapter is packed already."""

    plan: Plan
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest(UserRequest):
    """A request about the running rollout `id`. It is refused when that one has ended."""

    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortRequested(RolloutRequest):
    """Send every replica back to stable."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PauseRequested(RolloutRequest):
    """Stay in the current step, and send no further replica to the target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeRequested(RolloutRequest):
    """Continue after a `PauseRequested`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromoteRequested(RolloutRequest):
    """Leave the current step now, whatever its analysis says; `full`: leave all steps."""

    full: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryRequested(RolloutRequest):
    """Repeat the step that failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequested(UserRequest):
    """Every replica serves the adapter `revision` too, and `instead_of` no longer."""

    revision: str
    instead_of: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadRequested(UserRequest):
    """No replica serves the loaded adapter `revision` any longer."""

    revision: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """A replica reported its state. With its first report it joins the fleet."""

    replica: str
    state: ReplicaState
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportBatch:
    """Several reports, oldest first. One decision for all of them, the same as one by one."""

    reports: tuple[Reported, ...]
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """A replica is gone: it said so, or it did not report for too long."""

    replica: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """The analysis of the canary step `step_id` reached a verdict."""

    step_id: str
    verdict: Verdict
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticked:
    """Time has passed."""

    at: float


AnyRolloutRequest = (
    AbortRequested | PauseRequested | ResumeRequested | PromoteRequested | RetryRequested
)
AnyUserRequest = StartRequested | AnyRolloutRequest | LoadRequested | UnloadRequested
Event = AnyUserRequest | Reported | ReportBatch | Left | Judged | Ticked
