"""What the admin surface shows of the machine's state."""

from __future__ import annotations

from dataclasses import replace

from hotswap_lib import Revision
from serve_app.controller.canary_stats import CanaryStats
from serve_app.controller.fleet_view import fleet_view, rollout_view
from serve_app.rollout.analysis import Measurement, Outcome, Verdict
from serve_app.rollout.plan import CanaryStep, Plan
from serve_app.rollout.state import (
    Failure,
    Fleet,
    Observed,
    Pause,
    Progress,
    ReplicaState,
    Rollout,
    State,
)
from serve_app.wire.admin import FleetView, LaneView, StartView, SwapView
from serve_app.wire.reports import Report

OLD, NEW = Revision("old", "1" * 64), Revision("new", "2" * 64)
RUNNING = Rollout(
    id="rollout-1",
    plan=Plan(adapter="/adapters/new", max_unavailable=2),
    target=NEW.key,
    previous=OLD.key,
    state=State.PROGRESSING,
    created_at=100.0,
)
FLEET = Fleet(
    stable=OLD.key,
    epoch=2,
    generation=9,
    assigned={"r1": NEW.key, "r2": OLD.key},
    rollout=RUNNING,
    history=(OLD.key,),
    observed={
        "r2": Observed(
            state=ReplicaState(holds=OLD.key, staged=NEW.key, serving=True), seen_at=99.0
        ),
        "r1": Observed(state=ReplicaState(holds=NEW.key, serving=True), seen_at=98.5),
    },
)
TENANT = Revision("tenant", "3" * 64)
LANES = (LaneView(revision=str(NEW), running=2), LaneView(revision=str(TENANT), running=1))
START = StartView(load_s=3.0, warm_up_s=9.0, compiled_regions=4, compile_cache="hit")
SWAP = SwapView(revision=str(NEW), commit_us=42.0, copies=1, image_bytes=1024)


def report(replica: str, *, admits: bool = True) -> Report:
    return Report(
        replica=replica,
        layout="f" * 64,
        acting_on=None,
        state=ReplicaState(
            holds=NEW.key,
            staged=OLD.key,
            serving=True,
            failure=Failure(revision=NEW.key, reason="no luck", generation=9),
            also_serves=(TENANT.key,),
            refused=(Failure(revision=OLD.key, reason="no memory", generation=9),),
        ),
        running=3,
        recompiles=1,
        limit_hits=2,
        last_swap=SWAP,
        pid=77,
        node="node-1",
        admits=admits,
        lanes=LANES,
        start=START,
    )


def view(fleet: Fleet = FLEET, reports: dict[str, Report] | None = None) -> FleetView:
    return fleet_view(fleet, reports or {}, journal_uri="/j", warnings=["careful"], at=100.0)


def test_a_running_rollout_is_shown_with_how_far_it_is_and_without_an_end() -> None:
    shown = rollout_view(FLEET, RUNNING)
    assert (shown.target, shown.previous, shown.source) == (str(NEW), str(OLD), "/adapters/new")
    assert (shown.total, shown.staged, shown.committed) == (2, 2, 1)
    assert (shown.state, shown.strategy, shown.max_unavailable) == ("progressing", "rolling", 2)
    assert (shown.ended, shown.converge_ms) == (False, None)


def test_a_rollout_that_ended_shows_what_it_reached_then_and_how_long_it_took() -> None:
    ended = Rollout(
        id="rollout-0",
        plan=Plan(adapter="a"),
        target=NEW.key,
        previous=OLD.key,
        state=State.ABORTED,
        reason="no luck",
        created_at=100.0,
        ended_at=101.2345,
        progress=Progress(total=4, staged=3, committed=2),
    )
    shown = rollout_view(FLEET, ended)
    assert (shown.total, shown.staged, shown.committed) == (4, 3, 2)
    assert (shown.reason, shown.converge_ms) == ("no luck", 1234.5)


def test_the_fleet_shows_short_revisions_and_replicas_in_name_order() -> None:
    shown = view()
    assert (shown.stable, shown.history, shown.epoch, shown.generation) == (
        "old@11111111",
        ["old@11111111"],
        2,
        9,
    )
    assert [(r.id, r.assigned) for r in shown.replicas] == [("r1", str(NEW)), ("r2", str(OLD))]
    assert (shown.journal_uri, shown.warnings) == ("/j", ["careful"])


def test_a_replica_without_a_report_since_a_restart_shows_nothing_but_its_assignment() -> None:
    shown = view().replicas[0]
    assert (shown.revision, shown.serving, shown.pid) == (None, False, None)
    assert shown.last_seen_s == 1.5


def test_a_replica_shows_what_its_last_report_said() -> None:
    shown = view(reports={"r1": report("r1")}).replicas[0]
    assert (shown.revision, shown.staged, shown.serving) == (str(NEW), str(OLD), True)
    assert (shown.running, shown.recompiles, shown.limit_hits) == (3, 1, 2)
    assert shown.failure == f"no luck; {OLD}: no memory"
    assert (shown.last_swap, shown.start) == (SWAP, START)
    assert (shown.serves, shown.lanes) == ([str(NEW), str(TENANT)], list(LANES))
    assert (shown.pid, shown.node) == (77, "node-1")


