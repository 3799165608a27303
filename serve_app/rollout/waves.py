"""Sets of replicas by what they serve, and the next wave to another revision.

Between the machine and `assignment`, which knows only sets of names.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import replace

from serve_app.rollout.assignment import next_wave
from serve_app.rollout.state import Fleet, Rollout


def send(
    fleet: Fleet,
    rollout: Rollout,
    revision: str,
    *,
    ready: AbstractSet[str],
    free: AbstractSet[str],
    most: int | None = None,
) -> Fleet:
    """Assigns the next wave to `revision`; for `all_at_once` all replicas that are ready.

    Args:
        ready: replicas that may go there.
        free: replicas that serve nothing, so that moving them costs no capacity.
        most: at most this many.
    """
    everywhere = rollout.plan.strategy == "all_at_once"
    wave = next_wave(
        target=revision,
        assigned=fleet.assigned,
        in_service={r for r in fleet.observed if in_service(fleet, r)},
        broken=free,
        ready=ready,
        max_unavailable=len(fleet.observed) if everywhere else rollout.plan.max_unavailable,
        keep_one=not everywhere,
    )[:most]
    sent = {r: replace(fleet.observed[r], outdated=True) for r in wave}
    return replace(
        fleet,
        assigned={**fleet.assigned, **dict.fromkeys(wave, revision)},
        observed={**fleet.observed, **sent},
    )


def all_to_stable(fleet: Fleet) -> Fleet:
    return replace(fleet, assigned=dict.fromkeys(fleet.assigned, fleet.stable))


def all_serve(fleet: Fleet, revision: str) -> bool:
    # assigned too: a replica that was just sent elsewhere may still report the revision
    return all(fleet.assigned[r] == revision and in_service(fleet, r) for r in fleet.observed)


def in_service(fleet: Fleet, replica: str) -> bool:
    return fleet.observed[replica].serves(fleet.assigned[replica])


def idle(fleet: Fleet) -> set[str]:
    """Replicas known not to serve; moving them costs no capacity."""
    return {r for r, seen in fleet.observed.items() if seen.state and not in_service(fleet, r)}


def broken(fleet: Fleet) -> set[str]:
    """Replicas that failed to hold the revision that they are assigned."""
    return {
        r
        for r, seen in fleet.observed.items()
        if seen.state is not None
        and seen.state.failure is not None
        and seen.state.failure.revision == fleet.assigned[r]
    }


def having(fleet: Fleet, revision: str) -> set[str]:
    """Replicas that serve or have staged the revision."""
    return {r for r, seen in fleet.observed.items() if seen.has(revision)}
