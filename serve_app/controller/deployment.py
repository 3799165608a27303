"""The RolloutController deployment: exactly one replica, which decides what the fleet holds.

Serve restarts it when it dies; it then resumes from the journal and waits for reports. It never
calls a replica. `Controller` puts the parts of this room together and delegates to them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Unpack

import ray
from ray import serve

from hotswap_lib import Layout
from serve_app import logs
from serve_app.controller.analysis import CanaryAnalysis
from serve_app.controller.canary_stats import CanaryStats
from serve_app.controller.core import Core
from serve_app.controller.fleet_view import fleet_view
from serve_app.controller.images import AdapterStore, Put
from serve_app.controller.journal import Journal
from serve_app.controller.loaded_adapters import LoadedAdapters
from serve_app.controller.probing import Probing, RayProbes
from serve_app.controller.report_server import ReportServer
from serve_app.controller.retention import GRACE_S
from serve_app.controller.rollout_requests import RolloutRequests
from serve_app.controller.startup import Startup
from serve_app.controller.state_dir import default_state_uri
from serve_app.controller.summary import log_summary_when_ready
from serve_app.rollout.events import Ticked
from serve_app.rollout.plan import Plan
from serve_app.rollout.precondition import PreconditionArgs
from serve_app.settings import Settings
from serve_app.wire.admin import AdapterView, FleetView, RolloutView
from serve_app.wire.reports import Answer, Report

logger = logging.getLogger(__name__)
_LOAD_S = 60.0
_TICK_S = 0.25
_NO_STATE_URI = "the journal is on this node's disk and does not survive it: set state_uri"


class Controller:
    """The controller without Ray Serve. For one event loop.

    Args:
        journal, store: both below the same `state_uri`.
        put: `ray.put`, or a fake.
        load_timeout_s: how long a load waits for the replicas.
        grace_s: how long a stored adapter outlives the last reference to it.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        journal: Journal,
        store: AdapterStore,
        put: Put = ray.put,
        probing: Probing,
        load_timeout_s: float = _LOAD_S,
        grace_s: float = GRACE_S,
    ) -> None:
        core = self._core = Core.build(
            journal=journal, store=store, put=put, declared=settings.adapter, grace_s=grace_s
        )
        self._settings = settings
        self._analysis = CanaryAnalysis(
            CanaryStats(),
            fleet=lambda: core.desired_state.fleet,
            refresh=core.refresh_reports,
            decide=core.decisions.decide,
            probing=probing,
        )
        self._report_server = ReportServer(
            core,
            canary_stats=self._analysis.stats,
            poll_s=settings.poll_s,
            silence_s=settings.silence_s,
        )
        self._rollout_requests = RolloutRequests(
            core, settings, analysis=self._analysis, probing=probing
        )
        self._loaded_adapters = LoadedAdapters(core, timeout_s=load_timeout_s)
        self._startup = Startup(core, settings)
        self._ticker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """See `Startup.run`."""
        await self._startup.run()
        self._ticker = asyncio.create_task(self._tick())

    async def close(self) -> None:
        """Ends everything that acts by itself. Decisions so far are in the journal."""
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.wait([self._ticker])
        await self._analysis.close()

    def check_health(self) -> None:
        """Raises `Fenced` when another controller has taken over; Serve then replaces this one."""
        self._core.decisions.check_fenced()

    # ---- replicas -----------------------------------------------------------------------------

    async def join(self, replica: str, layout: Layout) -> None:
        await self._report_server.join(replica, layout)

    async def report(self, report: Report) -> Answer:
        """See `ReportServer.report`."""
        return await self._report_server.report(report)

    async def leave(self, replica: str) -> None:
        await self._report_server.leave(replica)

    # ---- users --------------------------------------------------------------------------------

    async def fleet(self) -> FleetView:
        """Raises `Fenced`."""
        self._core.decisions.check_fenced()
        warnings = [*self._startup.warnings]
        if self._settings.state_uri is None:
            warnings.append(_NO_STATE_URI)
        return fleet_view(
            self._core.desired_state.fleet,
            self._core.reports.last(),
            journal_uri=self._core.journal.uri,
            warnings=warnings,
            latest=self._analysis.latest,
            stats=self._analysis.stats,
            at=time.time(),
        )

    async def start_rollout(
        self, plan: Plan | dict[str, object], **given: Unpack[PreconditionArgs]
    ) -> RolloutView:
        """See `RolloutRequests.start`."""
        return await self._rollout_requests.start(Plan.model_validate(plan), **given)

    async def undo(
        self, *, to: str | None = None, **given: Unpack[PreconditionArgs]
    ) -> RolloutView:
        """See `RolloutRequests.undo`."""
        return await self._rollout_requests.undo(to=to, **given)

    async def abort(
        self, id: str, reason: str = "aborted by request", **given: Unpack[PreconditionArgs]
    ) -> RolloutView:
        """See `RolloutRequests.abort`."""
        return await self._rollout_requests.abort(id, reason, **given)

    async def promote(
        self, id: str, *, full: bool = False, **given: Unpack[PreconditionArgs]
    ) -> RolloutView:
        """See `RolloutRequests.promote`."""
        return await self._rollout_requests.promote(id, full=full, **given)

    async def pause(self, id: str, **given: Unpack[PreconditionArgs]) -> RolloutView:
        """See `RolloutRequests.pause`."""
        return await self._rollout_requests.pause(id, **given)

    async def resume(self, id: str, **given: Unpack[PreconditionArgs]) -> RolloutView:
        """See `RolloutRequests.resume`."""
        return await self._rollout_requests.resume(id, **given)

    async def retry(self, id: str, **given: Unpack[PreconditionArgs]) -> RolloutView:
        """See `RolloutRequests.retry`."""
        return await self._rollout_requests.retry(id, **given)

    async def rollout(self, id: str) -> RolloutView:
        """Raises `RolloutNotFound`."""
        return await self._rollout_requests.rollout(id)

    async def rollouts(self) -> list[RolloutView]:
        """Newest first."""
        return await self._rollout_requests.rollouts()

    async def load_adapter(
        self,
        name: str,
        path: str,
        *,
        load_inplace: bool = False,
        expected_generation: int | None = None,
    ) -> AdapterView:
        """See `LoadedAdapters.load`."""
        return await self._loaded_adapters.load(
            name, path, load_inplace=load_inplace, expected_generation=expected_generation
        )

    async def unload_adapter(
        self, name: str, *, expected_generation: int | None = None
    ) -> AdapterView:
        """See `LoadedAdapters.unload`."""
        return await self._loaded_adapters.unload(name, expected_generation=expected_generation)

    async def adapters(self) -> list[AdapterView]:
        """The loaded adapters, in the order in which they were loaded."""
        return self._loaded_adapters.views()

    # ---- time ---------------------------------------------------------------------------------

    async def _tick(self) -> None:
        while not self._core.decisions.is_fenced:
            await asyncio.sleep(_TICK_S)
            try:
                await self._advance(at=time.time())
            except Exception as error:  # deadlines must go on when the journal is out of reach
                logger.warning(f"could not decide, trying again: {error}")

    async def _advance(self, *, at: float) -> None:
        await self._report_server.drop_silent(at=at)
        if self._core.desired_state.fleet.running is not None:
            await self._core.decisions.decide(Ticked(at=at))
        self._core.retention.tick(at=at)
        self._analysis.tick(at=at)


class RolloutController(Controller):
    """The deployment; scripts reach it with `get_deployment_handle("RolloutController", app)`."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        logs.attach(access_log=False)  # each replica ends a report every `poll_s`
        app = serve.get_replica_context().app_name
        uri = settings.state_uri or default_state_uri(app)
        super().__init__(
            settings, journal=Journal(uri), store=AdapterStore(uri), probing=RayProbes(app)
        )
        await self.start()
        self._summary = asyncio.create_task(log_summary_when_ready(app, settings, self.fleet))
