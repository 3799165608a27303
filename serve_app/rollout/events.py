"""Everything that can happen to a fleet. Each event carries its time: the machine has no clock."""

from __future__ import annotations

from dataclasses import dataclass

from .plan import Plan
from .state import Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A user asked for a rollout; the adapter was packed and is `target`."""

    plan: Plan
    target: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """A replica said what it holds. An unknown replica joins with it."""

    replica: str
    holds: str | None
    staged: str | None
    serving: bool
    failure: Failure | None
    beside: tuple[str, ...] = ()
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """A replica is gone: it said so, or it was silent for too long."""

    replica: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortRequested:
    reason: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequested:
    """A user asked that every replica serves `revision` too, and `instead_of` no longer.

    `expected_generation`: the decision that the user knew of; another one may have come since.
    """

    revision: str
    instead_of: str | None = None
    expected_generation: int | None = None
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadRequested:
    """A user asked that no replica serves `revision` beside its own any more."""

    revision: str
    expected_generation: int | None = None
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticked:
    at: float


Event = Asked | Reported | Left | AbortRequested | LoadRequested | UnloadRequested | Ticked
