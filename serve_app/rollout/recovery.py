"""The fleet of a controller that starts again: from its journal, or from the replicas alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from serve_app.rollout.events import StartRequested
from serve_app.rollout.plan import Plan
from serve_app.rollout.state import Desired, Fleet, Observed, Rollout, State
from serve_app.rollout.walk import to


def restored(fleet: Fleet, *, at: float) -> Fleet:
    """From the journal: a new epoch, the decisions as written, nothing observed yet.

    Every replica with an assignment is expected back and counts as out of service until it reports.
    So no wave starts and no rollout ends before the replicas have reported.
    """
    expected = {replica: Observed(seen_at=at) for replica in fleet.assigned}
    return replace(fleet, epoch=fleet.epoch + 1, observed=expected)


def redeclared(before: Fleet, declared: Fleet, *, at: float) -> Fleet:
    """A deploy declared another adapter: it is stable now, and a running rollout ends.

    Loaded adapters, past rollouts and idempotency keys stay.
    """
    if before.running is not None:
        reason = "a deploy declared another adapter"
        before = to(before, State.SUPERSEDED, event=StartRequested, at=at, reason=reason)
    last = () if before.rollout is None else (before.rollout,)
    return replace(
        declared,
        loaded=before.loaded,
        rollouts=before.rollouts,
        past=(*before.past, *last),
        keys=before.keys,
    )


def rebuilt(documents: Mapping[str, Desired], *, at: float) -> Fleet:
    """From the documents that replicas act on, when the journal is lost; the newest one counts.

    A rollout that was running is aborted: its plan is lost, but the stable revision is known.
    """
    newest = max(documents.values(), key=lambda doc: (doc.epoch, doc.generation))
    fleet = Fleet(
        stable=newest.stable,
        epoch=newest.epoch + 1,
        generation=newest.generation + 1,
        loaded=newest.loaded,
        assigned={replica: doc.hold for replica, doc in documents.items()},
        history=(newest.stable,),
        rollouts=newest.rollouts,
        observed={replica: Observed(seen_at=at) for replica in documents},
    )
    others = sorted({doc.hold for doc in documents.values()} - {newest.stable})
    canary = newest.stage or (newest.traffic.canary if newest.traffic else None)
    running = canary or (others[0] if others else None)
    if running is None:
        return fleet
    rollout = Rollout(
        id=f"rollout-{newest.rollouts}",
        plan=Plan(adapter=running, in_flight=newest.in_flight),
        target=running,
        previous=newest.stable,
        state=State.ABORTING,
        reason="the journal was lost while it was under way",
        since=newest.generation,
        created_at=at,
    )
    return replace(fleet, rollout=rollout)
