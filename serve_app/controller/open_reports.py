"""The latest report of each replica, and the event that ends its pending long poll.

Between the decisions and those who wait until replicas have carried one out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields
from operator import attrgetter

from serve_app.rollout.state import Desired
from serve_app.wire.reports import Report

# every field that changes something for a replica
_ACTED_ON = attrgetter(
    *(each.name for each in fields(Desired) if each.name not in ("generation", "sources"))
)


@dataclass(slots=True)
class OpenReport:
    """The latest report of one replica.

    Attributes:
        answered: the document that it was answered with; from then on the report is out of date.
        changed: set when the report has to be answered.
    """

    report: Report
    answered: Desired | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def serves(self, revision: str) -> bool:
        """Returns True if the replica serves the revision, and no newer document may change it."""
        return self.answered is None and revision in self.report.state.served

    def may_serve(self, revision: str) -> bool:
        """Returns True if requests that name the revision may still be let in.

        The default is not considered.
        """
        return self.answered is not None or revision in self.report.state.also_serves

    def differs_from(self, want: Desired) -> bool:
        """Returns True if the replica does not act on `want` yet.

        A newer generation that changes nothing for this replica is no difference.
        """
        has = self.report.acting_on
        return has is None or (
            (has.epoch, has.generation) != (want.epoch, want.generation)
            and _ACTED_ON(has) != _ACTED_ON(want)
        )


class OpenReports:
    """Replica → its latest report. For one event loop."""

    def __init__(self) -> None:
        self._reports: dict[str, OpenReport] = {}
        self._changed = asyncio.Event()

    def open(self, report: Report) -> OpenReport:
        """Store a report. The replica's earlier one is answered."""
        opened = OpenReport(report)
        if (earlier := self._reports.get(report.replica)) is not None:
            earlier.changed.set()
        self._reports[report.replica] = opened
        return opened

    def close(self, replica: str) -> None:
        self._reports.pop(replica, None)

    def items(self) -> Iterator[tuple[str, OpenReport]]:
        return iter(self._reports.items())

    def last(self) -> dict[str, Report]:
        return {name: one.report for name, one in self._reports.items()}

    def of(self, replicas: Iterable[str]) -> dict[str, OpenReport | None]:
        """The latest report of each of these replicas; None for one without a report."""
        return {name: self._reports.get(name) for name in replicas}

    def answer_all(self) -> None:
        """Answer every report, so that each replica reports again."""
        for one in self._reports.values():
            one.changed.set()

    def notify(self) -> None:
        """A report or a decision has come: `until` checks its condition again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds. Raises what it raises."""
        while not condition():
            await self._changed.wait()

    async def refresh(self, replicas: Iterable[str], timeout_s: float) -> None:
        """Wait for a new report of each of these replicas, but no longer than `timeout_s`."""
        before = self.of(replicas)
        self.answer_all()

        def all_reported() -> bool:
            return all(now is not before[name] for name, now in self.of(before).items())

        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.until(all_reported)
