"""The controller's sum of what the replicas counted in the current trial."""

from __future__ import annotations

from serve_app.engine.request_recorder import Tally
from serve_app.wire.reports import Report


class Trial:
    """Tallies by replica, also of those that left since: what they answered was answered."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._heard: dict[str, dict[str, Tally]] = {}

    def open(self, name: str | None) -> None:
        """Begin with nothing when this is another trial."""
        if name != self.name:
            self.name, self._heard = name, {}

    def hear(self, report: Report) -> None:
        """A replica's numbers so far; those of another trial do not count."""
        if report.trial is not None and report.trial == self.name:
            self._heard[report.replica] = report.tallies

    def of(self, revision: str) -> Tally:
        heard = (tallies.get(revision, Tally()) for tallies in self._heard.values())
        return sum(heard, Tally())

    def share_of(self, revision: str) -> tuple[float | None, int]:
        """The percentage of the requests that named no revision, and how many those were."""
        every = [tally for tallies in self._heard.values() for tally in tallies.values()]
        chosen = sum(tally.chosen for tally in every)
        return (100 * self.of(revision).chosen / chosen if chosen else None), chosen