def test_a_rollout_that_ended_is_no_longer_the_fleets() -> None:
    ended = Fleet(
        stable=NEW.key,
        rollout=Rollout(
            id="rollout-1",
            plan=Plan(adapter="a"),
            target=NEW.key,
            previous=OLD.key,
            state=State.SUCCEEDED,
            ended_at=1.0,
            progress=Progress(total=1, staged=1, committed=1),
        ),
    )
    assert view(ended).rollout is None


def test_a_fleet_in_which_no_replica_serves_is_not_ready() -> None:
    assert view().ready
    assert not view(Fleet(stable=OLD.key)).ready
    moving = Fleet(stable=OLD.key, observed={"r1": Observed()})
    assert not view(moving).ready
    assert not view(moving, {"r1": report("r1", admits=False)}).ready
    assert view(moving, {"r1": report("r1")}).ready, "it lets requests in on what it held before"


def test_the_fleet_shows_what_is_loaded_and_a_rollout_its_policy() -> None:
    assert view(replace(FLEET, loaded=(TENANT.key,))).loaded == [str(TENANT)]
    plan = Plan(adapter="a", in_flight="overlap")
    assert rollout_view(FLEET, replace(RUNNING, plan=plan)).in_flight == "overlap"


def test_the_view_is_json_that_reads_back() -> None:
    shown = view(reports={"r1": report("r1")})
    assert FleetView.model_validate_json(shown.model_dump_json()) == shown


# ---- canaries -----------------------------------------------------------------------------------

LOOK = Verdict(
    step=0,
    weight=10.0,
    outcome=Outcome.INCONCLUSIVE,
    at=99.0,
    share=9.5,
    requests=200,
    measurements=(Measurement(name="error_rate", outcome=Outcome.PASS, why="it is 0", canary=0.0),),
)
STEPS = (CanaryStep(weight=10, hold=60), CanaryStep(weight=50, hold="manual"))
CANARY = replace(
    RUNNING,
    plan=Plan(adapter="/new", strategy="canary", steps=STEPS, placement="shared"),
    begun=True,
    placed_at=90.0,
    verdicts=(LOOK,),
)


def test_a_running_canary_shows_its_step_its_weight_and_what_was_seen_last() -> None:
    later = replace(LOOK, outcome=Outcome.FAIL, at=99.5)
    shown = rollout_view(replace(FLEET, rollout=CANARY), CANARY, latest=later).canary
    assert shown is not None
    assert (shown.placement, shown.step, shown.steps) == ("shared", 0, [10, 50])
    assert (shown.weight, shown.pause, shown.hold_until) == (10, None, 150)
    [verdict] = shown.verdicts
    assert (verdict.outcome, verdict.share, verdict.requests) == ("inconclusive", 9.5, 200)
    assert (verdict.measurements[0].name, verdict.measurements[0].outcome) == ("error_rate", "pass")
    assert shown.latest is not None
    assert (shown.latest.outcome, shown.latest.at) == ("fail", 99.5)


def test_a_canary_says_the_share_that_it_got_and_the_one_that_it_was_to_get() -> None:
    class Counted(CanaryStats):
        def share_of(self, revision: str) -> tuple[float | None, int]:
            return (9.8765, 810) if revision == CANARY.target else (None, 0)

    fleet = replace(FLEET, rollout=CANARY)
    shown = rollout_view(fleet, CANARY, stats=Counted()).canary
    assert shown is not None
    assert (shown.weight, shown.share, shown.requests) == (10, 9.88, 810)
    over = replace(CANARY, state=State.ABORTED, ended_at=101.0)
    shown = rollout_view(replace(FLEET, rollout=over), over, stats=Counted()).canary
    assert shown is not None
    assert (shown.share, shown.requests) == (None, 0), (
        "the statistics belong to another step by now"
    )


def test_a_canary_that_waits_says_for_what() -> None:
    waits = replace(CANARY, state=State.PAUSED, pause=Pause.STEP, step=1)
    shown = rollout_view(replace(FLEET, rollout=waits), waits).canary
    assert shown is not None
    assert (shown.step, shown.weight, shown.pause, shown.hold_until) == (1, 50, "step", None)


def test_a_canary_that_has_ended_gets_no_requests_and_keeps_its_verdicts() -> None:
    over = replace(CANARY, state=State.ABORTED, ended_at=101.0)
    shown = rollout_view(replace(FLEET, rollout=over), over, latest=LOOK).canary
    assert shown is not None
    assert (shown.weight, shown.hold_until, shown.latest) == (0, None, None)
    assert len(shown.verdicts) == 1
    assert rollout_view(FLEET, RUNNING).canary is None


def test_a_fleet_with_a_canary_is_json_that_reads_back() -> None:
    shown = fleet_view(
        replace(FLEET, rollout=CANARY),
        {"r1": report("r1")},
        journal_uri="/j",
        warnings=[],
        at=100.0,
        latest=LOOK,
    )
    assert shown.rollout is not None
    assert shown.rollout.canary is not None
    assert FleetView.model_validate_json(shown.model_dump_json()) == shown
