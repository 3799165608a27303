"""Fleet-wide request statistics of the current canary step."""

from __future__ import annotations

from serve_app.wire.reports import Report
from serve_app.wire.request_stats import RequestStats


class CanaryStats:
    """The latest statistics of each replica, also of replicas that have left since.

    Attributes:
        step_id: the canary step that they belong to; None: no canary runs.
    """

    def __init__(self) -> None:
        self.step_id: str | None = None
        self._by_replica: dict[str, dict[str, RequestStats]] = {}

    def open(self, step_id: str | None) -> None:
        """Starts from zero if this is another step."""
        if step_id != self.step_id:
            self.step_id, self._by_replica = step_id, {}

    def add(self, report: Report) -> None:
        """Stores a replica's numbers so far. Those of another step are ignored."""
        if report.step_id is not None and report.step_id == self.step_id:
            self._by_replica[report.replica] = report.request_stats

    def of(self, revision: str) -> RequestStats:
        """The sum over all replicas."""
        every = (stats.get(revision, RequestStats()) for stats in self._by_replica.values())
        return sum(every, RequestStats())

    def share_of(self, revision: str) -> tuple[float | None, int]:
        """The revision's percentage of the requests that named none, and their number."""
        every = [one for stats in self._by_replica.values() for one in stats.values()]
        chosen = sum(one.chosen for one in every)
        return (100 * self.of(revision).chosen / chosen if chosen else None), chosen
