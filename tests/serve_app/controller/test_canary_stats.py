"""Fleet-wide request statistics of a canary step."""

from __future__ import annotations

from serve_app.controller.canary_stats import CanaryStats
from serve_app.rollout.state import ReplicaState
from serve_app.wire.reports import Report
from serve_app.wire.request_stats import RequestStats

STEP = "r1.1.1"


def report(replica: str, step_id: str | None = STEP, **request_stats: RequestStats) -> Report:
    return Report(
        replica=replica,
        layout="layout",
        acting_on=None,
        state=ReplicaState(holds="alpha@1"),
        running=0,
        recompiles=0,
        limit_hits=0,
        last_swap=None,
        pid=1,
        node="node",
        step_id=step_id,
        request_stats=request_stats,
    )


def opened(*reports: Report) -> CanaryStats:
    stats = CanaryStats()
    stats.open(STEP)
    for each in reports:
        stats.add(each)
    return stats


def test_a_revision_has_what_all_replicas_counted_of_it() -> None:
    stats = opened(
        report(
            "r1",
            alpha=RequestStats(requests=9, chosen=9),
            beta=RequestStats(requests=1, latency_s=[1.0]),
        ),
        report("r2", beta=RequestStats(requests=2, errors=1, latency_s=[2.0])),
        report("r3"),
    )
    assert stats.of("beta") == RequestStats(requests=3, errors=1, latency_s=[1.0, 2.0])
    assert stats.of("alpha") == RequestStats(requests=9, chosen=9)
    assert stats.of("gamma") == RequestStats()


def test_a_later_report_of_a_replica_takes_the_place_of_its_earlier_one() -> None:
    stats = opened(
        report("r1", beta=RequestStats(requests=1)), report("r1", beta=RequestStats(requests=5))
    )
    assert stats.of("beta").requests == 5


def test_what_a_replica_answered_before_it_left_was_answered() -> None:
    stats = opened(report("r1", beta=RequestStats(requests=4)))
    for _ in range(3):  # r1 has left
        stats.add(report("r2", beta=RequestStats(requests=2)))
    assert stats.of("beta").requests == 6


def test_reports_of_another_step_or_of_none_do_not_count() -> None:
    stats = opened(report("r1", beta=RequestStats(requests=4)))
    stats.add(report("r1", "r1.2.1", beta=RequestStats(requests=9)))
    stats.add(report("r2", None, beta=RequestStats(requests=9)))
    assert stats.of("beta").requests == 4
    nothing = CanaryStats()
    nothing.add(report("r1", None, beta=RequestStats(requests=9)))
    assert nothing.of("beta") == RequestStats()


def test_a_new_step_begins_with_nothing_and_the_same_one_goes_on() -> None:
    stats = opened(report("r1", beta=RequestStats(requests=4)))
    stats.open(STEP)
    assert stats.of("beta").requests == 4
    stats.open("r1.2.1")
    assert (stats.step_id, stats.of("beta")) == ("r1.2.1", RequestStats())
    stats.add(report("r1", beta=RequestStats(requests=5)))
    assert stats.of("beta") == RequestStats(), "it still counted for the step before"


def test_the_share_is_of_the_requests_that_named_no_revision() -> None:
    stats = opened(
        report(
            "r1",
            alpha=RequestStats(requests=90, chosen=60),
            beta=RequestStats(requests=50, chosen=15),
        ),
        report(
            "r2", alpha=RequestStats(requests=5, chosen=0), beta=RequestStats(requests=5, chosen=5)
        ),
    )
    assert stats.share_of("beta") == (25.0, 80)
    assert stats.share_of("alpha") == (75.0, 80)
    assert stats.share_of("gamma") == (0.0, 80)


def test_a_share_of_nothing_is_unknown() -> None:
    assert opened().share_of("beta") == (None, 0)
    assert opened(report("r1", beta=RequestStats(requests=3))).share_of("beta") == (None, 0)
