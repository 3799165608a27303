"""The controller: exactly one, it decides what the fleet holds.

A Serve deployment with one replica, so Serve restarts it when it dies. What users ask for is here;
`serve_app.dispatch` hears the replicas and answers them. It never calls a replica. A restarted
controller reads the journal and waits to hear what the replicas hold.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace

import ray
from ray import serve

from hotswap_lib import BASE, Adapter, Revision, load_adapter

from .dispatch import Dispatch
from .fleet_view import fleet_view, rollout_view
from .images import Put
from .messages import from_key, key
from .rollout.events import AbortRequested, Asked
from .rollout.machine import restored
from .rollout.plan import InFlight, Plan
from .rollout.state import Fleet, Rollout, State
from .settings import Settings
from .state_dir import default_state_uri
from .tenants import Tenants
from .views import AdapterView, FleetView, RolloutView

logger = logging.getLogger("ray.serve")
_LOAD_S = 60.0


class NoSuchRollout(Exception):
    code = "rollout_not_found"

    def __init__(self, id: str) -> None:
        super().__init__(id)
        self.id = id

    def __str__(self) -> str:
        return f"there is no rollout {self.id!r}"


class NothingToUndo(Exception):
    code = "nothing_to_undo"

    def __str__(self) -> str:
        return "there is no earlier revision to go back to"


class FleetNotReady(Exception):
    code = "fleet_not_ready"

    def __str__(self) -> str:
        return "no replica has reported yet, so no adapter can be checked against the fleet"


class PlanImpossible(Exception):
    """This fleet cannot do what the plan says; nothing has changed."""

    code = "plan_impossible"

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return f"the plan is impossible here: {self.why}"


class Controller(Dispatch):
    """The logic, apart from Ray Serve's wrapper below, so that tests can hold it in hand."""

    def __init__(
        self,
        settings: Settings,
        *,
        state_uri: str,
        put: Put = ray.put,
        load_timeout_s: float = _LOAD_S,
    ) -> None:
        super().__init__(settings, state_uri=state_uri, put=put)
        self._tenants = Tenants(
            self._intent, self._reports, self._shelf, feed=self._feed, timeout_s=load_timeout_s
        )
        self._ticker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Resume from the journal, or begin with the declared adapter. Raises `AdapterRefused`."""
        entry = await asyncio.to_thread(self._journal.read)
        if entry is not None:
            self._intent.sources = entry.sources
        # the declared adapter wins only when someone changed it since the journal was written
        if entry is not None and entry.declared == self._settings.adapter:
            fleet = restored(entry.fleet, at=time.time())
            logger.info(f"resumed epoch {fleet.epoch}, stable {from_key(fleet.stable)}")
        else:
            fleet = await self._declared()
            if entry is not None:  # which says what nobody has to name, not what else is loaded
                fleet = replace(fleet, epoch=entry.fleet.epoch + 1, loaded=entry.fleet.loaded)
        await self._intent.write(fleet)
        self._ticker = asyncio.create_task(self._tick())

    # ---- users ------------------------------------------------------------------------------

    async def start_rollout(self, plan: Plan | dict[str, object]) -> RolloutView:
        """Check the adapter, then begin.

        Raises, before anything has changed:
            PlanImpossible: this fleet cannot do what the plan says.
            FleetNotReady: no replica is there to check the adapter for.
            AdapterRefused: no replica could hold it.
        """
        plan = plan if isinstance(plan, Plan) else Plan.model_validate(plan)
        self._in_flight(plan)
        if not self._fleet.observed:
            raise FleetNotReady
        if plan.adapter == BASE.name:
            revision = BASE
        else:
            adapter = await asyncio.to_thread(load_adapter, plan.adapter, name=plan.name)
            revision = await self._shelf.accept(adapter)
        return await self._begin(plan, revision)

    async def undo(self) -> RolloutView:
        """Abort what runs; else roll back to the stable revision before this one."""
        if (running := self._fleet.running) is not None:
            return await self.abort(running.id, reason="undone")
        earlier = [name for name in self._fleet.history if name != self._fleet.stable]
        if not earlier:
            raise NothingToUndo
        revision = from_key(earlier[-1])
        for fingerprint in {report.layout for report in self._reports.last().values()}:
            await self._shelf.get(revision, fingerprint)  # refuse now, not on the replicas
        plan = Plan(
            adapter=self._intent.sources.get(earlier[-1], revision.name),
            name=revision.name,
            in_flight=self._way_here(),
        )
        return await self._begin(plan, revision)

    async def abort(self, id: str, reason: str = "aborted by request") -> RolloutView:
        """Send every replica back to stable; does nothing when the rollout has ended."""
        self._find(id)
        if (running := self._fleet.running) is not None and running.id == id:
            await self._feed(AbortRequested(reason=reason, at=time.time()))
        return await self.rollout(id)

    async def rollout(self, id: str) -> RolloutView:
        return rollout_view(self._fleet, self._find(id))

    async def rollouts(self) -> list[RolloutView]:
        return [rollout_view(self._fleet, one) for one in reversed(self._all())]

    async def fleet(self) -> FleetView:
        warnings = []
        if self._settings.state_uri is None:
            warnings.append(
                "the journal is on this node's disk and does not survive it: set state_uri"
            )
        return fleet_view(
            self._fleet,
            self._reports.last(),
            journal_uri=self._journal.uri,
            warnings=warnings,
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
        loading = self._tenants.load(
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
        unloading = self._tenants.unload(name, expected_generation=expected_generation)
        return await self._see_through(unloading)

    async def adapters(self) -> list[AdapterView]:
        """What is loaded beside the default, in the order in which it was loaded."""
        return self._tenants.views()

    # ---- inside -----------------------------------------------------------------------------

    def _in_flight(self, plan: Plan) -> InFlight:
        """What happens to running requests. Raises `PlanImpossible`."""
        # what does not generate keeps nothing of a request between two steps
        can_overlap = self._settings.task in ("embed", "classify") or self._settings.lanes >= 2
        if plan.in_flight == "overlap" and not can_overlap:
            raise PlanImpossible("in_flight='overlap' needs two lanes, and the fleet has lanes=1")
        return plan.in_flight or ("overlap" if can_overlap else "drain")

    def _way_here(self) -> InFlight | None:
        """The policy of the rollout that an undo takes back; None: whatever the fleet can."""
        for rollout in reversed(self._all()):
            if rollout.state is State.SUCCEEDED:
                return "drain" if rollout.plan.in_flight == "drain" else None
        return None

    async def _declared(self) -> Fleet:
        source = self._settings.adapter
        if source is None or source == BASE.name:
            return self._fleet
        adapter: Adapter = await asyncio.to_thread(
            load_adapter, source, name=self._settings.adapter_name
        )
        await asyncio.to_thread(self._store.keep, adapter)
        stable = key(adapter.revision)
        self._intent.sources[stable] = source
        return replace(self._fleet, stable=stable, history=(key(BASE), stable))

    async def _begin(self, plan: Plan, revision: Revision) -> RolloutView:
        plan = plan.model_copy(update={"in_flight": self._in_flight(plan)})
        self._intent.sources[key(revision)] = plan.adapter
        await self._feed(Asked(plan=plan, target=key(revision), at=time.time()))
        assert self._fleet.rollout is not None
        return rollout_view(self._fleet, self._fleet.rollout)

    def _all(self) -> list[Rollout]:
        last = self._fleet.rollout
        return [*self._fleet.past, *([] if last is None else [last])]

    def _find(self, id: str) -> Rollout:
        for one in self._all():
            if one.id == id:
                return one
        raise NoSuchRollout(id)


class RolloutController(Controller):
    """The deployment; scripts reach it with `get_deployment_handle("RolloutController", app)`."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        uri = settings.state_uri or default_state_uri(serve.get_replica_context().app_name)
        super().__init__(settings, state_uri=uri)
        await self.start()
