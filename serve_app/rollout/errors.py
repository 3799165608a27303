"""Requests that the rollout machine refuses. The fleet is unchanged."""

from __future__ import annotations


class RolloutError(Exception):
    """The root of what the rollout machine raises."""

    code = "rollout_error"


class IllegalEvent(RolloutError):
    """The event cannot happen now; nothing has changed."""

    code = "illegal_event"

    def __init__(self, what: str, why: str) -> None:
        super().__init__(what, why)
        self.what, self.why = what, why

    def __str__(self) -> str:
        return f"{self.what} is not possible now: {self.why}"


class GenerationMismatch(RolloutError):
    """Something was decided since the caller looked at the fleet; nothing has changed."""

    code = "generation_mismatch"

    def __init__(self, expected: int, actual: int) -> None:
        super().__init__(expected, actual)
        self.expected, self.actual = expected, actual

    def __str__(self) -> str:
        return f"generation {self.expected} was expected, and the fleet is at {self.actual}"
