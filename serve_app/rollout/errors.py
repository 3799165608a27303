"""Errors of the rollout machine: a request is refused, and the fleet is unchanged."""

from __future__ import annotations


class RolloutError(Exception):
    """The root of the errors that the rollout machine raises."""

    code = "rollout_error"


class IllegalEvent(RolloutError):
    """The event is not possible in the current state; nothing has changed."""

    code = "illegal_event"

    def __init__(self, what: str, why: str) -> None:
        super().__init__(what, why)
        self.what, self.why = what, why

    def __str__(self) -> str:
        return f"{self.what} is not possible now: {self.why}"


class GenerationMismatch(RolloutError):
    """The fleet is at another generation than the caller expected; nothing has changed."""

    code = "generation_mismatch"

    def __init__(self, expected: int, actual: int) -> None:
        super().__init__(expected, actual)
        self.expected, self.actual = expected, actual

    def __str__(self) -> str:
        return f"generation {self.expected} was expected, and the fleet is at {self.actual}"
