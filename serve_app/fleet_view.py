"""From the machine's state and the last reports to what the admin surface shows."""

from __future__ import annotations

from collections.abc import Mapping

from .messages import Report, from_key
from .rollout.machine import progress
from .rollout.state import Fleet, Rollout
from .views import FleetView, ReplicaView, RolloutView


def rollout_view(fleet: Fleet, rollout: Rollout) -> RolloutView:
    done = progress(fleet, rollout)
    took_s = None if rollout.ended_at is None else rollout.ended_at - rollout.created_at
    return RolloutView(
        id=rollout.id,
        target=_short(rollout.target),
        previous=_short(rollout.previous),
        source=rollout.plan.adapter,
        strategy=rollout.plan.strategy,
        max_unavailable=rollout.plan.max_unavailable,
        in_flight=rollout.plan.in_flight,
        state=rollout.state,
        reason=rollout.reason,
        total=done.total,
        staged=done.staged,
        committed=done.committed,
        created_at=rollout.created_at,
        ended_at=rollout.ended_at,
        converge_ms=None if took_s is None else round(took_s * 1000, 3),
    )


def fleet_view(
    fleet: Fleet,
    reports: Mapping[str, Report],
    *,
    journal_uri: str,
    warnings: list[str],
    at: float,
) -> FleetView:
    return FleetView(
        ready=any(
            observed.serving or (name in reports and reports[name].admits)
            for name, observed in fleet.observed.items()
        ),
        epoch=fleet.epoch,
        generation=fleet.generation,
        stable=_short(fleet.stable),
        loaded=[_short(name) for name in fleet.loaded],
        rollout=None if fleet.running is None else rollout_view(fleet, fleet.running),
        replicas=[
            _replica_view(fleet, name, reports.get(name), at=at) for name in sorted(fleet.observed)
        ],
        history=[_short(name) for name in fleet.history],
        journal_uri=journal_uri,
        warnings=warnings,
    )


def _replica_view(fleet: Fleet, name: str, report: Report | None, *, at: float) -> ReplicaView:
    observed = fleet.observed[name]
    assigned = _short(fleet.assigned.get(name, fleet.stable))
    if report is None:  # expected back after a restart of the controller, not heard of yet
        return ReplicaView(
            id=name, revision=None, assigned=assigned, last_seen_s=at - observed.seen_at
        )
    return ReplicaView(
        id=name,
        revision=str(report.holds),
        serves=[str(revision) for revision in report.serves],
        lanes=list(report.lanes),
        assigned=assigned,
        staged=None if report.staged is None else str(report.staged),
        serving=report.serving,
        running=report.running,
        recompiles=report.recompiles,
        limit_hits=report.limit_hits,
        failure=_failure(report),
        last_swap=report.last_swap,
        start=report.start,
        last_seen_s=round(at - observed.seen_at, 3),
        pid=report.pid,
        node=report.node,
    )


def _failure(report: Report) -> str | None:
    reasons = [] if report.failure is None else [report.failure.reason]
    reasons += [f"{_short(one.revision)}: {one.reason}" for one in report.refused]
    return "; ".join(reasons) or None


def _short(name: str) -> str:
    return str(from_key(name))
