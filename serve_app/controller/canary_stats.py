"""The controller's sum of what the replicas counted in the current step_id."""

from __future__ import annotations

from serve_app.wire.reports import Report
from serve_app.wire.request_stats import RequestStats


class CanaryStats:
    """Tallies by replica, also of those that left since: what they answered was answered."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._heard: dict[str, dict[str, RequestStats]] = {}

    def open(self, name: str | None) -> None:
        """Begin with nothing when this is another step_id."""
        if name != self.name:
            self.name, self._heard = name, {}

    def hear(self, report: Report) -> None:
        """A replica's numbers so far; those of another step_id do not count."""
        if report.step_id is not None and report.step_id == self.name:
            self._heard[report.replica] = report.request_stats

    def of(self, revision: str) -> RequestStats:
        heard = (
            request_stats.get(revision, RequestStats()) for request_stats in self._heard.values()
        )
        return sum(heard, RequestStats())

    def share_of(self, revision: str) -> tuple[float | None, int]:
        """The percentage of the requests that named no revision, and how many those were."""
        every = [
            stats for request_stats in self._heard.values() for stats in request_stats.values()
        ]
        chosen = sum(stats.chosen for stats in every)
        return (100 * self.of(revision).chosen / chosen if chosen else None), chosen
