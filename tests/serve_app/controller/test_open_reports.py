"""The latest report of each replica, and what ends its long poll."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from serve_app.controller.open_reports import OpenReport, OpenReports
from serve_app.rollout.state import Desired, ReplicaState, Traffic
from serve_app.wire.reports import Report
from tests.serve_app.fakes import settled

WANT = Desired(epoch=1, generation=3, hold="a@1", stable="a@1")
SPLIT = Traffic(canary="b@2", weight=5, placement="shared", step_id="rollout-1.1.1")


def report(
    replica: str = "r1", *, acting_on: Desired | None = WANT, also_serves: tuple[str, ...] = ()
) -> Report:
    return Report(
        replica=replica,
        layout="layout",
        acting_on=acting_on,
        state=ReplicaState(holds="a@1", serving=True, also_serves=also_serves),
        running=0,
        recompiles=0,
        limit_hits=0,
        last_swap=None,
        pid=1,
        node="n",
    )


@pytest.mark.parametrize(
    ("want", "differs"),
    [
        (WANT, False),
        (replace(WANT, generation=9), False),
        (replace(WANT, generation=9, sources=(("a@1", "/a"),)), False),
        (replace(WANT, generation=9, hold="b@2"), True),
        (replace(WANT, generation=9, traffic=SPLIT), True),
        (replace(WANT, epoch=2, generation=9), True),
    ],
)
def test_a_document_differs_if_it_changes_something_for_the_replica(
    want: Desired, differs: bool
) -> None:
    assert OpenReport(report()).differs_from(want) is differs
    assert OpenReport(report(acting_on=None)).differs_from(want)


def test_a_report_counts_until_it_is_answered_with_a_document() -> None:
    opened = OpenReport(report(also_serves=("b@2",)))
    assert opened.serves("a@1")
    assert opened.serves("b@2")
    assert opened.may_serve("b@2")
    assert not opened.may_serve("c@3")
    opened.answered = WANT
    assert not opened.serves("b@2")
    assert opened.may_serve("c@3"), "it may act on the document already"


def test_a_refresh_ends_when_every_replica_has_reported_again() -> None:
    async def story() -> None:
        reports = OpenReports()
        first = [reports.open(report(name)) for name in ("r1", "r2")]
        refresh = asyncio.create_task(reports.refresh(["r1", "r2"], timeout_s=60))
        await settled()
        assert all(one.changed.is_set() for one in first), "each long poll has to end"
        for name in ("r1", "r2"):
            assert not refresh.done()
            reports.open(report(name))
            reports.notify()
            await settled()
        await asyncio.wait_for(refresh, 1)

    asyncio.run(story())


def test_a_refresh_does_not_wait_for_ever() -> None:
    async def story() -> None:
        reports = OpenReports()
        reports.open(report())
        await asyncio.wait_for(reports.refresh(["r1"], timeout_s=0.01), 5)

    asyncio.run(story())
