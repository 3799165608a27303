"""Which replicas move next, and how many a dedicated canary needs.

Used by the machine's `progressing` state. It looks at sets of replica names and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet


def next_wave(
    *,
    target: str,
    assigned: Mapping[str, str],
    in_service: AbstractSet[str],
    broken: AbstractSet[str],
    ready: AbstractSet[str],
    max_unavailable: int,
    keep_one: bool,
) -> list[str]:
    """The replicas to assign to `target` now, in name order; empty while a wave is under way.

    `in_service`: replicas that serve what they are assigned. `broken`: replicas that serve nothing
    as they are; moving them costs nothing, and so an unhealthy stable revision never blocks the
    rollout that would fix it. `ready`: those that may go to `target`.
    With `keep_one` at least one replica stays in service, unless the fleet is only one.
    """
    waiting = sorted(r for r in ready if assigned.get(r) != target)
    free = [r for r in waiting if r in broken]
    down = len(assigned) - len(in_service)
    budget = max_unavailable - down
    if keep_one and len(assigned) > 1:
        budget = min(budget, len(in_service) - 1)
    movable = [r for r in waiting if r in in_service]
    return free + movable[: max(budget, 0)]


def canaries(replicas: int, *, weight: float) -> int:
    """How many of the replicas carry `weight` percent; below 100 at least one stays with stable.

    0 when there are too few for both.
    """
    if weight >= 100:
        return replicas
    # a hair less than the product: 3 * 100 / 3 % are three replicas, whatever floats make of it
    return min(math.ceil(replicas * weight / 100 - 1e-9), replicas - 1) if replicas > 1 else 0
