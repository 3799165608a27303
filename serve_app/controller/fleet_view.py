"""The admin views of the fleet and its rollouts, from the machine's state and the last reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from hotswap_lib import Revision
from serve_app.controller.canary_stats import CanaryStats
from serve_app.rollout.analysis import Verdict
from serve_app.rollout.canary import traffic
from serve_app.rollout.state import Fleet, ReplicaState, Rollout, State
from serve_app.rollout.walk import progress
from serve_app.wire.admin import (
    CanaryView,
    FleetView,
    MeasurementView,
    ReplicaView,
    RolloutView,
    VerdictView,
)
from serve_app.wire.reports import Report


def rollout_view(
    fleet: Fleet,
    rollout: Rollout,
    *,
    latest: Verdict | None = None,
    stats: CanaryStats | None = None,
) -> RolloutView:
    """The view of one rollout.

    Args:
        latest: the latest verdict on the running rollout, even if nothing followed from it.
        stats: the request statistics of its current canary step.
    """
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
        reason=rollout.reason or None,
        canary=_canary_view(fleet, rollout, latest, stats),
        total=done.total,
        staged=done.staged,
        committed=done.committed,
        created_at=rollout.created_at,
        ended_at=rollout.ended_at,
        converge_ms=None if took_s is None else round(took_s * 1000, 3),
    )


def _canary_view(
    fleet: Fleet, rollout: Rollout, latest: Verdict | None, stats: CanaryStats | None
) -> CanaryView | None:
    plan = rollout.plan
    if plan.strategy != "canary":
        return None
    running = fleet.running is rollout
    now = traffic(fleet) if running else None
    share, requests = stats.share_of(rollout.target) if stats and running else (None, 0)
    return CanaryView(
        placement=plan.placement or "shared",
        step=rollout.step,
        steps=[step.weight for step in plan.steps],
        weight=100.0 if rollout.state is State.SUCCEEDED else 0.0 if now is None else now.weight,
        share=None if share is None else round(share, 2),
        requests=requests,
        pause=rollout.pause,
        hold_until=rollout.hold_until if running else None,
        verdicts=[_verdict_view(verdict) for verdict in rollout.verdicts],
        latest=_verdict_view(latest) if running and latest is not None else None,
    )


def _verdict_view(verdict: Verdict) -> VerdictView:
    return VerdictView(
        step=verdict.step,
        weight=verdict.weight,
        outcome=verdict.outcome,
        at=verdict.at,
        share=verdict.share,
        requests=verdict.requests,
        measurements=[MeasurementView(**asdict(each)) for each in verdict.measurements],
    )


def fleet_view(
    fleet: Fleet,
    reports: Mapping[str, Report],
    *,
    journal_uri: str,
    warnings: list[str],
    at: float,
    latest: Verdict | None = None,
    stats: CanaryStats | None = None,
) -> FleetView:
    """The view of the whole fleet at the time `at`, in seconds since the epoch."""
    return FleetView(
        ready=any(
            (seen.state is not None and seen.state.serving)
            or (name in reports and reports[name].admits)
            for name, seen in fleet.observed.items()
        ),
        epoch=fleet.epoch,
        generation=fleet.generation,
        stable=_short(fleet.stable),
        loaded=[_short(name) for name in fleet.loaded],
        rollout=None
        if fleet.running is None
        else rollout_view(fleet, fleet.running, latest=latest, stats=stats),
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
    if report is None:  # no report since a restart of the controller
        return ReplicaView(
            id=name, revision=None, assigned=assigned, last_seen_s=at - observed.seen_at
        )
    state = report.state
    return ReplicaView(
        id=name,
        revision=None if state.holds is None else _short(state.holds),
        serves=[_short(revision) for revision in state.served],
        lanes=list(report.lanes),
        assigned=assigned,
        staged=None if state.staged is None else _short(state.staged),
        serving=state.serving,
        running=report.running,
        recompiles=report.recompiles,
        limit_hits=report.limit_hits,
        failure=_failure(state),
        last_swap=report.last_swap,
        start=report.start,
        last_seen_s=round(at - observed.seen_at, 3),
        pid=report.pid,
        node=report.node,
    )


def _failure(state: ReplicaState) -> str | None:
    reasons = [] if state.failure is None else [state.failure.reason]
    reasons += [f"{_short(one.revision)}: {one.reason}" for one in state.refused]
    return "; ".join(reasons) or None


def _short(name: str) -> str:
    return str(Revision.parse(name))
