"""What the controller says no to, before anything has changed.

Exception
├── FleetNotReady     no replica is there yet
├── PlanImpossible    this fleet cannot do what the plan says
├── NoSuchRollout     nobody knows a rollout of that name
├── NothingToUndo     there is nothing earlier, or not that
└── KeyReused         the idempotency key belongs to another request
"""

from __future__ import annotations


class NoSuchRollout(Exception):
    code = "rollout_not_found"

    def __init__(self, id: str) -> None:
        super().__init__(id)
        self.id = id

    def __str__(self) -> str:
        return f"there is no rollout {self.id!r}"


class NothingToUndo(Exception):
    """`to`: the revision that was asked for; None: whichever was before."""

    code = "nothing_to_undo"

    def __init__(self, to: str | None = None) -> None:
        super().__init__(to)
        self.to = to

    def __str__(self) -> str:
        which = "earlier revision" if self.to is None else f"earlier revision {self.to!r}"
        return f"there is no {which} to go back to"


class KeyReused(Exception):
    """The idempotency key belongs to another request; nothing has changed."""

    code = "idempotency_key_reused"

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return f"the idempotency key {self.key!r} was used for another request"


class FleetNotReady(Exception):
    code = "fleet_not_ready"

    def __str__(self) -> str:
        return "no replica has reported yet, so no adapter can be checked against the fleet"


class PlanImpossible(Exception):
    """This fleet cannot do what the plan says; nothing has changed."""

    code = "plan_impossible"

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return f"the plan is impossible here: {self.why}"
