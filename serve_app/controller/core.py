"""The parts that every class of this room works with, put together once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from serve_app.controller.background import BackgroundTasks
from serve_app.controller.decisions import Decisions
from serve_app.controller.desired_state import DesiredState
from serve_app.controller.images import AdapterStore, ImageShelf, Put
from serve_app.controller.journal import Journal
from serve_app.controller.open_reports import OpenReports
from serve_app.controller.retention import AdapterRetention


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """State, decisions about it, and the reports that follow. For one event loop."""

    journal: Journal
    store: AdapterStore
    shelf: ImageShelf
    desired_state: DesiredState
    reports: OpenReports
    retention: AdapterRetention
    decisions: Decisions
    tasks: BackgroundTasks

    @classmethod
    def build(
        cls,
        *,
        journal: Journal,
        store: AdapterStore,
        put: Put,
        declared: str | None,
        grace_s: float,
    ) -> Self:
        """`declared`: the adapter in the settings. `grace_s`: see `AdapterRetention`."""
        tasks, reports, shelf = BackgroundTasks(), OpenReports(), ImageShelf(store, put=put)
        state = DesiredState(journal, declared=declared)
        retention = AdapterRetention(
            store, referenced=state.referenced, tasks=tasks, grace_s=grace_s
        )
        return cls(
            journal=journal,
            store=store,
            shelf=shelf,
            desired_state=state,
            reports=reports,
            retention=retention,
            decisions=Decisions(state, reports, shelf=shelf, retention=retention, tasks=tasks),
            tasks=tasks,
        )

    async def refresh_reports(self, timeout_s: float) -> None:
        """Waits for a new report of every replica, for `timeout_s` at most."""
        await self.reports.refresh(self.desired_state.fleet.observed, timeout_s)
