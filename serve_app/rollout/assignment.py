"""The next replicas to move, and the size of a dedicated canary.

Used by the machine's `progressing` state. It knows only sets of replica names.
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
    """The replicas to assign to `target` now, in name order; empty while a wave is in progress.

    Args:
        in_service: replicas that serve the revision that they are assigned.
        broken: replicas that serve nothing. They move at once: no capacity is lost, and an
            unhealthy stable revision never blocks the rollout that would fix it.
        ready: replicas that may go to `target`.
        keep_one: at least one replica stays in service, unless the fleet has only one.
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
    """The number of replicas that a dedicated canary of `weight` percent needs.

    Below 100 % at least one replica keeps stable. 0 if the fleet is too small for both.
    """
    if weight >= 100:
        return replicas
    # rounding: 3 * 33.3... % must not become 1.0000001 replicas, which is two
    return min(math.ceil(replicas * weight / 100 - 1e-9), replicas - 1) if replicas > 1 else 0
