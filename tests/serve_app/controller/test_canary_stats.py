"""The sum of what replicas counted in a trial."""

from __future__ import annotations

from hotswap_lib import Revision
from serve_app.controller.canary_stats import Trial
from serve_app.engine.request_recorder import Tally
from serve_app.wire.reports import Report

TRIAL = "r1.1.1"


def report(replica: str, trial: str | None = TRIAL, **tallies: Tally) -> Report:
    return Report(
        replica=replica,
        layout="layout",
        acting_on=None,
        holds=Revision("alpha", "1234abcd" * 8),
        staged=None,
        serving=True,
        failure=None,
        running=0,
        recompiles=0,
        limit_hits=0,
        last_swap=None,
        pid=1,
        node="node",
        trial=trial,
        tallies=tallies,
    )


def opened(*reports: Report) -> Trial:
    trial = Trial()
    trial.open(TRIAL)
    for each in reports:
        trial.hear(each)
    return trial


def test_a_revision_has_what_all_replicas_counted_of_it() -> None:
    trial = opened(
        report("r1", alpha=Tally(requests=9, chosen=9), beta=Tally(requests=1, latency_s=[1.0])),
        report("r2", beta=Tally(requests=2, errors=1, latency_s=[2.0])),
        report("r3"),
    )
    assert trial.of("beta") == Tally(requests=3, errors=1, latency_s=[1.0, 2.0])
    assert trial.of("alpha") == Tally(requests=9, chosen=9)
    assert trial.of("gamma") == Tally()


def test_a_later_report_of_a_replica_takes_the_place_of_its_earlier_one() -> None:
    trial = opened(report("r1", beta=Tally(requests=1)), report("r1", beta=Tally(requests=5)))
    assert trial.of("beta").requests == 5


def test_what_a_replica_answered_before_it_left_was_answered() -> None:
    trial = opened(report("r1", beta=Tally(requests=4)))
    for _ in range(3):  # r1 is never heard of again
        trial.hear(report("r2", beta=Tally(requests=2)))
    assert trial.of("beta").requests == 6


def test_reports_of_another_trial_or_of_none_do_not_count() -> None:
    trial = opened(report("r1", beta=Tally(requests=4)))
    trial.hear(report("r1", "r1.2.1", beta=Tally(requests=9)))
    trial.hear(report("r2", None, beta=Tally(requests=9)))
    assert trial.of("beta").requests == 4
    nothing = Trial()
    nothing.hear(report("r1", None, beta=Tally(requests=9)))
    assert nothing.of("beta") == Tally()


def test_a_new_trial_begins_with_nothing_and_the_same_one_goes_on() -> None:
    trial = opened(report("r1", beta=Tally(requests=4)))
    trial.open(TRIAL)
    assert trial.of("beta").requests == 4
    trial.open("r1.2.1")
    assert (trial.name, trial.of("beta")) == ("r1.2.1", Tally())
    trial.hear(report("r1", beta=Tally(requests=5)))
    assert trial.of("beta") == Tally(), "it still counted for the trial before"


def test_the_share_is_of_the_requests_that_named_no_revision() -> None:
    trial = opened(
        report("r1", alpha=Tally(requests=90, chosen=60), beta=Tally(requests=50, chosen=15)),
        report("r2", alpha=Tally(requests=5, chosen=0), beta=Tally(requests=5, chosen=5)),
    )
    assert trial.share_of("beta") == (25.0, 80)
    assert trial.share_of("alpha") == (75.0, 80)
    assert trial.share_of("gamma") == (0.0, 80)


def test_a_share_of_nothing_is_unknown() -> None:
    assert opened().share_of("beta") == (None, 0)
    assert opened(report("r1", beta=Tally(requests=3))).share_of("beta") == (None, 0)
