"""The steps of a canary: the replicas that carry its share, the hold, and the verdicts.

Used by the machine before the waves that move the whole fleet. `shared`: every replica holds stable
and also serves the target. `dedicated`: some replicas hold the target alone.
"""

from __future__ import annotations

from dataclasses import replace

from serve_app.rollout.analysis import Outcome, Verdict
from serve_app.rollout.assignment import canaries
from serve_app.rollout.events import Judged, Reported, Ticked
from serve_app.rollout.plan import Placement
from serve_app.rollout.state import Fleet, Pause, Rollout, State, Traffic
from serve_app.rollout.table import handles
from serve_app.rollout.walk import fail, next_step, to
from serve_app.rollout.waves import broken, having, idle, in_service, send

_VERDICTS = 200  # of one rollout: the journal is written whole at every decision


def traffic(fleet: Fleet) -> Traffic | None:
    """The traffic split now; None without a canary. The weight is 0 while it is aborting."""
    rollout = fleet.running
    if rollout is None or not rollout.begun or rollout.plan.strategy != "canary":
        return None
    return Traffic(
        canary=rollout.target,
        weight=_weight(fleet, rollout),
        placement=_placement(rollout),
        step_id=rollout.step_id,
    )


def hold_step(fleet: Fleet, rollout: Rollout, *, at: float) -> Fleet:
    """Brings the step in place, then holds it. A verdict may end it earlier (`judge`)."""
    fleet = place(fleet, rollout)
    step = rollout.current
    assert step is not None
    if not _placed(fleet, rollout):  # again, if a replica that carried it has left
        return fleet
    if rollout.placed_at is None:
        deadline_at = at + step.hold_s + rollout.plan.progress_deadline
        return replace(fleet, rollout=replace(rollout, placed_at=at, deadline_at=deadline_at))
    if step.hold == "manual":
        why = f"step {rollout.step + 1} of {len(rollout.plan.steps)} waits to be promoted"
        return to(fleet, State.PAUSED, event=Reported, at=at, reason=why, pause=Pause.STEP)
    if rollout.plan.analysis is None and at >= rollout.placed_at + step.hold:
        return to(next_step(fleet, at=at), State.PROGRESSING, event=Ticked, at=at)
    return fleet


def place(fleet: Fleet, rollout: Rollout) -> Fleet:
    """The next wave of a dedicated canary, or back to stable."""
    # first: a superseded rollout's target is neither the canary nor proven
    if misplaced := _misplaced(fleet, rollout):
        return send(fleet, rollout, fleet.stable, ready=misplaced, free=idle(fleet))
    missing = _canaries(fleet, rollout) - len(_on_target(fleet, rollout))
    if missing <= 0 or rollout.pause is Pause.FAILURE:  # after a failure, no further replica
        return fleet
    ready = having(fleet, rollout.target)
    return send(fleet, rollout, rollout.target, ready=ready, free=broken(fleet), most=missing)


def judge(fleet: Fleet, event: Judged) -> Fleet:
    """Applies a verdict: a failure at once, a pass once the hold is over."""
    rollout = fleet.running
    if rollout is None or rollout.current is None or rollout.step_id != event.step_id:
        return fleet  # the verdict is about a step that was left meanwhile
    if not handles(rollout.state, Judged):
        return fleet
    verdict = event.verdict
    if rollout.pause is Pause.FAILURE:
        return fleet  # it waits for a user
    if verdict.outcome is Outcome.FAIL:
        why = f"step {rollout.step + 1} failed its analysis: {verdict.why}"
        judged = _with_verdict(fleet, rollout, verdict)
        return fail(judged, rollout, why, event=Judged, at=event.at)
    if verdict.outcome is Outcome.INCONCLUSIVE:
        known = rollout.unclear is not None  # stored already
        return fleet if known else _with_verdict(fleet, rollout, verdict)
    held = rollout.hold_until is not None and event.at >= rollout.hold_until
    if held and rollout.state is State.PROGRESSING and _placed(fleet, rollout):
        left = next_step(_with_verdict(fleet, rollout, verdict), at=event.at)
        return to(left, State.PROGRESSING, event=Judged, at=event.at)
    return fleet


def _with_verdict(fleet: Fleet, rollout: Rollout, verdict: Verdict) -> Fleet:
    # replaces an inconclusive verdict on the same step
    earlier = rollout.verdicts if rollout.unclear is None else rollout.verdicts[:-1]
    return replace(fleet, rollout=replace(rollout, verdicts=(*earlier, verdict)[-_VERDICTS:]))


def _placed(fleet: Fleet, rollout: Rollout) -> bool:
    """Returns True if the replicas carry the step as its weight and placement ask for."""
    if _misplaced(fleet, rollout):
        return False
    if _placement(rollout) == "dedicated":
        wanted = _canaries(fleet, rollout)
        return 0 < wanted <= sum(in_service(fleet, r) for r in _on_target(fleet, rollout))
    now, failed = traffic(fleet), broken(fleet)
    # a replica whose stable revision is broken does not block the step
    return bool(fleet.observed) and all(
        seen.state is not None
        and seen.state.traffic == now
        and rollout.target in seen.state.served
        and (r in failed or in_service(fleet, r))
        for r, seen in fleet.observed.items()
    )


def _misplaced(fleet: Fleet, rollout: Rollout) -> set[str]:
    """Replicas that have to go back to stable: superseded, or more than the step needs."""
    serving_first = sorted(_on_target(fleet, rollout), key=lambda r: (not in_service(fleet, r), r))
    needed = serving_first[: _canaries(fleet, rollout)]
    return {r for r, what in fleet.assigned.items() if what != fleet.stable} - {*needed}


def _on_target(fleet: Fleet, rollout: Rollout) -> set[str]:
    return {r for r, revision in fleet.assigned.items() if revision == rollout.target}


def _canaries(fleet: Fleet, rollout: Rollout) -> int:
    """The number of replicas that hold the target alone in this step."""
    if _placement(rollout) == "shared":
        return 0
    return canaries(len(fleet.observed), weight=_step_weight(rollout))


def _weight(fleet: Fleet, rollout: Rollout) -> float:
    if rollout.state is State.ABORTING:
        return 0.0
    if _placement(rollout) == "shared":
        return _step_weight(rollout)
    # a replica without a report since a restart most likely does what it did before
    live = {r for r, seen in fleet.observed.items() if in_service(fleet, r) or not seen.state}
    present = len(live & _on_target(fleet, rollout))
    if 0 < _canaries(fleet, rollout) <= present:
        return _step_weight(rollout)
    # until all of its replicas serve, no more than the present ones can carry
    return min(_step_weight(rollout), round(100 * present / len(live), 3)) if live else 0.0


def _step_weight(rollout: Rollout) -> float:
    return 100.0 if rollout.current is None else rollout.current.weight


def _placement(rollout: Rollout) -> Placement:
    return rollout.plan.placement or "shared"
