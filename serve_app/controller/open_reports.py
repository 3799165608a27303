"""The controller's end of every control lane: who said what last, and the bell of an open report.

Between the controller, which decides, and those who wait for replicas to have done something.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from serve_app.rollout.state import Desired
from serve_app.wire.reports import Report


@dataclass(slots=True)
class OpenReport:
    """One replica's last report. `told`: what it heard since, so that the report is out of date."""

    report: Report
    told: Desired | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def serves(self, revision: str) -> bool:
        """It said so, and was told nothing since that could have changed it."""
        return self.told is None and revision in self.report.state.served

    def names(self, revision: str) -> bool:
        """It may let requests in that name this revision, although it is not its default."""
        return self.told is not None or revision in self.report.state.also_serves


class OpenReports:
    """Replica → its last report. For one event loop."""

    def __init__(self) -> None:
        self._reports: dict[str, OpenReport] = {}
        self._heard = asyncio.Event()

    def open(self, report: Report) -> OpenReport:
        """The newest report of a replica; it ends the older one."""
        line = OpenReport(report)
        if (older := self._reports.get(report.replica)) is not None:
            older.changed.set()
        self._reports[report.replica] = line
        return line

    def close(self, replica: str) -> None:
        self._reports.pop(replica, None)

    def items(self) -> Iterator[tuple[str, OpenReport]]:
        return iter(self._reports.items())

    def last(self) -> dict[str, Report]:
        return {name: line.report for name, line in self._reports.items()}

    def of(self, replicas: Iterable[str]) -> dict[str, OpenReport | None]:
        """Those replicas with what they said; None for one that was not heard of yet."""
        return {name: self._reports.get(name) for name in replicas}

    def ring(self) -> None:
        """Answer every open report, so that each replica reports again."""
        for line in self._reports.values():
            line.changed.set()

    def wake(self) -> None:
        """Something was heard or decided: whoever waits looks again."""
        self._heard.set()
        self._heard = asyncio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until replicas have done what the condition looks for. Raises what it raises."""
        while not condition():
            await self._heard.wait()
