"""The controller: exactly one, it decides what the fleet holds.

A Serve deployment with one replica, so Serve restarts it when it dies. What users ask of rollouts
is in `serve_app.controller.rollout_requests`; `serve_app.controller.report_server` hears the replicas and answers them. It never calls
a replica. A restarted controller reads the journal and waits to hear what the replicas hold.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace

import ray
from ray import serve

from hotswap_lib import BASE, Adapter, Revision, load_adapter
from serve_app import logs
from serve_app.controller.analysis import CanaryAnalysis, Probing, RayProbes
from serve_app.controller.desired_state import known
from serve_app.controller.fleet_view import fleet_view
from serve_app.controller.images import Put
from serve_app.controller.journal import JournalEntry, JournalUnreadable
from serve_app.controller.loaded_adapters import LoadedAdapters
from serve_app.controller.report_server import GRACE_S, digests
from serve_app.controller.rollout_requests import RolloutRequests
from serve_app.controller.state_dir import default_state_uri
from serve_app.controller.summary import log_summary_when_ready
from serve_app.rollout.recovery import restored
from serve_app.rollout.state import Fleet, State
from serve_app.rollout.walk import to
from serve_app.settings import Settings
from serve_app.wire.admin import AdapterView, FleetView
from serve_app.wire.errors import FleetNotReady

logger = logging.getLogger(__name__)
_LOAD_S = 60.0


class Controller(RolloutRequests):
    """The logic, apart from Ray Serve's wrapper below, so that tests can hold it in hand."""

    def __init__(
        self,
        settings: Settings,
        *,
        state_uri: str,
        put: Put = ray.put,
        load_timeout_s: float = _LOAD_S,
        probing: Probing | None = None,
        grace_s: float = GRACE_S,
    ) -> None:
        super().__init__(settings, state_uri=state_uri, put=put, grace_s=grace_s)
        self._probing = probing or RayProbes("default")
        self._canary_analysis = CanaryAnalysis(
            self._canary_stats,
            fleet=lambda: self._fleet,
            fresh=self._fresh,
            feed=self._feed,
            probing=self._probing,
        )
        self._warnings: list[str] = []
        self._loaded_adapters = LoadedAdapters(
            self._desired_state,
            self._reports,
            self._shelf,
            feed=self._feed,
            timeout_s=load_timeout_s,
        )
        self._ticker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Resume from the journal, or begin with the declared adapter. Raises `AdapterRefused`."""
        entry = await self._read()
        # what may fail comes first: from its claim on, a controller takes the place of the other
        declared = None if self._resumes(entry) else await self._declared()
        before = 0 if entry is None else entry.fleet.epoch
        epoch = await asyncio.to_thread(self._journal.claim, after=before)
        entry = await self._read() or entry  # what the other one had decided until then
        if entry is not None:
            self._desired_state.sources = {**entry.sources, **self._desired_state.sources}
            self._desired_state.decided = True
            self._kept = digests(known(entry.fleet))
        if entry is not None and self._resumes(entry):
            fleet = restored(entry.fleet, at=time.time())
            logger.info(f"resumed as epoch {epoch}, stable {Revision.parse(fleet.stable)}")
        else:
            fleet = declared or await self._declared()
            if entry is not None:
                fleet = _declared_over(entry.fleet, fleet, at=time.time())
        await self._desired_state.write(replace(fleet, epoch=epoch))
        self._ticker = asyncio.create_task(self._tick())

    async def close(self) -> None:
        """Decide nothing any more; what is written is written."""
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.wait([self._ticker])
        await self._canary_analysis.close()

    def check_health(self) -> None:
        """Serve replaces a controller that another one has replaced already."""
        self._check_fenced()

    # ---- users ------------------------------------------------------------------------------

    async def fleet(self) -> FleetView:
        self._check_fenced()
        warnings = list(self._warnings)
        if self._settings.state_uri is None:
            warnings.append(
                "the journal is on this node's disk and does not survive it: set state_uri"
            )
        return fleet_view(
            self._fleet,
            self._reports.last(),
            journal_uri=self._journal.uri,
            warnings=warnings,
            latest=self._canary_analysis.latest,
            step_id=self._canary_stats,
            at=time.time(),
        )

    async def load_adapter(
        self,
        name: str,
        path: str,
        *,
        load_inplace: bool = False,
        expected_generation: int | None = None,
    ) -> AdapterView:
        """Serve an adapter beside the default; returns when every live replica does.

        The content that is loaded under the name already is a success. `load_inplace` lets it
        replace another content. `expected_generation`: the fleet's, as the caller saw it.

        Raises, before anything has changed:
            FleetNotReady: no replica is there to check the adapter for.
            AdapterRefused: no replica could hold it, or the name cannot be one.
            AdapterAlreadyLoaded: another content has that name.
            GenerationMismatch: something was decided since.

        Raises, after what was loaded under the name before is back:
            AdapterLoadFailed: a replica cannot serve it.
            AdapterLoadTimeout: some replicas did not serve it in time.
        """
        if not self._fleet.observed:
            raise FleetNotReady
        loading = self._loaded_adapters.load(
            name, path, load_inplace=load_inplace, expected_generation=expected_generation
        )
        return await self._see_through(loading)

    async def unload_adapter(
        self, name: str, *, expected_generation: int | None = None
    ) -> AdapterView:
        """Serve it by its name no longer; requests that run on it finish.

        Raises:
            AdapterNotLoaded: nothing is loaded under the name.
            GenerationMismatch: something was decided since the caller looked.
        """
        unloading = self._loaded_adapters.unload(name, expected_generation=expected_generation)
        return await self._see_through(unloading)

    async def adapters(self) -> list[AdapterView]:
        """What is loaded beside the default, in the order in which it was loaded."""
        self._check_fenced()
        return self._loaded_adapters.views()

    # ---- inside -----------------------------------------------------------------------------

    async def _read(self) -> JournalEntry | None:
        """The journal. One that cannot be read is put aside: the replicas know what they hold."""
        try:
            return await asyncio.to_thread(self._journal.read)
        except JournalUnreadable as error:
            aside = await asyncio.to_thread(self._journal.set_aside)
            self._warnings.append(f"{error}; it is now at {aside}")
            logger.warning(self._warnings[-1])
            return None

    def _resumes(self, entry: JournalEntry | None) -> bool:
        """The declared adapter wins only when someone changed it since the journal was written."""
        return entry is not None and entry.declared == self._settings.adapter

    async def _declared(self) -> Fleet:
        source = self._settings.adapter
        if source is None or source == BASE.name:
            return self._fleet
        adapter: Adapter = await asyncio.to_thread(
            load_adapter, source, name=self._settings.adapter_name
        )
        await asyncio.to_thread(self._store.keep, adapter)
        stable = adapter.revision.key
        self._desired_state.sources[stable] = source
        return replace(self._fleet, stable=stable, history=(BASE.key, stable))

    async def _look(self, *, at: float) -> None:
        await super()._look(at=at)
        self._canary_analysis.tick(at=at)


def _declared_over(before: Fleet, declared: Fleet, *, at: float) -> Fleet:
    """A deploy says what is stable now; not what else is loaded, nor what has been until now."""
    if before.running is not None:
        before = to(before, State.SUPERSEDED, at=at, reason="a deploy declared another adapter")
    last = () if before.rollout is None else (before.rollout,)
    return replace(
        declared,
        loaded=before.loaded,
        rollouts=before.rollouts,
        past=(*before.past, *last),
        keys=before.keys,
    )


class RolloutController(Controller):
    """The deployment; scripts reach it with `get_deployment_handle("RolloutController", app)`."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        logs.attach()
        app = serve.get_replica_context().app_name
        uri = settings.state_uri or default_state_uri(app)
        super().__init__(settings, state_uri=uri, probing=RayProbes(app))
        await self.start()
        self._summary = asyncio.create_task(log_summary_when_ready(app, settings, self.fleet))
