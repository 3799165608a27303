"""The conditions under which a user's request may change the fleet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self, TypedDict


class PreconditionArgs(TypedDict, total=False):
    """The same as keyword arguments: `def abort(id, **given: Unpack[PreconditionArgs])`."""

    expected_generation: int | None
    key: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Precondition:
    """Optimistic concurrency and idempotency of one request.

    Attributes:
        expected_generation: the fleet's generation as the caller saw it. Another one is refused
            with `GenerationMismatch`. None: any generation.
        key: the caller's own idempotency key. A second request with the same key changes nothing.
    """

    expected_generation: int | None = None
    key: str | None = None

    def scoped(self, request: str) -> Self:
        """The same with a key for this request alone: `promote rollout-3 <key>`."""
        return self if self.key is None else replace(self, key=f"{request} {self.key}")

    def args(self) -> PreconditionArgs:
        """Keyword arguments for a call that crosses a process; those that are None are left out."""
        given: PreconditionArgs = {}
        if self.expected_generation is not None:
            given["expected_generation"] = self.expected_generation
        if self.key is not None:
            given["key"] = self.key
        return given


ALWAYS = Precondition()
"""No condition at all."""
